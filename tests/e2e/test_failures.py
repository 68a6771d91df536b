"""What dies or falls silent in a running cluster, and what becomes of the requests: they go on elsewhere, with the
tokens that they would have had. After each case the cluster is ready again by itself and every pool is whole."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from benchmarks.processes import resident_bytes
from kvrelay import Client
from kvrelay.client import GenerateOptions
from kvrelay.errors import Unavailable
from kvrelay.request import WorkerState
from tests.e2e.cluster import START_SECONDS, Cluster, start_cluster
from tests.e2e.processes import is_alive, private_redis, silent
from tests.e2e.readings import (
    GREEDY,
    LATE_LENGTH,
    LENGTH,
    PROMPT,
    Reading,
    a_long_prompt,
    check_agree,
    check_complete,
    late_requests,
    num_unfinished,
    on_worker,
    running,
)
from tests.patience import eventually

NOTICE_SECONDS = 2.0  # after which a client has its error
BLOCK_SIZE, NUM_BLOCKS = 16, 600


@pytest.fixture(scope="module")
def pair_cluster(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two workers of each role; steps are so small that long prompts take a while."""
    run_dir = tmp_path_factory.mktemp("failures") / "run"
    settings: dict[str, Any] = {"block_size": BLOCK_SIZE, "num_blocks": NUM_BLOCKS, "max_batched_tokens": 4}
    with start_cluster(run_dir, tiny_llama, prefill=2, decode=2, **settings) as cluster:
        yield cluster


@pytest.fixture
def cluster(pair_cluster: Cluster) -> Iterator[Cluster]:
    yield pair_cluster
    pair_cluster.wait_ready()
    pair_cluster.wait_whole()


def epochs(cluster: Cluster) -> dict[str, int]:
    return {worker.id: worker.epoch for worker in cluster.status().workers}


def processes(cluster: Cluster) -> dict[str, int]:
    return {worker.id: worker.pid for worker in cluster.status().workers}


def check_restarted(cluster: Cluster, worker_id: str, before: dict[str, int]) -> None:
    """The worker is back under a higher epoch, and it gets requests again."""
    cluster.wait_ready()
    eventually(lambda: epochs(cluster)[worker_id] > before[worker_id], START_SECONDS, f"{worker_id} has a new epoch")
    cluster.wait_ready()
    with cluster.client() as client:
        readings: list[Reading] = []

        def serves() -> bool:
            # The worker may be ready a moment before the gateway is connected to it.
            if all(reading.ended for reading in readings):
                readings.extend(a_long_prompt(client) for _ in range(4))
            return bool(on_worker(client, worker_id))

        eventually(serves, 30, f"{worker_id} serves")
        for reading in readings:
            reading.cancel()


def gateway_process(cluster: Cluster) -> int:
    return next(gateway.pid for gateway in cluster.status().gateways if is_alive(gateway.pid))


def works(client: Client) -> bool:
    try:
        return len(client.complete(**GREEDY, max_tokens=3, timeout=30).token_ids) == 3
    except Unavailable:
        return False


def test_a_killed_decode_worker(cluster: Cluster, client: Client) -> None:
    before, pid = epochs(cluster), cluster.pid("decode-0")
    with running(client, 6) as readings:
        there = on_worker(client, "decode-0")
        with silent(pid):
            late = late_requests(client)
            os.kill(pid, signal.SIGKILL)
        assert all(works(client) for _ in range(4))
        check_complete([*readings, *late])
        assert there
    check_restarted(cluster, "decode-0", before)


def test_a_killed_prefill_worker(cluster: Cluster, client: Client) -> None:
    """One prompt is being computed there, the others wait for their turn or for blocks."""
    before, pid = epochs(cluster), cluster.pid("prefill-1")
    with running(client, 2) as streams:
        readings = [a_long_prompt(client) for _ in range(8)]
        eventually(lambda: on_worker(client, "prefill-1"), 30, "a prompt is being computed")
        with silent(pid):
            readings += [a_long_prompt(client) for _ in range(4)]
            eventually(lambda: client.status().queue.running >= num_unfinished(readings), 30, "all prompts are sent")
            os.kill(pid, signal.SIGKILL)
        assert all(works(client) for _ in range(4))
        for reading in readings:
            reading.wait()
            assert reading.error is None
            assert len(reading.token_ids) == reading.max_tokens
        check_complete(streams)
    check_restarted(cluster, "prefill-1", before)


def test_a_frozen_decode_worker(cluster: Cluster, client: Client) -> None:
    """It is taken for lost, its streams go on elsewhere, and when it thaws it begins a new epoch."""
    before, pid = epochs(cluster), cluster.pid("decode-1")
    with running(client, 4) as readings:
        os.kill(pid, signal.SIGSTOP)
        try:
            check_complete(readings)
        finally:
            os.kill(pid, signal.SIGCONT)
    check_restarted(cluster, "decode-1", before)
    assert cluster.pid("decode-1") == pid


