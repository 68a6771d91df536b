"""Tokens are fed on the device and committed a step later, and they are the same: a real model against transformers."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kvrelay.engine.events import Finished
from kvrelay.engine.sequence import Role, SequenceState
from kvrelay.request import FinishReason, Token
from tests.checkpoints import VOCAB_SIZE, greedy_oracle
from tests.unit.engine_kit import Kit

pytestmark = pytest.mark.usefixtures("one_thread")


def prompts_of(seed: int, count: int) -> list[list[int]]:
    """A third of them with a common prefix."""
    random = Random(seed)
    prefix = [random.randrange(3, VOCAB_SIZE) for _ in range(17)]
    bodies = [[random.randrange(3, VOCAB_SIZE) for _ in range(random.choice((1, 4, 9, 20)))] for _ in range(count)]
    return [prefix + body if index % 3 == 0 else body for index, body in enumerate(bodies)]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("num_blocks", [60, 20])
def test_tokens_are_those_of_transformers(checkpoint: Callable[..., Path], architecture: str, num_blocks: int) -> None:
    """Chunked prompts, decodes beside them, prefixes found, and in the small pool preemption."""
    path = checkpoint(architecture)
    kit = Kit(path, overlap="always", num_blocks=num_blocks, max_batched_tokens=13)
    prompts, random = prompts_of(3, 14), Random(4)
    lengths = [random.choice((1, 2, 9, 25)) for _ in prompts]
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        kit.add(str(index), prompt, max_tokens=length)
        if index % 2:
            kit.step()
    kit.drain()
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        assert kit.token_ids(str(index)) == greedy_oracle(path, prompt, length)
    assert (kit.scheduler.load().preemptions > 0) == (num_blocks == 20)


def test_the_state_serves_one_batch_after_the_other(checkpoint: Callable[..., Path]) -> None:
    """Rows come and go while decode steps follow one another without a prompt between them."""
    path = checkpoint("llama")
    kit = Kit(path, overlap="always", prefix_caching=False)
    for batch in range(3):
        prompts = prompts_of(batch, 6)
        for index, prompt in enumerate(prompts):
            kit.add(str(index), prompt, max_tokens=3 + 5 * ((index + batch) % 4))
        kit.drain()
        for index, prompt in enumerate(prompts):
            assert kit.token_ids(str(index)) == greedy_oracle(path, prompt, 3 + 5 * ((index + batch) % 4))
        kit.reset()


def test_who_ends_in_flight_disturbs_nobody(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("llama")
    kit = Kit(path, overlap="always", num_blocks=20, max_batched_tokens=13)
    random = Random(5)
    prompts = prompts_of(6, 40)
    aborted = set()
    for index, prompt in enumerate(prompts):
        kit.add(str(index), prompt, max_tokens=12)
        for _ in range(random.randrange(5)):
            kit.step()
        if index % 3 == 0:
            victim = str(random.randrange(index + 1))
            if victim not in kit.ends:
                aborted.add(victim)
                kit.scheduler.abort(victim)
    kit.drain()
    assert len(aborted) > 5
    for index, prompt in enumerate(prompts):
        expected = greedy_oracle(path, prompt, 12)
        if str(index) in aborted:
            assert kit.token_ids(str(index)) == expected[: len(kit.token_ids(str(index)))]
        else:
            assert kit.token_ids(str(index)) == expected


def test_a_stop_token_ends_a_completion_although_the_next_is_in_flight(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("llama")
    kit = Kit(path, overlap="always")
    prompt = prompts_of(8, 1)[0]
    expected = greedy_oracle(path, prompt, 12)
    stop = expected[5]
    kit.add("a", prompt, max_tokens=12, stop_token_ids=frozenset([stop]))
    kit.drain()
    assert kit.token_ids("a") == expected[: expected.index(stop) + 1]
    assert kit.ends["a"] == Finished("a", FinishReason.STOP, expected.index(stop) + 1)


def test_an_adopted_sequence_goes_on_from_the_token_it_came_with(checkpoint: Callable[..., Path]) -> None:
    """Prefill and decode by two engines that do not share their state on the device."""
    path = checkpoint("llama")
    first, second = (Kit(path, overlap="always") for _ in range(2))
    for number, prompt in enumerate(prompts_of(9, 4)):
        name = str(number)
        source = first.add(name, prompt, Role.PREFILL, max_tokens=12)
        target = second.add(name, prompt, Role.DECODE, max_tokens=12)
        while source.state is not SequenceState.HELD:
            first.step()
        second.step()
        second.runner.cache.write_blocks(target.block_table, first.runner.cache.read_blocks(source.block_table))
        second.scheduler.adopt(name, source.token_ids[-1])
        first.scheduler.forget(name)
        second.step()
        expected = greedy_oracle(path, prompt, 12)
        assert first.token_ids(name) == expected[:1]
        second.tokens[name] = [Token(expected[0]), *second.tokens[name]]
    second.drain()
    for number, prompt in enumerate(prompts_of(9, 4)):
        assert second.token_ids(str(number)) == greedy_oracle(path, prompt, 12)


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "seed": 2**64 - 1, "top_k": 20},
    {"temperature": 1.3, "seed": 3, "top_p": 0.8},
    {"temperature": 1.0, "seed": 2**63, "min_p": 0.05, "logprobs": 3},
    {"logprobs": 0},
    {},
]


def test_sampled_tokens_and_logprobs_are_those_of_steps_that_are_awaited(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("llama")
    results = []
    for overlap in ("never", "always"):
        kit = Kit(path, overlap=overlap, max_batched_tokens=13)
        for index, (prompt, sampling) in enumerate(zip(prompts_of(10, 6), SAMPLINGS, strict=True)):
            kit.add(str(index), prompt, max_tokens=20, **sampling)
        kit.drain()
        results.append(kit.tokens)
    awaited, overlapped = results
    for index in range(6):
        for one, other in zip(awaited[str(index)], overlapped[str(index)], strict=True):
            assert one.token_id == other.token_id
            assert (one.logprobs is None) == (other.logprobs is None) == ("logprobs" not in SAMPLINGS[index])
            if one.logprobs is not None and other.logprobs is not None:
                assert one.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-4)
                assert [token for token, _ in one.logprobs.top] == [token for token, _ in other.logprobs.top]
