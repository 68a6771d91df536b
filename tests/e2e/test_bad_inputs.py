"""What clients may send that is wrong, and the answer to each: the list in the reliability document, 1 to 28.

After every one of them the workers are the same processes, their pools are whole, and the next request works.
What is well-formed but comes at the wrong time (20, 22 to 25) is in `test_refused_requests.py`.
"""

import contextlib
import itertools
import socket
from random import Random
from typing import Any

import pytest

from kvrelay import Client, rpc
from kvrelay.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unimplemented,
)
from kvrelay.request import FinishReason
from kvrelay.v1 import inference_pb2 as pb
from tests.checkpoints import VOCAB_SIZE
from tests.e2e.bad_inputs_kit import (
    CONTEXT,
    CONTROL,
    FOREVER,
    SERVICE,
    a_request,
    answer,
    chat,
    refusal,
    sampled,
    tokens,
)
from tests.e2e.cluster import Cluster

pytest_plugins = ["tests.e2e.bad_inputs_kit"]
pytestmark = pytest.mark.usefixtures("unharmed")

NAN, INFINITY = float("nan"), float("inf")


# 1 to 13, 21: fields

WRONG_FIELDS: dict[str, tuple[bytes, str, str]] = {
    "1 empty text": (a_request(text=""), "text", "at least one character"),
    "1 no token ids": (tokens([]), "token_ids", "at least one token"),
    "1 empty chat": (chat(), "chat.messages", "from 1 to 4096"),
    "1 nobody speaks": (chat(("user", "hi"), ("", "hello")), "chat.messages[1].role", "must be given"),
    "2 no prompt": (pb.GenerateRequest().SerializeToString(), "prompt", "one of text, token_ids and chat"),
    "2 no bytes": (b"", "prompt", "one of text, token_ids and chat"),
    "2 two prompts": (a_request(text="a") + tokens([5]), "prompt", "text and token_ids are both given"),
    "2 three prompts": (chat(("user", "a")) + tokens([5]) + a_request(text="a"), "prompt", "both given"),
    "3 first id outside": (
        tokens([5, VOCAB_SIZE, 6]),
        "token_ids",
        "512 is outside the vocabulary; ids are from 0 to 511",
    ),
    "3 largest id": (tokens([2**32 - 1]), "token_ids", "4294967295 is outside the vocabulary"),
    "4 as many ids as the context": (tokens([5] * CONTEXT), "token_ids", "8192 tokens; the context has 8192"),
    "4 far more ids": (tokens([5] * 500_000), "token_ids", "500000 tokens; the context has 8192"),
    "4 text": (a_request(text="q " * 6000), "text", "tokens; the context has 8192, so a prompt at most 8191"),
    "4 endless text": (a_request(text="q" * 3_000_000), "text", "the context has room for 8191"),
    "4 endless chat": (chat(("user", "q" * 3_000_000)), "chat", "the context has room for 8191"),
    "6 max_tokens 0": (sampled(max_tokens=0), "sampling.max_tokens", "at least 1"),
    "8 temperature not a number": (sampled(temperature=NAN), "sampling.temperature", "finite number of at least 0"),
    "8 temperature infinite": (sampled(temperature=INFINITY), "sampling.temperature", "inf is not"),
    "8 temperature minus infinite": (sampled(temperature=-INFINITY), "sampling.temperature", "-inf is not"),
    "8 temperature negative": (sampled(temperature=-0.5), "sampling.temperature", "-0.5 is not"),
    "9 top_p 0": (sampled(top_p=0), "sampling.top_p", "0 is not above 0 and at most 1"),
    "9 top_p over 1": (sampled(top_p=1.5), "sampling.top_p", "1.5 is not"),
    "9 top_p negative": (sampled(top_p=-0.5), "sampling.top_p", "-0.5 is not"),
    "9 top_p not a number": (sampled(top_p=NAN), "sampling.top_p", "nan is not"),
    "9 min_p negative": (sampled(min_p=-0.5), "sampling.min_p", "-0.5 is not from 0 to 1"),
    "9 min_p over 1": (sampled(min_p=1.5), "sampling.min_p", "1.5 is not"),
    "9 min_p not a number": (sampled(min_p=NAN), "sampling.min_p", "nan is not"),
    "11 stop id outside": (sampled(stop_token_ids=[1, 512]), "sampling.stop_token_ids[1]", "ids are from 0 to 511"),
    "11 too many stop ids": (sampled(stop_token_ids=[5] * 1025), "sampling.stop_token_ids", "1025 ids; at most 1024"),
    "12 empty stop string": (sampled(stop=["a", ""]), "sampling.stop[1]", "0 bytes; from 1 to 256"),
    "12 too many stop strings": (sampled(stop=["a"] * 17), "sampling.stop", "17 strings; at most 16"),
    "12 long stop string": (sampled(stop=["é" * 129]), "sampling.stop[0]", "258 bytes; from 1 to 256"),
    "13 logprobs over 20": (sampled(logprobs=21), "sampling.logprobs", "21; at most 20"),
    "21 long id": (a_request(request_id="a" * 129), "request_id", "129 characters; at most 128"),
    "21 id with a space": (a_request(request_id="a b"), "request_id", "other than A-Z a-z 0-9 . _ : -"),
    "21 id with a letter too many": (a_request(request_id="ä"), "request_id", "other than A-Z a-z 0-9 . _ : -"),
    "21 id with a path": (a_request(request_id="../x"), "request_id", "other than A-Z a-z 0-9 . _ : -"),
    "21 id with a line": (a_request(request_id="a\n"), "request_id", "other than A-Z a-z 0-9 . _ : -"),
    "long cache salt": (a_request(cache_salt="a" * 257), "cache_salt", "257 bytes; at most 256"),
    "priority": (a_request(priority=-1001), "priority", "-1001 is not from -1000 to 1000"),
    "resume without id": (a_request(resume_after_seq=1), "resume_after_seq", "needs the request_id"),
    "14 text that is not UTF-8": (b"\x1a\x02\xff\xfe", "request", "text that is not UTF-8"),
    "14 no message": (b"\xff\xff\xff\xff", "request", "malformed"),
    "14 cut off": (a_request()[:-3], "request", "malformed"),
}