def test_a_frozen_prefill_worker(cluster: Cluster, client: Client) -> None:
    before, pid = epochs(cluster), cluster.pid("prefill-0")
    readings = [a_long_prompt(client) for _ in range(4)]
    eventually(lambda: on_worker(client, "prefill-0"), 30, "a prompt is being computed")
    os.kill(pid, signal.SIGSTOP)
    try:
        for reading in readings:
            reading.wait()
            assert reading.error is None
            assert len(reading.token_ids) == reading.max_tokens
    finally:
        os.kill(pid, signal.SIGCONT)
    check_restarted(cluster, "prefill-0", before)


def test_seeded_sampling_with_log_probabilities_and_a_stop_string_survives_a_kill(
    cluster: Cluster, client: Client
) -> None:
    options: GenerateOptions = {
        "token_ids": PROMPT,
        "temperature": 0.9,
        "seed": 5,
        "logprobs": 2,
        "max_tokens": LENGTH,
        "ignore_eos": True,
    }
    expected = client.complete(**options)
    readings = [Reading(client, **options) for _ in range(4)]
    eventually(lambda: all(len(reading.token_ids) > 20 for reading in readings), 30, "all requests run")
    before = epochs(cluster)
    cluster.kill("decode-1")
    check_complete(readings)
    assert readings[0].token_ids == list(expected.token_ids)
    for reading in readings:
        entries = [entry for chunk in reading.chunks for entry in chunk.logprobs]
        assert [entry.token_id for entry in entries] == reading.token_ids
        assert "".join(chunk.text for chunk in reading.chunks) == expected.text
    check_restarted(cluster, "decode-1", before)


def test_killed_redis(cluster: Cluster, client: Client) -> None:
    before = processes(cluster)
    with running(client, 4) as readings:
        pid = private_redis(cluster.run_dir)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: works(client), 10, "new requests work")
        check_complete(readings)
    assert private_redis(cluster.run_dir) not in (None, pid)
    cluster.wait_ready()
    assert processes(cluster) == before


def test_wiped_redis(cluster: Cluster, client: Client) -> None:
    before = processes(cluster)
    with running(client, 4) as readings, Redis(unix_socket_path=f"{cluster.run_dir}/redis/redis.sock") as redis:
        redis.flushall()
        assert works(client)
        redis.flushall()
        assert works(client)
        check_complete(readings)
    cluster.wait_ready()
    assert processes(cluster) == before


def test_frozen_redis(cluster: Cluster, client: Client) -> None:
    """Also a worker that has to start meanwhile does not end the cluster: it tries again."""
    before = epochs(cluster)
    log = cluster.run_dir.parent / f"{cluster.run_dir.name}.up.log"
    pid = private_redis(cluster.run_dir)
    assert pid is not None
    with running(client, 4) as readings:
        worker = cluster.pid("prefill-0")
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(Unavailable, match="queue") as caught:
                client.complete(**GREEDY, max_tokens=3, timeout=10)
            assert caught.value.reason == "REDIS_UNAVAILABLE"
            os.kill(worker, signal.SIGKILL)
            check_complete(readings)
            eventually(lambda: "prefill-0 ended (exit code 2)" in log.read_text(), START_SECONDS, "a start fails")
        finally:
            os.kill(pid, signal.SIGCONT)
    eventually(lambda: works(client), 10, "new requests work")
    check_restarted(cluster, "prefill-0", before)


def test_a_killed_gateway(cluster: Cluster, client: Client) -> None:
    before, pid = processes(cluster), gateway_process(cluster)
    decode = [cluster.pid(worker_id) for worker_id in ("decode-0", "decode-1")]
    with running(client, 4) as readings:
        with silent(*decode):
            late = late_requests(client)
            killed_at = time.monotonic()
            os.kill(pid, signal.SIGKILL)
            for reading in late:
                reading.wait()
        victims = [reading for reading in (*readings, *late) if reading.error]
        assert set(late) <= set(victims)
        for reading in victims:
            assert isinstance(reading.error, Unavailable)
            assert reading.ended_at - killed_at < NOTICE_SECONDS
    cluster.wait_ready()
    cluster.wait_whole()
    assert gateway_process(cluster) != pid
    assert processes(cluster) == before
    again = Reading(client, **GREEDY, max_tokens=LATE_LENGTH, request_id=late[0].request_id)
    check_complete([again])
    check_agree([again, *victims])


def test_clients_that_do_not_read(cluster: Cluster, client: Client) -> None:
    """They cost their own responses' memory, and nobody else's time."""
    gateway = gateway_process(cluster)
    num_tokens, num_readers = 1000, 12

    memory = resident_bytes(gateway)
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(cluster.client()) for _ in range(num_readers)]
        streams = [other.generate(**GREEDY, max_tokens=num_tokens, logprobs=20) for other in idle]
        first = [next(stream) for stream in streams]
        # Nobody reads, and yet all of them are computed to the end.
        eventually(lambda: cluster.status().queue.running == 0, 60, "the workers are done")
        client.complete(**GREEDY, max_tokens=20, timeout=10)
        assert resident_bytes(gateway) - memory < 128 << 20
        assert all(worker.state is WorkerState.READY for worker in cluster.status().workers)
        # What was not read is still there.
        assert sum(len(chunk.token_ids) for chunk in (first[0], *streams[0])) == num_tokens
        for stream in streams:
            stream.close()
