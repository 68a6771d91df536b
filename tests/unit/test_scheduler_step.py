"""What is computed next, and how sequences end."""

from kvrelay.engine.events import Failed, Finished, Sampled
from kvrelay.engine.sequence import Role, SequenceState
from kvrelay.errors import Internal
from kvrelay.request import FinishReason, Token
from tests.unit.scheduling import VOCABULARY, NewBench

WAITING, TRANSFERRING, RUNNING, HELD, FINISHED = SequenceState


def test_a_long_prompt_is_chunked_under_the_token_budget(bench: NewBench) -> None:
    house = bench(max_batched_tokens=8)
    house.add("a", range(20), max_tokens=2)
    assert house.drain() == [[("a", 0, 8)], [("a", 8, 8)], [("a", 16, 4)], [("a", 20, 1)]]
    assert house.progress("a") == [], "nobody waits for the KV cache of a sequence that stays here"


def test_the_budget_is_shared_in_order_of_arrival(bench: NewBench) -> None:
    house = bench(max_batched_tokens=8)
    house.add("a", range(6), max_tokens=1)
    house.add("b", range(50, 60), max_tokens=1)
    house.add("c", range(70, 73), max_tokens=1)
    assert house.drain() == [[("a", 0, 6), ("b", 0, 2)], [("b", 2, 8)], [("c", 0, 3)]]


def test_decode_tokens_come_before_prompt_chunks(bench: NewBench) -> None:
    house = bench(max_batched_tokens=8)
    prompt = house.add("prompt", range(40), arrival=0)
    decode = house.add("decode", range(60, 66), Role.DECODE, arrival=1)
    assert house.step() == [("prompt", 0, 8)]
    house.scheduler.adopt("decode", house.transfer(decode))
    house.add("late", [1], arrival=2)
    assert house.step() == [("decode", 6, 1), ("prompt", 8, 7)]
    house.settle()
    assert (prompt.num_computed_tokens, decode.num_computed_tokens) == (15, 7)


def test_decoding_sequences_beyond_the_budget_take_turns_by_age(bench: NewBench) -> None:
    house = bench(max_batched_tokens=2)
    for name in "abc":
        house.add(name, [ord(name)], max_tokens=3)
    steps = house.drain()
    assert steps[0] == [("a", 0, 1), ("b", 0, 1)]
    assert all(sum(length for _, _, length in step) <= 2 for step in steps)
    assert [house.got(name) for name in "abc"] == [house.expected(house.sequences[name]) for name in "abc"]


def test_no_more_sequences_run_than_allowed(bench: NewBench) -> None:
    house = bench(max_num_sequences=2)
    house.add("a", range(5), Role.DECODE)
    house.add("b", range(5), max_tokens=9)
    house.add("c", range(5), Role.DECODE)
    house.step()
    assert [s.state for s in house.sequences.values()] == [TRANSFERRING, RUNNING, WAITING]
    assert house.scheduler.load().running == 2
    house.scheduler.abort("b")
    house.step()
    assert house.sequences["c"].state is TRANSFERRING


def test_held_sequences_take_no_place_in_the_batch(bench: NewBench) -> None:
    house = bench(max_num_sequences=1)
    for name in "abc":
        house.add(name, range(5), Role.PREFILL)
    house.drain()
    assert [s.state for s in house.sequences.values()] == [HELD] * 3


def test_first_come_first_served(bench: NewBench) -> None:
    house = bench(8)
    house.add("long", range(20), Role.PREFILL)
    house.step()
    house.add("large", range(40, 60))
    house.add("small", [90])
    assert house.step() == []
    assert house.scheduler.load().waiting == 2
    house.scheduler.forget("long")
    assert [shape[0] for shape in house.step()] == ["large", "small"]


def test_a_sequence_is_admitted_only_with_blocks_for_all_its_tokens(bench: NewBench) -> None:
    house = bench(5, max_batched_tokens=4)
    house.add("a", range(12), max_tokens=1)
    house.add("b", range(50, 62), max_tokens=1)
    assert house.step() == [("a", 0, 4)]
    assert len(house.sequences["a"].block_table) == 3
    assert house.sequences["b"].block_table == []
    house.drain()
    assert house.got("b") == house.expected(house.sequences["b"])


def test_admission_leaves_a_reserve_to_those_that_run(bench: NewBench) -> None:
    house = bench(32, context_length=128)
    house.add("a", range(4), max_tokens=3)
    house.step()
    # Would take the 30 blocks that a leaves, and none would remain for a's next block.
    house.add("b", range(4, 124), max_tokens=1)
    assert house.drain() == [[("a", 4, 1)], [("a", 5, 1)], [("b", 0, 64)], [("b", 64, 56)]]


def test_a_handover_is_admitted_although_the_token_budget_is_spent(bench: NewBench) -> None:
    house = bench(max_batched_tokens=4)
    house.add("a", range(8))
    house.add("b", range(50, 58), Role.DECODE)
    house.add("c", range(70, 78))
    assert house.step() == [("a", 0, 4)]
    assert [s.state for s in house.sequences.values()] == [RUNNING, TRANSFERRING, WAITING]


def test_a_stop_token_ends_a_sequence(bench: NewBench) -> None:
    house = bench()
    tokens = house.expected(house.add("probe", range(10), max_tokens=8))
    stop = next(token for token in tokens if token != tokens[0])
    sequence = house.add("a", range(10), max_tokens=8, stop=[stop])
    house.drain()
    count = tokens.index(stop) + 1
    assert house.got("a") == tokens[:count] == house.expected(sequence)
    assert house.ends["a"] == [Finished("a", FinishReason.STOP, count)]


def test_max_tokens_and_the_context_limit_a_sequence(bench: NewBench) -> None:
    house = bench(context_length=16)
    house.add("by tokens", range(10), max_tokens=5)
    house.add("by context", range(20, 30), max_tokens=50)
    house.add("stop beats length", range(10), max_tokens=1, stop=range(VOCABULARY))
    house.drain()
    assert house.ends["by tokens"] == [Finished("by tokens", FinishReason.LENGTH, 5)]
    assert house.ends["by context"] == [Finished("by context", FinishReason.LENGTH, 6)]
    assert house.ends["stop beats length"] == [Finished("stop beats length", FinishReason.STOP, 1)]


def test_the_last_token_of_the_context_fills_the_pool_and_no_more(bench: NewBench) -> None:
    house = bench(4)
    sequence = house.add("a", range(3), max_tokens=100)
    house.drain()
    assert house.got("a") == house.expected(sequence)
    assert len(sequence.token_ids) == 16


def test_a_failed_step_spares_the_others(bench: NewBench) -> None:
    house = bench(max_num_sequences=2)
    house.add("a", range(10))
    house.add("b", range(10))
    house.add("c", range(10))
    chunks, _ = house.schedule()
    error = Internal("defect")
    events = house.scheduler.fail(chunks, error)
    assert events == [Failed("a", error), Failed("b", error)]
    house.drain()
    assert house.got("c") == house.expected(house.sequences["c"])
    assert house.admissions("c")[0].num_cached_blocks == 0, "what a failed step left must not be found"


def test_a_sequence_that_ended_during_the_step_is_passed_over(bench: NewBench) -> None:
    house = bench()
    house.add("a", range(10))
    house.add("b", range(20, 30))
    chunks, _ = house.schedule()
    house.scheduler.abort("a")
    events = house.scheduler.commit(chunks, [Token(1), Token(2)])
    assert events == [Finished("a", FinishReason.ABORT, 0), Sampled("b", 0, Token(2))]
    assert house.pool.find(house.sequences["a"].digests) == []