@pytest.mark.parametrize("case", WRONG_FIELDS)
def test_a_wrong_field_is_named(cluster: Cluster, case: str) -> None:
    message, field, fragment = WRONG_FIELDS[case]
    error = refusal(cluster.target, message)
    assert isinstance(error, InvalidArgument)
    assert [violation.field for violation in error.violations] == [field]
    assert fragment in error.violations[0].description
    assert fragment in error.message
    assert field in error.message


def test_all_that_is_wrong_is_said_at_once_and_briefly(cluster: Cluster) -> None:
    wrong = sampled(max_tokens=0, top_p=2, temperature=-1, stop=["", *["\n" * 999] * 15], stop_token_ids=[10**9] * 999)
    error = refusal(cluster.target, wrong + a_request(text="", request_id="?" * 999))
    assert isinstance(error, InvalidArgument)
    assert all(field in error.message for field in ("request_id", "sampling.max_tokens", "sampling.temperature"))
    assert len(error.message) < 1000


@pytest.mark.parametrize("request_id", ["", "a" * 129, "a b", "\x1b[31m", "*"])
def test_an_abort_needs_an_id(client: Client, request_id: str) -> None:  # 21
    with pytest.raises(InvalidArgument) as caught:
        client.abort(request_id)
    assert [violation.field for violation in caught.value.violations] == ["request_id"]


@pytest.mark.parametrize("max_tokens", [7, 100, 2**32 - 1])
def test_max_tokens_is_clamped_to_the_context(client: Client, max_tokens: int) -> None:  # 5, 7
    prompt = [5] * (CONTEXT - 6)
    result = client.complete(token_ids=prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True)
    assert (result.finish_reason, result.usage.completion_tokens) == (FinishReason.LENGTH, 6)
    assert result.usage.prompt_tokens == CONTEXT - 6


def test_the_longest_id_is_accepted(client: Client) -> None:  # 21
    request_id = ("aZ09._:-" * 16)[:128]
    assert client.complete("a", request_id=request_id, max_tokens=1).request_id == request_id


def test_unset_differs_from_zero(client: Client) -> None:  # 10
    def run(**sampling: Any) -> tuple[int, ...]:
        return client.complete("Once upon a time", max_tokens=12, ignore_eos=True, **sampling).token_ids

    greedy = run(temperature=0, seed=1)
    assert greedy == run(temperature=0, seed=2) == run(temperature=0, top_k=0, min_p=0, priority=0)
    assert run(seed=0) == run(seed=0) == run(seed=0, top_k=0, min_p=0) != greedy
    assert run() != run()
    result = client.complete("Once upon a time", max_tokens=2, temperature=0, logprobs=0)
    assert [(entry.token_id, entry.top) for entry in result.logprobs] == [(token, ()) for token in result.token_ids]
    assert client.complete("Once upon a time", max_tokens=2, temperature=0).logprobs == ()


# 14 to 17: messages, methods, models


