"""The workloads and the engine's modes that the benchmarks compare."""

import random
from pathlib import Path

import pytest

from benchmarks import engine, growth
from benchmarks.checkpoints import make
from benchmarks.engine import Case, check_equal, ideal_steps
from benchmarks.offline import OfflineEngine, Run
from benchmarks.peers import ENVIRONMENT_OF, ENVIRONMENTS, table
from benchmarks.workloads import (
    DISTRIBUTIONS,
    MEAN_OUTPUT_TOKENS,
    PROMPT_TOKENS,
    VOCAB_SIZE,
    Workload,
    output_tokens,
    peers_workload,
    prompt_tokens,
    workload,
)
from kvrelay.settings import EngineSettings

REQUESTS: Workload = [([5 + index] * (20 + index), 3 + 5 * (index % 3)) for index in range(6)]


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> OfflineEngine:
    folder = make(tmp_path_factory.mktemp("checkpoints") / "tiny", "tiny")
    settings = EngineSettings(dtype="float32", num_blocks=512, context_length=256, max_num_sequences=8)
    return OfflineEngine(folder, settings, threads=1)


def test_the_peers_workload_is_that_of_the_shared_table() -> None:
    requests = peers_workload()
    assert (len(requests), prompt_tokens(requests), output_tokens(requests)) == (64, 9526, 4518)
    assert requests[0][0][:4] == [3213, 3402, 1245, 3967]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_workloads_repeat_and_differ_by_seed(distribution: str) -> None:
    requests = workload(distribution, 40, seed=1)
    assert requests == workload(distribution, 40, seed=1) != workload(distribution, 40, seed=2)
    assert all(3 <= token < VOCAB_SIZE for prompt, _ in requests for token in prompt)


@pytest.mark.parametrize("distribution", ["fixed", "exponential", "lognormal"])
def test_output_lengths_have_the_mean_that_they_should(distribution: str) -> None:
    requests = workload(distribution, 4000)
    assert output_tokens(requests) / 4000 == pytest.approx(MEAN_OUTPUT_TOKENS, rel=0.1)
    assert {len(prompt) for prompt, _ in requests} == {PROMPT_TOKENS}


def test_ideal_steps_are_the_longest_of_each_batch_or_the_fullest_place() -> None:
    assert ideal_steps([5, 1, 1, 1], 2, "static") == 6
    assert ideal_steps([5, 1, 1, 1], 2, "continuous") == 5
    lengths = [random.Random(0).randrange(1, 50) for _ in range(30)]
    assert ideal_steps(lengths, 1, "static") == ideal_steps(lengths, 1, "continuous") == sum(lengths)


def test_modes_compute_the_same_tokens_in_their_own_number_of_steps(offline: OfflineEngine) -> None:
    runs = engine.run_modes(offline, REQUESTS, [Case("continuous", 2), Case("static", 2), Case("padded", 2)], 1)
    continuous, static, padded = (run for (run,) in runs.values())
    assert [len(tokens) for tokens in continuous.tokens] == [output for _, output in REQUESTS]
    assert continuous.steps < static.steps == padded.steps == 8 + 13 + 13
    assert continuous.rows == static.rows < padded.rows


def test_unbatched_runs_one_at_a_time(offline: OfflineEngine) -> None:
    run = offline.run(REQUESTS[:2], "unbatched")
    assert run.steps == 3 + 8


def test_an_unknown_mode_is_refused(offline: OfflineEngine) -> None:
    with pytest.raises(ValueError, match="continuous, static"):
        offline.run(REQUESTS, "dynamic")


def test_different_tokens_are_an_error() -> None:
    runs = {Case("continuous", 2): [Run([[1, 2]], 1.0, 1, 1)], Case("static", 2): [Run([[1, 3]], 1.0, 1, 1)]}
    with pytest.raises(RuntimeError, match="request 0 differs in token 1"):
        check_equal(runs)


def test_growth_measures_the_step_that_it_was_asked_for(offline: OfflineEngine) -> None:
    row = growth.run_case(offline, growth.Case(running=4, context=64, waiting=50), steps=5)
    assert (row["running"], row["context"], row["waiting"]) == (4, 64, 50)
    assert isinstance(row["scheduler, % of the step"], float)
    assert 0 < row["scheduler, % of the step"] < 100


def test_a_waiting_request_costs_little_beyond_its_tokens() -> None:
    traced, _ = growth.waiting_memory(200, 1)
    assert traced < 4096


def test_the_peers_table_compares_within_rounds_and_shows_failures() -> None:
    def answer(tokens: int) -> dict[str, object]:
        return {"tokens": tokens, "seconds": 1.0, "version": "engine 1"}

    rounds = [{"kvrelay": answer(200), "vllm": answer(100), "openvino": None}] * 2
    ours, vllm, openvino = table(rounds)
    assert (str(ours["tokens/s"]), ours["kvrelay is times as fast"]) == ("200", None)
    assert str(vllm["kvrelay is times as fast"]) == "2"
    assert (openvino["version"], openvino["tokens/s"]) == ("failed", None)


def test_every_peer_has_an_environment() -> None:
    assert set(ENVIRONMENT_OF.values()) <= set(ENVIRONMENTS)


def test_a_checkpoint_is_made_once(tmp_path: Path) -> None:
    folder = make(tmp_path / "tiny", "tiny")
    weights = folder / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert make(folder, "tiny") == folder
    assert weights.stat().st_mtime_ns == before
