"""`kvrelay up --shared-pool`: handovers by id, and a pool that is whole again whoever died in it."""

import contextlib
import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvrelay import Client
from kvrelay.client import Stream
from kvrelay.failpoints import VARIABLE
from tests.e2e.cluster import START_SECONDS, Cluster, start_cluster
from tests.e2e.processes import is_alive, kvrelay
from tests.patience import SOON, eventually

NUM_BLOCKS = 512
LENGTH = 3000  # of a completion that runs for seconds
LONG_PROMPT = [3 + number * 7 % 500 for number in range(4000)]
seeds = itertools.count(100)


@pytest.fixture(scope="module")
def shared(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One prefill and two decode workers; steps are so small that long prompts take a while."""
    run_dir = tmp_path_factory.mktemp("shared-pool") / "run"
    settings: dict[str, Any] = {"num_blocks": NUM_BLOCKS, "max_batched_tokens": 32, "shared_pool": True}
    environment = {VARIABLE: f"@{failpoints_of(run_dir)}"}
    with start_cluster(run_dir, tiny_llama, prefill=1, decode=2, environment=environment, **settings) as cluster:
        yield cluster


def failpoints_of(run_dir: Path) -> Path:
    return run_dir.parent / "failpoints"


@contextlib.contextmanager
def late_pulls(cluster: Cluster) -> Iterator[None]:
    """Inside, blocks are lent for seconds, however long it takes to look."""
    failpoints = failpoints_of(cluster.run_dir)
    failpoints.write_text("transfer.before_pull=delay:5")
    try:
        yield
    finally:
        failpoints.unlink()


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    yield shared
    shared.wait_ready()
    shared.wait_whole()


def a_prompt() -> list[int]:
    """One that no cache has."""
    seed = next(seeds)
    return [3 + (seed * 31 + number * number) % 500 for number in range(40)]


def generate(client: Client, prompt: list[int], max_tokens: int = LENGTH) -> Stream:
    return client.generate(token_ids=prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True)


def tokens_of(stream: Stream) -> list[int]:
    return [token_id for chunk in stream for token_id in chunk.token_ids]


def where_it_runs(client: Client) -> str:
    """The decode worker that holds the only request's blocks."""
    found: list[str] = []

    def look() -> bool:
        found[:] = {entry.worker_id for entry in client.held_blocks() if entry.state == "running"}
        return len(found) == 1 and found[0].startswith("decode")

    eventually(look, 30, "a request that runs on a decode worker")
    return found[0]


@contextlib.contextmanager
def a_request_that_goes_on(client: Client) -> Iterator[str]:
    """It runs on this decode worker; whatever is done inside, it has the tokens that it would have had."""
    prompt = a_prompt()
    expected = list(client.complete(token_ids=prompt, max_tokens=LENGTH, temperature=0, ignore_eos=True).token_ids)
    with generate(client, prompt) as stream:
        first = next(stream)
        yield where_it_runs(client)
        assert list(first.token_ids) + tokens_of(stream) == expected


def test_people_are_told_how_blocks_come(cluster: Cluster, client: Client) -> None:
    client.complete("Once upon a time", max_tokens=4)
    links = [link for worker in client.status().workers for link in worker.links]
    assert {link.transport for link in links} == {"pool"}
    assert {link.fallback for link in links} == {""}
    for command in ("status", "doctor"):
        assert "prefill-0 by pool" in kvrelay(command, "--target", cluster.target).stdout


def test_a_pool_is_counted_once_and_what_each_holds_for_itself(cluster: Cluster, client: Client) -> None:
    with generate(client, a_prompt()) as stream:
        next(stream)
        home = where_it_runs(client)
        workers = {worker.id: worker for worker in client.status().workers}
        assert {worker.blocks_total for worker in workers.values()} == {NUM_BLOCKS}
        assert workers[home].blocks_held >= 3
        assert {worker.blocks_held for name, worker in workers.items() if name != home} == {0}
        assert max(worker.blocks_free for worker in workers.values()) <= NUM_BLOCKS - 3


def test_a_decode_worker_finds_the_prefix_that_a_prefill_worker_computed(cluster: Cluster, client: Client) -> None:
    prompt = a_prompt()
    first = client.complete(token_ids=prompt, max_tokens=2, temperature=0)
    second = client.complete(token_ids=[*prompt, *first.token_ids, 5], max_tokens=2, temperature=0)
    assert first.usage.cached_tokens == 0
    assert second.usage.cached_tokens == 32


@pytest.mark.parametrize("victim", ["prefill-0", "the decode worker"])
def test_a_worker_is_killed_while_a_request_runs(cluster: Cluster, client: Client, victim: str) -> None:
    with a_request_that_goes_on(client) as home:
        pid = cluster.kill(home if victim == "the decode worker" else victim)
    assert not is_alive(pid)


def test_the_prefill_worker_is_killed_while_it_fills_blocks_that_are_lent(cluster: Cluster, client: Client) -> None:
    expected = list(client.complete(token_ids=LONG_PROMPT, max_tokens=8, temperature=0, cache_salt="a").token_ids)
    cluster.wait_whole()
    holders: list[set[int]] = []

    def is_lent() -> bool:
        holders[:] = [set(entry.block_ids) for entry in client.held_blocks()]
        return len(holders) == 2

    with late_pulls(cluster):
        stream = client.generate(token_ids=LONG_PROMPT, max_tokens=8, temperature=0, cache_salt="b")
        eventually(is_lent, SOON, "a decode worker holds blocks, too")
        assert holders[0] == holders[1]
        cluster.kill("prefill-0")
    assert tokens_of(stream) == expected


def test_a_killed_worker_that_stays_away_leaves_nothing_held(cluster: Cluster, client: Client) -> None:
    """Its supervisor takes a while to start it again; the others have its blocks before."""
    with generate(client, a_prompt()) as stream:
        next(stream)
        home = where_it_runs(client)
        other = next(worker.id for worker in client.status().workers if worker.id not in (home, "prefill-0"))
        cluster.kill(home)

    def is_free() -> bool:
        workers = {worker.id: worker for worker in client.status().workers}
        return workers[other].blocks_free == NUM_BLOCKS

    eventually(is_free, 10, "all blocks are free")


def test_a_stopped_worker_writes_to_nobody_else(cluster: Cluster, client: Client) -> None:
    """Its blocks stay its own while it stands still, whatever the others do meanwhile, and until it has begun anew."""
    with a_request_that_goes_on(client) as home:
        pid = cluster.kill(home, signal.SIGSTOP)
        try:
            for _ in range(8):
                client.complete(token_ids=a_prompt(), max_tokens=40, temperature=0, ignore_eos=True)
            eventually(lambda: home not in {worker.id for worker in client.status().workers}, 30, "it is given up")
        finally:
            os.kill(pid, signal.SIGCONT)


def test_a_drained_decode_worker_hands_its_sequences_over_by_id(cluster: Cluster, client: Client) -> None:
    with a_request_that_goes_on(client) as home:
        pid = cluster.kill(home, signal.SIGTERM)
        eventually(lambda: not is_alive(pid), START_SECONDS, "the worker has left")
    [other] = {"decode-0", "decode-1"} - {home}
    assert f"{home} by pool" in (cluster.run_dir / "logs" / f"{other}.log").read_text()


def test_cancelled_requests_leave_the_pool_whole(cluster: Cluster, client: Client) -> None:
    for number in range(12):
        stream = generate(client, a_prompt())
        if number % 3:
            next(stream)
        stream.close()
    cluster.wait_whole()
