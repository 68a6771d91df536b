"""Prompts computed by prefill workers, by decode workers, or by whichever costs less: the tokens are the same."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvrelay import Client
from kvrelay.request import FinishReason, Timings, Usage
from tests.checkpoints import VOCAB_SIZE, greedy_oracle, make_checkpoint
from tests.e2e.cluster import Cluster, start_cluster
from tests.e2e.receiver import ALL_SPANS, DECODE_SPANS, GATEWAY_SPANS, PREFILL_SPANS, Receiver
from tests.e2e.test_equality import complete_all, mixed_prompts
from tests.patience import eventually

pytest_plugins = ["tests.e2e.receiver"]

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
FOREVER: dict[str, Any] = {**GREEDY, "max_tokens": 8192}
LOCAL_SPANS = ALL_SPANS - {"kvrelay.transfer", "kvrelay.decode_queue"}
NUM_STREAMS = 4


def prompt_of(length: int, first: int = 1) -> list[int]:
    """Unlike the prompt of another `first`. Of the default ones no completion here has an end of sequence in it."""
    return [3 + (first * 31 + 7 * index + index // 50) % (VOCAB_SIZE - 3) for index in range(length)]


@pytest.mark.parametrize("disaggregation", ["never", "auto"])
def test_tokens_are_those_of_transformers_wherever_prompts_are_computed(tmp_path: Path, disaggregation: str) -> None:
    model = make_checkpoint(tmp_path / "llama")
    prompts = mixed_prompts(seed=2)
    settings: dict[str, Any] = {
        "disaggregation": disaggregation,
        "block_size": 8,
        "num_blocks": 20,
        "max_batched_tokens": 27,
    }
    with start_cluster(tmp_path / "run", model, itl_limit=0.001, **settings) as cluster:
        first = complete_all(cluster.target, prompts)
        cluster.wait_whole()
        again = complete_all(cluster.target, prompts)
        cluster.wait_whole()
        roles = {worker.role.value for worker in cluster.status().workers}
    for (token_ids, count), *results in zip(prompts, first, again, strict=True):
        for result in results:
            assert list(result.token_ids) == greedy_oracle(model, token_ids, count)
            assert result.usage.prompt_tokens == len(token_ids)
    assert roles == ({"decode"} if disaggregation == "never" else {"prefill", "decode"})
    assert sum(result.usage.cached_tokens for result in again) > 0


@pytest.fixture(scope="module")
def colocated(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    run_dir = tmp_path_factory.mktemp("colocated") / "run"
    with start_cluster(run_dir, tiny_llama, num_blocks=1024, disaggregation="never") as cluster:
        yield cluster


def test_without_prefill_workers_everything_is_as_with_them(colocated: Cluster, tiny_llama: Path) -> None:
    with colocated.client() as client:
        assert [model.id for model in client.list_models()] == ["tiny-llama"]
        result = client.complete(token_ids=prompt_of(100), max_tokens=10, **GREEDY)
        assert list(result.token_ids) == greedy_oracle(tiny_llama, prompt_of(100), 10)
        timings = result.timings
        assert timings.prefill > 0
        assert timings.first_decode_step > 0
        assert (timings.transfer, timings.decode_queue) == (0, 0)
        assert 0 < timings.time_to_first_token <= timings.total
        assert client.complete(token_ids=prompt_of(100), max_tokens=1, **GREEDY).usage.completion_tokens == 1
    colocated.wait_whole()


def test_a_local_prompt_ends_like_any_other(colocated: Cluster) -> None:
    """By its first token, a stop string, an abort, or a reader that leaves."""
    with colocated.client() as client:
        whole = client.complete(token_ids=prompt_of(50), max_tokens=30, **GREEDY)
        first = whole.token_ids[0]
        stopped = client.complete(token_ids=prompt_of(50), max_tokens=30, stop_token_ids=[first], temperature=0)
        assert (stopped.finish_reason, stopped.token_ids) == (FinishReason.STOP, (first,))
        middle = whole.text[3:6]
        cut = client.complete(token_ids=prompt_of(50), max_tokens=30, stop=[middle], **GREEDY)
        assert (cut.finish_reason, cut.text) == (FinishReason.STOP, whole.text[: whole.text.index(middle)])
        check_accounted(cut.usage, cut.timings)
        for chunk in client.generate(token_ids=prompt_of(50), request_id="aborted", **FOREVER):
            if chunk.seq == 1:
                client.abort("aborted")
        assert chunk.finish_reason is FinishReason.ABORT
        check_accounted(chunk.usage, chunk.timings)
        next(iter(client.generate(token_ids=prompt_of(50), **FOREVER)))
    colocated.wait_whole()


def check_accounted(usage: Usage | None, timings: Timings | None) -> None:
    """The prompt, most of which was cached, is in both, although the Decode call was cancelled."""
    assert usage is not None
    assert timings is not None
    assert usage.cached_tokens > 0
    assert timings.prefill > 0
    assert 0 < timings.time_to_first_token <= timings.total


def test_short_prompts_stay_and_long_ones_beside_running_streams_move(
    tmp_path: Path, tiny_llama: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in receiver.environment.items():
        monkeypatch.setenv(name, value)
    with start_cluster(tmp_path / "run", tiny_llama, num_blocks=4096, disaggregation="auto") as cluster:
        with cluster.client() as client, ThreadPoolExecutor(NUM_STREAMS) as threads:
            short = client.complete(token_ids=prompt_of(8), max_tokens=5, **GREEDY)
            eventually(lambda: knows_its_prefill_worker(cluster), 10, "the workers are paired")
            running = [threads.submit(stream, client, index) for index in range(NUM_STREAMS)]
            eventually(lambda: cluster.status().queue.running == NUM_STREAMS, 10, "streams run")
            long = client.complete(token_ids=prompt_of(2000), max_tokens=5, **GREEDY)
            for index, future in enumerate(running):
                client.abort(f"stream-{index}")
                assert future.result() is FinishReason.ABORT
        cluster.wait_whole()
        local, moved = receiver.trace_of(short.request_id, LOCAL_SPANS), receiver.trace_of(long.request_id)
    assert local.keys() == LOCAL_SPANS
    assert {local[name].service for name in LOCAL_SPANS - GATEWAY_SPANS} == {"kvrelay-decode"}
    assert {moved[name].service for name in PREFILL_SPANS} == {"kvrelay-prefill"}
    assert {moved[name].service for name in DECODE_SPANS} == {"kvrelay-decode"}
    for result, length in ((short, 8), (long, 2000)):
        assert list(result.token_ids) == greedy_oracle(tiny_llama, prompt_of(length), 5)


def stream(client: Client, index: int) -> FinishReason | None:
    *_, last = client.generate(token_ids=prompt_of(4, index + 2), request_id=f"stream-{index}", **FOREVER)
    return last.finish_reason


def knows_its_prefill_worker(cluster: Cluster) -> bool:
    return any(worker.links for worker in cluster.status().workers)


def test_decode_workers_keep_an_automatic_service_alive(tmp_path: Path, tiny_llama: Path) -> None:
    with start_cluster(tmp_path / "run", tiny_llama, num_blocks=1024, disaggregation="auto") as cluster:
        pid = cluster.kill("prefill-0", signal.SIGSTOP)
        try:
            eventually(lambda: len(cluster.status().workers) == 1, 20, "the prefill worker counts as gone")
            with cluster.client() as client:
                assert client.list_models()
                result = client.complete(token_ids=prompt_of(1000), max_tokens=5, **GREEDY)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert list(result.token_ids) == greedy_oracle(tiny_llama, prompt_of(1000), 5)


def test_scarce_decode_blocks_are_not_reserved_while_a_long_prompt_is_computed(
    tmp_path: Path, tiny_llama: Path
) -> None:
    """The prefill worker is frozen in the middle of the prompt, so that there is time to look."""
    prompt = prompt_of(3000)  # more than half of the decode worker's blocks
    settings: dict[str, Any] = {"num_blocks": 256, "context_length": 4096, "max_batched_tokens": 8}
    with start_cluster(tmp_path / "run", tiny_llama, **settings) as cluster:
        with cluster.client() as client, ThreadPoolExecutor(1) as threads:
            completion = threads.submit(client.complete, token_ids=prompt, max_tokens=5, **GREEDY)
            pid = cluster.pid("prefill-0")
            eventually(lambda: "running" in states_on(client, "prefill-0"), 10, "prefill runs")
            os.kill(pid, signal.SIGSTOP)
            try:
                time.sleep(0.3)  # an early reservation would be there long since
                assert states_on(client, "decode-0") == set()
                assert not completion.done()
            finally:
                os.kill(pid, signal.SIGCONT)
            assert list(completion.result().token_ids) == greedy_oracle(tiny_llama, prompt, 5)
        cluster.wait_whole()


def states_on(client: Client, worker_id: str) -> set[str]:
    return {entry.state for entry in client.held_blocks() if entry.worker_id == worker_id}