@pytest.mark.parametrize("method", ["Abort", "ListModels", "GetClusterStatus", "ListHeldBlocks"])
def test_malformed_messages_of_the_other_methods(cluster: Cluster, method: str) -> None:  # 14
    error = refusal(cluster.target, b"\xff\xff\xff\xff", method)
    assert isinstance(error, InvalidArgument)
    assert [violation.field for violation in error.violations] == ["request"]


def test_random_bytes_stop_nothing(cluster: Cluster) -> None:  # 14
    random = Random(1)
    good = a_request(sampling={"max_tokens": 1, "stop": ["x"], "seed": 1}, request_id="fuzz", model="m")
    with rpc.open_sync_channel(cluster.target) as channel:
        call = channel.unary_stream(SERVICE + "Generate", None, None)
        for _ in range(200):
            message = bytearray(good)
            for _ in range(random.randrange(1, 6)):
                message[random.randrange(len(message))] = random.randrange(256)
            with contextlib.suppress(InvalidArgument, NotFound, AlreadyExists, FailedPrecondition), rpc.translated():
                list(call(bytes(message), timeout=30))


@pytest.mark.parametrize(("mebibytes", "limit"), [(5, 4 << 20), (17, 16 << 20)])
def test_a_message_that_is_too_large(cluster: Cluster, mebibytes: int, limit: int) -> None:  # 15
    error = refusal(cluster.target, a_request(text="q" * (mebibytes << 20)))
    assert isinstance(error, ResourceExhausted)
    assert str(limit) in error.message


@pytest.mark.parametrize("method", [SERVICE + "Regenerate", "/kvrelay.v1.Nothing/Generate", "/Generate"])
def test_an_unknown_method(cluster: Cluster, method: str) -> None:  # 16
    with rpc.open_sync_channel(cluster.target) as channel, pytest.raises(Unimplemented), rpc.translated():
        channel.unary_unary(method, None, None)(b"", timeout=30)


@pytest.mark.parametrize("model", ["gpt-5", "tiny-llama/", "\x1b[31m\nforged line", "m" * 5000])
def test_an_unknown_model(cluster: Cluster, model: str) -> None:  # 17, 27
    error = refusal(cluster.target, a_request(model=model))
    assert isinstance(error, NotFound)
    assert "'tiny-llama'" in error.message
    assert len(error.message) < 200


# 26 to 28: around the request


@pytest.mark.parametrize(
    "traceparent",
    ["", "garbage", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "ff-" + "a" * 32 + "-" + "b" * 16 + "-01", "0" * 3000],
)
def test_a_bad_traceparent_is_ignored(client: Client, traceparent: str) -> None:  # 26
    headers = {"traceparent": traceparent, "tracestate": "=,=,"}
    assert client.complete("Once", max_tokens=2, ignore_eos=True, metadata=headers).usage.completion_tokens == 2


def test_control_bytes_do_not_reach_the_logs(cluster: Cluster, client: Client) -> None:  # 27
    forged = "\x00\x1b[2J\x07\r\nforged line \u2028\x9b31m"
    client.complete(forged, max_tokens=1)
    client.complete(messages=[{"role": forged, "content": forged}], max_tokens=1)
    client.complete("Once", cache_salt=forged, stop=[forged], max_tokens=1)
    for message in (a_request(request_id=forged), a_request(model=forged), pb.AbortRequest(request_id=forged)):
        data = message if isinstance(message, bytes) else message.SerializeToString()
        error = refusal(cluster.target, data, "Generate" if isinstance(message, bytes) else "Abort")
        assert "\n" not in error.message
    for path in (cluster.run_dir / "logs").glob("*.log"):
        text = path.read_bytes().decode()
        assert not CONTROL.search(text)
        assert not any(line.startswith("forged line") for line in text.splitlines())


GARBAGE: tuple[bytes, ...] = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + Random(2).randbytes(4096),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00" + b"\xff" * 9,
    Random(3).randbytes(1 << 16),
    bytes(1 << 16),
)


def test_idle_sockets_and_garbage(cluster: Cluster, client: Client) -> None:  # 28
    targets = [cluster.target, *(worker.address for worker in cluster.status().workers)]
    with contextlib.ExitStack() as sockets:

        def connect(target: str) -> socket.socket:
            host, port = target.rsplit(":", 1)
            return sockets.enter_context(socket.create_connection((host, int(port)), timeout=10))

        with client.generate("beside it", **FOREVER) as stream:
            next(stream)
            for _ in range(500):
                connect(cluster.target)
            for target, garbage in itertools.product(targets, GARBAGE):
                with contextlib.suppress(ConnectionError):
                    connect(target).sendall(garbage)
            with cluster.client() as newcomer:
                assert answer(newcomer) == answer(client)
            assert next(stream).seq == 2
