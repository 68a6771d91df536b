"""Sampling on the device against `kvrelay.engine.sampler`, token by token."""

from typing import Any

import numpy
import pytest
import torch
import triton
import triton.language as tl

from kvrelay.engine.kernels.gpu import sampling as gpu_sampling
from kvrelay.engine.kernels.gpu.sampling import SamplingTensors, sample_tokens
from kvrelay.engine.kernels.gpu.weights import random_bits
from kvrelay.engine.philox import uniforms
from kvrelay.engine.sampler import sample
from kvrelay.request import Sampling
from tests.unit.kernel_cases import random_logits

# As the sampler, the kernels rely on what float32 makes of numbers that are too large.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "top_k": 3, "top_p": 0.5},
    "almost greedy": {"temperature": 9e-6},
    "temperature": {"temperature": 0.7},
    "tiny temperature": {"temperature": 1e-5, "top_k": 9},
    "huge temperature": {"temperature": 1e30, "top_p": 0.9371},
    "top_k": {"temperature": 1.0, "top_k": 5},
    "top_k of all": {"temperature": 1.0, "top_k": 1 << 30},
    "top_p": {"temperature": 1.0, "top_p": 0.75},
    "tiny top_p": {"temperature": 1.0, "top_p": 2.0**-30},
    "min_p": {"temperature": 2.0, "min_p": 0.125},
    "top_k, top_p": {"temperature": 1.5, "top_k": 40, "top_p": 0.875},
    "top_p, min_p": {"temperature": 1.5, "top_p": 0.875, "min_p": 0.0625},
    "all": {"temperature": 1.25, "top_k": 12, "top_p": 0.75, "min_p": 0.03125},
}


def make_requests(*settings: dict[str, Any], seed: int = 1) -> list[Sampling]:
    return [Sampling(max_tokens=1, seed=seed + index, **one) for index, one in enumerate(settings)]


def draw(logits: torch.Tensor, requests: list[Sampling], device: torch.device, first_position: int = 0) -> list[int]:
    """What the device draws, row r at position `first_position + r`."""
    seeds = numpy.array([request.seed for request in requests], dtype=numpy.uint64).view(numpy.int64)
    tensors = SamplingTensors(
        temperature=torch.tensor([request.temperature for request in requests], device=device),
        top_k=torch.tensor([request.top_k for request in requests], dtype=torch.int32, device=device),
        top_p=torch.tensor([request.top_p for request in requests], device=device),
        min_p=torch.tensor([request.min_p for request in requests], device=device),
        seed=torch.from_numpy(seeds).to(device),
        position=torch.arange(first_position, first_position + len(requests), device=device),
    )
    token_ids = sample_tokens(logits.to(device), tensors)
    assert token_ids.dtype == torch.int64
    result: list[int] = token_ids.tolist()
    return result


def expected(logits: torch.Tensor, requests: list[Sampling], first_position: int = 0) -> list[int]:
    positions = range(first_position, first_position + len(requests))
    return [token.token_id for token in sample(logits, requests, positions)]


