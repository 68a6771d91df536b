"""What the tests of bad inputs share: a good request and its answer, and messages that no client of ours would send."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from kvrelay import Client, rpc
from kvrelay.errors import KvrelayError
from kvrelay.v1 import inference_pb2 as pb
from tests.e2e.cluster import Cluster

SERVICE = "/kvrelay.v1.InferenceService/"
CONTEXT = 8192
FOREVER: dict[str, Any] = {"max_tokens": CONTEXT, "ignore_eos": True, "temperature": 0}
INTERNALS = re.compile(r"Traceback|\.py\b|\b[A-Z]\w*(Error|Exception|Argument)\b|object at 0x|<class|\bNone\b|/\w+/\w+")
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


@pytest.fixture
def unharmed(cluster: Cluster, client: Client) -> Iterator[None]:
    """For every test of a file, which asks for it: as a plugin's, autouse would reach all other files."""
    pids, expected = process_ids(cluster), answer(client)
    yield
    cluster.wait_whole()
    assert answer(client) == expected
    assert process_ids(cluster) == pids


def process_ids(cluster: Cluster) -> dict[str, int]:
    status = cluster.status()
    gateways = {gateway.id: gateway.pid for gateway in status.gateways if gateway.address == cluster.target}
    return gateways | {worker.id: worker.pid for worker in status.workers}


def answer(client: Client) -> tuple[int, ...]:
    return client.complete("a good request", max_tokens=3, temperature=0, timeout=30).token_ids


def refusal(target: str, message: bytes, method: str = "Generate") -> KvrelayError:
    """What the server says to these bytes, which no client of ours would send."""
    with rpc.open_sync_channel(target) as channel:
        call = channel.unary_stream(SERVICE + method, None, None)
        with pytest.raises(KvrelayError) as caught, rpc.translated():
            list(call(message, timeout=30))
    assert not INTERNALS.search(caught.value.message)
    assert not CONTROL.search(caught.value.message.replace("\n", "\x00"))
    return caught.value


def a_request(**fields: Any) -> bytes:
    """A good request but for these fields; `sampling` is a mapping."""
    sampling = pb.SamplingParams(**fields.pop("sampling", {}))
    if not {"text", "token_ids", "chat"} & fields.keys():
        fields["text"] = "Once upon a time"
    return pb.GenerateRequest(sampling=sampling, **fields).SerializeToString()


def sampled(**fields: Any) -> bytes:
    return a_request(sampling=fields)


def tokens(ids: Sequence[int]) -> bytes:
    return a_request(token_ids=pb.TokenIds(ids=ids))


def chat(*messages: tuple[str, str]) -> bytes:
    return a_request(chat=pb.Chat(messages=[pb.ChatMessage(role=role, content=text) for role, text in messages]))
