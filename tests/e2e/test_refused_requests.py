"""Requests that are well-formed and refused all the same: 20 and 22 to 25 of the list in the reliability document.

Their ids are taken, the responses are gone, or there is no time, no room or no more work. After every one of them the
workers are the same processes, their pools are whole, and the next request works.
"""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvrelay import Client, rpc
from kvrelay.client import Stream
from kvrelay.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    OutOfRange,
    ResourceExhausted,
    Unavailable,
)
from kvrelay.request import Chunk
from tests.e2e.bad_inputs_kit import FOREVER, a_request, refusal
from tests.e2e.cluster import Cluster
from tests.patience import eventually
from tests.ports import free_port

pytest_plugins = ["tests.e2e.bad_inputs_kit"]
pytestmark = pytest.mark.usefixtures("unharmed")

MAX_RUNNING, MAX_WAITING, REPLAY_REQUESTS = 8, 8, 8  # of the shared cluster


# 20, 23: identity and replay


def test_an_id_is_not_used_for_another_body(client: Client) -> None:  # 20
    with client.generate("Once", **FOREVER) as stream:
        next(stream)
        with pytest.raises(AlreadyExists, match=stream.request_id):
            client.complete("Twice", request_id=stream.request_id, max_tokens=1)
        assert next(stream).seq == 2  # undisturbed
    client.complete("Once", request_id="done", max_tokens=1)
    for salt, seed in (("x", None), ("", 1)):
        with pytest.raises(AlreadyExists):
            client.complete("Once", request_id="done", max_tokens=1, cache_salt=salt, seed=seed)
    forget(client)
    with pytest.raises(AlreadyExists):
        client.complete("Once", request_id="done", max_tokens=2)


def forget(client: Client) -> None:
    """Makes the gateway drop the responses of all requests before."""
    for _ in range(REPLAY_REQUESTS):
        client.complete("a", max_tokens=1)


def test_resuming_past_the_end(client: Client) -> None:  # 23
    def run(resume_after_seq: int | None) -> list[Chunk]:
        return list(client.generate("Once", max_tokens=3, request_id="past", resume_after_seq=resume_after_seq))

    last = run(None)[-1].seq
    assert run(last) == []
    for seq in (last + 1, 2**64 - 1):
        with pytest.raises(OutOfRange, match=f"resume_after_seq: {seq}.* {last}$"):
            run(seq)


@pytest.mark.parametrize("resume_after_seq", [None, 0, 1])
def test_resuming_what_is_not_held_any_more(client: Client, resume_after_seq: int | None) -> None:  # 23
    request_id = f"evicted-{resume_after_seq}"
    client.complete("Once", request_id=request_id, max_tokens=3)
    forget(client)
    with pytest.raises(FailedPrecondition) as caught:
        client.complete("Once", request_id=request_id, max_tokens=3, resume_after_seq=resume_after_seq)
    assert caught.value.reason == "RESPONSES_NOT_HELD"


def test_resuming_what_never_was(client: Client) -> None:  # 23
    with pytest.raises(FailedPrecondition):
        client.complete("Once", request_id="never-was", max_tokens=3, resume_after_seq=1)


# 22, 24, 25: no time, no room, no more work


class Gateway:
    """Another gateway process of the cluster."""

    def __init__(self, target: str, process: "subprocess.Popen[bytes]") -> None:
        self.target = target
        self.process = process

    def is_serving(self) -> bool:
        assert self.process.poll() is None
        with rpc.open_sync_channel(self.target) as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@contextlib.contextmanager
def another_gateway(cluster: Cluster, name: str, *flags: str) -> Iterator[Gateway]:
    port = free_port()
    settings = ["--config", str(cluster.run_dir / "settings.toml"), "--port", str(port), "--worker-id", name]
    with (cluster.run_dir / "logs" / f"{name}.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "kvrelay", "gateway", *settings, *flags], stderr=log)
    try:
        gateway = Gateway(f"127.0.0.1:{port}", process)
        eventually(gateway.is_serving, 60, f"{name} serving")
        yield gateway
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@contextlib.contextmanager
def all_places_taken(client: Client) -> Iterator[list[Stream]]:
    """As many requests run as may."""
    with contextlib.ExitStack() as streams:
        running = [streams.enter_context(client.generate(f"first {i}", **FOREVER)) for i in range(MAX_RUNNING)]
        for stream in running:
            next(stream)
        yield running


def wait_until_waiting(cluster: Cluster, count: int) -> None:
    eventually(lambda: cluster.status().queue.waiting == count, 10, f"{count} requests wait")


def test_a_full_queue(cluster: Cluster, client: Client) -> None:  # 24
    with ThreadPoolExecutor(MAX_WAITING) as threads, all_places_taken(client) as running:
        waiting = [threads.submit(client.complete, "second", max_tokens=2, ignore_eos=True) for _ in range(MAX_WAITING)]
        wait_until_waiting(cluster, MAX_WAITING)
        error = refusal(cluster.target, a_request())
        assert isinstance(error, ResourceExhausted)
        assert error.reason == "QUEUE_FULL"
        assert error.retry_after is not None
        assert 0 < error.retry_after <= 60
        assert next(running[0]).seq == 2
        running.pop().close()
        assert [future.result(30).usage.completion_tokens for future in waiting] == [2] * MAX_WAITING


def test_a_deadline_that_passes_in_the_queue_starts_nothing(cluster: Cluster, client: Client) -> None:  # 22
    prompt = [7 + number % 400 for number in range(64)]  # four blocks; a worker that has computed them has them cached
    with all_places_taken(client):
        with pytest.raises(DeadlineExceeded):
            client.complete(token_ids=prompt, max_tokens=1, timeout=0.3)
        wait_until_waiting(cluster, 0)
    assert client.complete(token_ids=prompt, max_tokens=1).usage.cached_tokens == 0
    assert client.complete(token_ids=prompt, max_tokens=1).usage.cached_tokens > 0


def test_a_deadline_that_has_passed_starts_nothing(client: Client) -> None:  # 22
    for index, timeout in enumerate([0, 1e-9, 1e-6, 1e-4]):
        prompt = list(range(100 * index + 50, 100 * index + 114))
        with pytest.raises(DeadlineExceeded):
            client.complete(token_ids=prompt, max_tokens=1, timeout=timeout)
        assert client.complete(token_ids=prompt, max_tokens=1).usage.cached_tokens == 0


def test_a_draining_gateway(cluster: Cluster) -> None:  # 25
    with another_gateway(cluster, "draining") as gateway, Client(gateway.target, timeout=60) as client:
        with client.generate("first", **FOREVER) as running:
            seq = next(running).seq
            gateway.process.send_signal(signal.SIGTERM)
            eventually(lambda: not gateway.is_serving(), 10, "draining")
            with pytest.raises(Unavailable) as caught:
                client.complete("second", max_tokens=1)
            assert caught.value.reason == "DRAINING"
            assert client.status().workers
            assert next(running).seq == seq + 1  # what runs goes on
        assert gateway.process.wait(30) == 0
