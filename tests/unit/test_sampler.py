from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from numpy.typing import NDArray
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvrelay.engine.sampler import sample
from kvrelay.request import Sampling
from tests.unit.kernel_cases import random_logits

NUM_DRAWS = 20_000
VOCABULARY = 24
SETTINGS = {
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 3.0},
    "top_k": {"temperature": 1.0, "top_k": 5},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "tiny top_p": {"temperature": 1.0, "top_p": 1e-12},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "all": {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
}


def expected_probabilities(logits: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """What transformers would draw from."""
    makers: dict[str, Callable[[Any], Any]] = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    processors: Any = LogitsProcessorList([makers[name](value) for name, value in settings.items()])
    scores: torch.Tensor = processors(torch.zeros(1, 1, dtype=torch.int64), logits[None].clone())
    return scores[0].softmax(-1)


def draw(logits: torch.Tensor, settings: dict[str, Any]) -> NDArray[Any]:
    requests = [Sampling(max_tokens=1, seed=seed, **settings) for seed in range(NUM_DRAWS)]
    tokens = sample(logits.expand(NUM_DRAWS, -1), requests, [11] * NUM_DRAWS)
    return numpy.bincount([token.token_id for token in tokens], minlength=logits.shape[0])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_draws_follow_the_distribution_of_transformers(settings: dict[str, Any]) -> None:
    logits = random_logits(1, VOCABULARY)[0]
    expected = expected_probabilities(logits, settings).numpy() * NUM_DRAWS
    counts = draw(logits, settings)
    assert not counts[expected == 0].any()
    large = expected >= 5
    assert counts[expected > 0].sum() == NUM_DRAWS
    chi_square = ((counts[large] - expected[large]) ** 2 / expected[large]).sum()
    degrees = max(int(large.sum()) - 1, 1)
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5 + 4


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_support_is_that_of_transformers_for_many_rows(settings: dict[str, Any]) -> None:
    """Many random rows, each drawn from often: what is drawn is allowed, and what is likely is drawn."""
    rows, repeats = 40, 100
    logits = random_logits(rows, VOCABULARY, seed=8)
    requests = [Sampling(max_tokens=1, seed=seed, **settings) for seed in range(rows * repeats)]
    tokens = sample(logits.repeat(repeats, 1), requests, [0] * len(requests))
    drawn = torch.zeros(rows, VOCABULARY, dtype=torch.bool)
    for index, token in enumerate(tokens):
        drawn[index % rows, token.token_id] = True
    for row in range(rows):
        expected = expected_probabilities(logits[row], settings)
        assert not (drawn[row] & (expected == 0)).any()
        assert drawn[row][expected > 0.15].all()


def test_greedy_rows_take_the_likeliest() -> None:
    logits = random_logits(6, VOCABULARY)
    requests = [Sampling(max_tokens=1, temperature=0, seed=seed, top_k=2) for seed in range(6)]
    assert [token.token_id for token in sample(logits, requests, range(6))] == logits.argmax(-1).tolist()
    almost = [Sampling(max_tokens=1, temperature=1e-38, seed=seed) for seed in range(6)]
    assert sample(logits, almost, range(6)) == sample(logits, requests, range(6))


def test_a_row_does_not_depend_on_the_others() -> None:
    settings: list[dict[str, Any]] = [*SETTINGS.values(), {"temperature": 0.0}, {"temperature": 0.0, "logprobs": 3}]
    requests = [Sampling(max_tokens=1, seed=seed, **one) for seed, one in enumerate(settings)]
    logits = random_logits(len(requests), 100)
    positions = list(range(5, 5 + len(requests)))
    together = sample(logits, requests, positions)
    order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = sample(logits[order], [requests[i] for i in order], [positions[i] for i in order])
    for row, request in enumerate(requests):
        assert sample(logits[row : row + 1], [request], [positions[row]])[0].token_id == together[row].token_id
        assert shuffled[order.index(row)].token_id == together[row].token_id


def test_seed_and_position_both_matter() -> None:
    logits = torch.zeros(64, 1000)
    by_seed = sample(logits, [Sampling(max_tokens=1, temperature=1, seed=s) for s in range(64)], [3] * 64)
    by_position = sample(logits, [Sampling(max_tokens=1, temperature=1, seed=0)] * 64, range(64))
    assert len({token.token_id for token in by_seed}) > 50
    assert len({token.token_id for token in by_position}) > 50


def test_ties_are_broken_the_same_way_in_any_batch() -> None:
    logits = torch.zeros(1, 50)
    request = Sampling(max_tokens=1, temperature=1, top_p=0.5, seed=9)
    alone = sample(logits, [request], [4])
    assert sample(logits.expand(33, -1), [request] * 33, [4] * 33) == alone * 33


def test_logprobs() -> None:
    logits = random_logits(4, VOCABULARY)
    wanted = [2, None, 0, VOCABULARY + 5]
    requests = [Sampling(max_tokens=1, temperature=t, logprobs=n) for t, n in zip([0, 0, 1, 1], wanted, strict=True)]
    tokens = sample(logits, requests, range(4))
    expected = logits.log_softmax(-1)
    assert tokens[1].logprobs is None
    for row in (0, 2, 3):
        entry = tokens[row].logprobs
        assert entry is not None
        assert entry.token_id == tokens[row].token_id
        assert entry.logprob == pytest.approx(expected[row, entry.token_id].item(), abs=1e-6)
        count = min(wanted[row] or 0, VOCABULARY)
        best = expected[row].topk(count)
        assert [token_id for token_id, _ in entry.top] == best.indices.tolist()
        assert [logprob for _, logprob in entry.top] == pytest.approx(best.values.tolist(), abs=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_logits_that_are_no_numbers_harm_only_their_own_row(bad: float, settings: dict[str, Any]) -> None:
    good = random_logits(3, VOCABULARY)
    some, all_bad = good[0].clone(), torch.full((VOCABULARY,), bad)
    some[4] = bad
    sampled = Sampling(max_tokens=1, seed=1, logprobs=2, **settings)
    greedy = Sampling(max_tokens=1, logprobs=2)
    logits = torch.stack([good[1], some, all_bad, some, all_bad, good[2]])
    tokens = sample(logits, [sampled, sampled, sampled, greedy, greedy, sampled], range(6))
    assert all(0 <= token.token_id < VOCABULARY for token in tokens)
    assert tokens[0] == sample(logits[:1], [sampled], [0])[0]
    assert tokens[5] == sample(logits[5:], [sampled], [5])[0]
    if bad != float("inf"):
        some[4] = -1e30
        assert tokens[1].token_id == sample(some[None], [sampled], [1])[0].token_id


def test_no_rows() -> None:
    assert sample(torch.empty(0, VOCABULARY), [], []) == []
