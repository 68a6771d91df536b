"""Sequences that come from other workers with tokens, and those that leave for others."""

from dataclasses import replace

import pytest

from kvrelay.engine.events import Failed, HandedOver
from kvrelay.engine.sequence import Role, Sequence, SequenceState
from kvrelay.errors import FailedPrecondition, InvalidArgument
from kvrelay.request import Request, Sampling
from tests.unit.scheduling import Bench, NewBench, whole

WAITING, TRANSFERRING, RUNNING, HELD, FINISHED = SequenceState


def continued(house: Bench, request_id: str, former: Sequence, num_tokens: int, role: Role) -> Sequence:
    """The request of another sequence, with so many tokens of its completion."""
    tokens = tuple(house.expected(former)[:num_tokens])
    request = replace(former.request, request_id=request_id, completion_token_ids=tokens)
    sequence = Sequence(request, role, arrival=float(len(house.sequences)))
    house.scheduler.add(sequence)
    house.sequences[request_id] = sequence
    return sequence


def handed_over(house: Bench, request_id: str) -> HandedOver:
    (event,) = [e for e in house.events if isinstance(e, HandedOver) and e.request_id == request_id]
    return event


@pytest.mark.parametrize("num_tokens", range(1, 8))
def test_a_request_with_tokens_goes_on_from_them(bench: NewBench, num_tokens: int) -> None:
    house = bench()
    first = house.add("r", range(10), max_tokens=8)
    house.drain()
    second = continued(house, "r#2", first, num_tokens, Role.WHOLE)
    house.drain()
    assert house.tokens["r#2"] == dict(enumerate(house.expected(first)[num_tokens:], num_tokens))
    assert second.num_completion_tokens == 8


def test_prefill_and_decode_go_on_from_tokens(bench: NewBench) -> None:
    house = bench()
    first = house.add("r", range(10), max_tokens=8)
    house.drain()
    prefill = continued(house, "r#2", first, 3, Role.PREFILL)
    house.drain()
    assert prefill.state is HELD
    assert house.tokens["r#2"] == {3: house.expected(first)[3]}
    decode = continued(house, "r#3", first, 3, Role.DECODE)
    house.step()
    assert decode.state is TRANSFERRING
    house.model.write(decode, decode.num_computed_tokens, 13)
    house.scheduler.adopt("r#3", house.expected(first)[3])
    house.drain()
    assert house.tokens["r#3"] == dict(enumerate(house.expected(first)[4:], 4))


def test_tokens_that_do_not_fit_the_context_are_refused(bench: NewBench) -> None:
    house = bench(context_length=16)
    request = Request("r", tuple(range(10)), Sampling(max_tokens=50), completion_token_ids=(1,) * 6)
    with pytest.raises(InvalidArgument):
        house.scheduler.add(Sequence(request))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_steps", range(1, 7))
def test_who_leaves_is_held_with_all_but_its_last_token(bench: NewBench, num_steps: int, overlap: bool) -> None:
    house = bench(overlap=overlap)
    sequence = house.add("r", range(10), max_tokens=12)
    stays = house.add("stays", range(30, 38), max_tokens=12)
    for _ in range(num_steps):
        house.step()
    house.scheduler.hand_over("r")
    house.drain()
    event = handed_over(house, "r")
    assert sequence.state is HELD
    assert house.got("r") == house.expected(sequence)[: event.num_completion_tokens]
    assert event.last_token_id == house.got("r")[-1]
    num_computed = 10 + event.num_completion_tokens - 1
    assert len(event.block_ids) == -(-num_computed // 4)
    house.model.check(sequence, num_computed)
    assert [house.pool.generation(block) for block in event.block_ids] == list(event.generations)
    assert house.got("stays") == house.expected(stays)
    house.scheduler.forget("r")
    house.schedule()
    assert whole(house.scheduler.load())


def test_who_leaves_while_its_prompt_is_computed_leaves_after_its_first_token(bench: NewBench) -> None:
    house = bench(max_batched_tokens=4)
    sequence = house.add("r", range(20), max_tokens=6)
    house.step()
    house.scheduler.hand_over("r")
    house.drain()
    assert handed_over(house, "r").num_completion_tokens == 1
    assert sequence.state is HELD


def test_who_leaves_while_its_cache_arrives_leaves_when_it_is_there(bench: NewBench) -> None:
    house = bench()
    sequence = house.add("r", range(10), Role.DECODE, max_tokens=6)
    house.step()
    house.scheduler.hand_over("r")
    house.scheduler.adopt("r", house.transfer(sequence))
    house.step()
    assert handed_over(house, "r").num_completion_tokens == 1
    assert sequence.state is HELD


def test_who_ends_with_the_token_in_flight_does_not_leave(bench: NewBench) -> None:
    house = bench(overlap=True)
    sequence = house.add("r", range(10), max_tokens=1)
    house.step()
    house.scheduler.hand_over("r")
    house.drain()
    assert sequence.state is FINISHED
    assert not [event for event in house.events if isinstance(event, HandedOver)]


def test_where_the_limits_say_so_who_gives_way_goes_elsewhere(bench: NewBench) -> None:
    house = bench(6, prefix_caching=False)
    house.scheduler.limits = replace(house.scheduler.limits, evicts=True)
    old = house.add("old", range(8), max_tokens=12)
    young = house.add("young", range(20, 28), max_tokens=12)
    house.drain()
    assert house.got("old") == house.expected(old)
    assert young.state is FINISHED
    (end,) = house.ends["young"]
    assert isinstance(end, Failed)
    assert isinstance(end.error, FailedPrecondition)
    assert end.error.reason == "EVICTED"
    assert house.scheduler.load().preemptions == 1