@triton.jit  # type: ignore[untyped-decorator]
def draw_bits(seeds, positions, bits, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.arange(0, COUNT)
    tl.store(bits + rows, random_bits(tl.load(seeds + rows), tl.load(positions + rows)).to(tl.int64, bitcast=True))


def test_random_numbers_are_those_of_philox(device: torch.device) -> None:
    generator = numpy.random.default_rng(5)
    seeds = generator.integers(0, 2**64, 64, dtype=numpy.uint64)
    seeds[:3] = 0, 2**64 - 1, 2**63
    positions = generator.integers(0, 2**31, 64)
    bits = torch.empty(64, dtype=torch.int64, device=device)
    tensors = torch.from_numpy(seeds.view(numpy.int64)).to(device), torch.from_numpy(positions).to(device)
    draw_bits[(1,)](*tensors, bits, COUNT=64)
    drawn = bits.cpu().numpy().view(numpy.uint64)
    assert (drawn >> numpy.uint64(11) << numpy.uint64(11) == drawn).all()
    assert (drawn.astype(numpy.float64) * 2.0**-64 == uniforms(seeds, positions)).all()


@pytest.mark.parametrize("vocabulary", [17, 512, 5000])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_tokens_are_those_of_the_sampler(vocabulary: int, settings: dict[str, Any], device: torch.device) -> None:
    logits = random_logits(1, vocabulary)
    requests = make_requests(settings, seed=2**64 - 2)
    assert draw(logits, requests, device, 1000) == expected(logits, requests, 1000)


def test_rows_of_all_kinds_in_one_batch(device: torch.device) -> None:
    """Of three tiles each, and longer than the vocabulary."""
    kinds = [SETTINGS[name] for name in ("top_k", "greedy", "min_p", "all", "temperature", "top_p")]
    logits = random_logits(len(kinds), 9100)[:, :9000]
    requests = make_requests(*kinds, seed=77)
    assert draw(logits, requests, device) == expected(logits, requests)


@pytest.mark.parametrize("settings", [{"top_k": 100}, {"top_p": 0.875}, {"top_k": 300, "top_p": 0.75, "min_p": 0.01}])
def test_rows_with_more_candidates_than_are_collected(
    settings: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_sampling, "_MOST_CANDIDATES", 16)
    logits = random_logits(2, 5000)
    requests = make_requests({"temperature": 1.0, **settings}, {"temperature": 0.5, "top_k": 2})
    assert draw(logits, requests, device) == expected(logits, requests)


def test_all_tiles_are_drawn_from(device: torch.device) -> None:
    """Where all tokens are equally likely, the number drawn is the place in the vocabulary."""
    logits = torch.zeros(12, 12289)
    requests = make_requests(*[{"temperature": 1.0}] * 12)
    numbers = uniforms([request.seed for request in requests], range(12))
    drawn = draw(logits, requests, device)
    assert drawn == [int(number * 12289) for number in numbers]
    assert {token_id // 4096 for token_id in drawn} >= {0, 1, 2}


def test_draws_follow_the_distribution(device: torch.device) -> None:
    num_draws = 80
    logits = torch.tensor([0.5, -1.0, 1.0, 0.0, 0.25])
    drawn = draw(logits.expand(num_draws, -1).contiguous(), make_requests(*[{"temperature": 1.0}] * num_draws), device)
    counts = torch.bincount(torch.tensor(drawn), minlength=5)
    means = logits.softmax(0) * num_draws
    chi_square = float(((counts - means) ** 2 / means).sum())
    assert chi_square < 18.5  # the 99.9th percentile with 4 degrees of freedom


def only(logits: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return logits.masked_fill(~kept, float("-inf"))


def test_greedy_ties_go_to_the_lowest_id(device: torch.device) -> None:
    logits = torch.full((3, 5000), -1.0)
    logits[0, [4900, 4200, 4999]] = 2.0
    logits[1, [7, 4100]] = torch.tensor([-0.0, 0.0])
    assert draw(logits, make_requests(*[{"temperature": 0.0}] * 3), device) == [4200, 7, 0]


@pytest.mark.parametrize("top_k", [1, 3, 16])
def test_top_k_keeps_ties(top_k: int, device: torch.device) -> None:
    logits = random_logits(2, 60).round()
    logits[:, 30] = -0.0
    requests = make_requests(*[{"temperature": 3.0, "top_k": top_k}] * 2)
    assert draw(logits, requests, device) == expected(logits, requests)


@pytest.mark.parametrize("top_p", [0.125, 0.625, 0.9375])
def test_top_p_keeps_ties(top_p: float, device: torch.device) -> None:
    logits = random_logits(3, 60).round()
    sorted_logits = logits.sort(dim=-1, descending=True).values
    before = sorted_logits.softmax(-1, dtype=torch.float64).cumsum(-1).roll(1, dims=-1)
    before[:, 0] = 0
    last = sorted_logits.masked_fill(before >= top_p, float("inf")).amin(-1, keepdim=True)
    requests = make_requests(*[{"temperature": 1.0, "top_p": top_p}] * 3)
    plain = make_requests(*[{"temperature": 1.0}] * 3)
    assert draw(logits, requests, device) == expected(only(logits, logits >= last), plain)


def test_equal_logits_are_kept_together(device: torch.device) -> None:
    logits = torch.full((2, 5000), 3.25)
    settings = {"temperature": 1.0, "top_k": 10}, {"temperature": 1.0, "top_p": 0.01}
    drawn = draw(logits, make_requests(*settings), device)
    assert drawn == draw(logits, make_requests(*[{"temperature": 1.0}] * 2), device)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_logits_that_are_no_numbers(bad: float, device: torch.device) -> None:
    """As the sampler: any token may be the answer of a greedy row; others are as if NaN were very unlikely."""
    settings = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.5, "top_k": 4, "top_p": 0.9}]
    some = random_logits(3, 40) - 9.0
    some[:, [4, 17]] = bad
    rows = torch.cat((some, torch.full_like(some, bad)))
    requests = make_requests(*settings, *settings)
    drawn = draw(rows, requests, device)
    # Where all are equal, which of them top-k and top-p keep is the one thing that differs.
    assert drawn[:5] == expected(rows, requests)[:5]
    assert 0 <= drawn[5] < 40


def test_extreme_logits(device: torch.device) -> None:
    logits = random_logits(3, 50)
    logits[:2] *= 1e37
    logits[2] *= 1e-30
    requests = make_requests(*[{"temperature": temperature, "top_k": 20} for temperature in (1.0, 2e36, 1.0)])
    assert draw(logits, requests, device) == expected(logits, requests)


def test_a_vocabulary_of_one(device: torch.device) -> None:
    kinds = [SETTINGS[name] for name in ("greedy", "temperature", "all")]
    assert draw(random_logits(3, 1), make_requests(*kinds), device) == [0, 0, 0]


def test_no_rows(device: torch.device) -> None:
    assert draw(torch.empty(0, 30), [], device) == []
