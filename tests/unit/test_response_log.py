"""Response logs: coalescing, replay, failure, and who is told when nobody reads any more."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from gateway.response_log import ResponseHistory, ResponseLog
from kvrelay.errors import KvrelayError, OutOfRange, Unavailable
from kvrelay.request import Chunk, FinishReason, Timings, Token, TokenLogprobs, Usage
from tests.patience import SOON

USAGE, TIMINGS = Usage(3, 0, 2), Timings(total=1.0)


def tokens(*ids: int) -> list[Token]:
    return [Token(index) for index in ids]


def finish(log: ResponseLog) -> None:
    log.finish(FinishReason.STOP, USAGE, TIMINGS)


async def read_all(log: ResponseLog, after_seq: int = 0) -> list[Chunk]:
    async with asyncio.timeout(SOON):
        return [response async for response in log.read(after_seq)]


async def next_of(reader: AsyncIterator[Chunk]) -> Chunk:
    async with asyncio.timeout(SOON):
        return await anext(reader)


async def test_what_is_pending_when_a_reader_is_ready_becomes_one_response() -> None:
    log = ResponseLog("r")
    log.append("a", tokens(1))
    log.append("", tokens(2))
    async with contextlib.aclosing(log.read()) as reader:
        assert await next_of(reader) == Chunk("r", 1, "a", (1, 2))
        log.append("b", tokens(3))
        log.append("c", tokens(4))
        assert await next_of(reader) == Chunk("r", 2, "bc", (3, 4))
        log.append("d", tokens(5))
        finish(log)
        assert await next_of(reader) == Chunk("r", 3, "d", (5,), (), FinishReason.STOP, USAGE, TIMINGS)
        with pytest.raises(StopAsyncIteration):
            await next_of(reader)


async def test_a_waiting_reader_wakes_for_each_addition() -> None:
    log = ResponseLog("r")
    reading = asyncio.create_task(read_all(log))
    for index in range(3):
        await asyncio.sleep(0)
        log.append(str(index), tokens(index))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    finish(log)
    responses = await reading
    assert [(each.seq, each.text) for each in responses] == [(1, "0"), (2, "1"), (3, "2"), (4, "")]


async def test_all_readers_get_the_same_responses() -> None:
    log = ResponseLog("r")
    readers = [asyncio.create_task(read_all(log)) for _ in range(3)]
    for index in range(20):
        log.append(str(index), tokens(index))
        if index % 3 == 0:
            await asyncio.sleep(0)
    finish(log)
    seen = [await reader for reader in readers]
    assert seen[0] == seen[1] == seen[2] == await read_all(log)
    assert [token for response in seen[0] for token in response.token_ids] == list(range(20))
    assert [response.seq for response in seen[0]] == list(range(1, len(seen[0]) + 1))
    assert log.num_readers == 0


async def test_a_finished_request_is_replayed_from_any_point() -> None:
    log = ResponseLog("r")
    async with contextlib.aclosing(log.read()) as reader:
        log.append("a", tokens(1))
        await next_of(reader)
        log.append("b", tokens(2))
        await next_of(reader)
    log.append("c", tokens(3))
    finish(log)
    with pytest.raises(OutOfRange):
        await read_all(log, 3)  # nobody has seen it
    whole = await read_all(log)
    assert [response.text for response in whole] == ["a", "b", "c"]
    for seen in range(4):
        assert await read_all(log, seen) == whole[seen:]
    with pytest.raises(OutOfRange, match="4; the last response so far is 3"):
        await read_all(log, 4)


async def test_a_failure_comes_after_what_was_written_before() -> None:
    log = ResponseLog("r")
    log.append("a", tokens(1))
    log.fail(Unavailable("gone"))
    log.append("lost", tokens(2))
    finish(log)
    for _ in range(2):
        reader = log.read()
        assert await next_of(reader) == Chunk("r", 1, "a", (1,))
        with pytest.raises(Unavailable, match="gone"):
            await next_of(reader)
    assert (log.ended, log.failed) == (True, True)


async def test_a_waiting_reader_is_told_of_a_failure() -> None:
    log = ResponseLog("r")
    reading = asyncio.create_task(read_all(log))
    await asyncio.sleep(0)
    log.fail(KvrelayError("no"))
    with pytest.raises(KvrelayError, match="no"):
        await reading


async def test_log_probabilities_follow_their_tokens() -> None:
    log = ResponseLog("r")
    scored = [TokenLogprobs(index, -1.0) for index in (1, 2)]
    log.append("ab", [Token(each.token_id, each) for each in scored])
    finish(log)
    [response] = await read_all(log)
    assert response.logprobs == tuple(scored)


async def test_text_without_tokens_and_tokens_without_text() -> None:
    log = ResponseLog("r")
    log.append("", ())
    async with contextlib.aclosing(log.read()) as reader:
        log.append("", tokens(1))
        assert await next_of(reader) == Chunk("r", 1, "", (1,))
        log.append("rest", ())
        finish(log)
        last = await next_of(reader)
        assert (last.text, last.token_ids, last.finish_reason) == ("rest", (), FinishReason.STOP)


async def test_the_last_reader_to_leave_early_abandons_the_request() -> None:
    abandoned: list[int] = []
    log = ResponseLog("r", lambda: abandoned.append(1))
    log.append("a", tokens(1))
    first, second = log.read(), log.read()
    await next_of(first)
    await next_of(second)
    assert log.num_readers == 2
    await first.aclose()
    assert not abandoned
    await second.aclose()
    assert abandoned == [1]


async def test_a_cancelled_reader_leaves() -> None:
    abandoned = asyncio.Event()
    log = ResponseLog("r", abandoned.set)
    reading = asyncio.create_task(read_all(log))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert log.num_readers == 1
    reading.cancel()
    async with asyncio.timeout(SOON):
        await abandoned.wait()
    assert log.num_readers == 0


async def test_an_ended_request_is_not_abandoned() -> None:
    abandoned: list[int] = []
    log = ResponseLog("r", lambda: abandoned.append(1))
    log.append("a", tokens(1))
    reader = log.read()
    await next_of(reader)
    finish(log)
    await reader.aclose()
    assert not abandoned
    with pytest.raises(OutOfRange):
        await read_all(log, 9)
    assert not abandoned


def history_of(*request_ids: str, replay_seconds: float = 60.0, replay_requests: int = 2) -> ResponseHistory:
    history = ResponseHistory(replay_seconds, replay_requests)
    for request_id in request_ids:
        history.add(request_id, f"digest of {request_id}", ResponseLog("r"))
    return history


def test_running_requests_are_kept() -> None:
    history = history_of("a", "b", "c", "d")
    assert len(history) == 4
    entry = history.get("a", now=1e9)
    assert entry is not None
    assert entry.body_digest == "digest of a"
    assert history.get("unknown", now=0.0) is None


def test_ended_requests_are_kept_for_a_while() -> None:
    history = history_of("a", "b")
    history.ended("a", now=100.0)
    history.ended("a", now=150.0)
    assert history.get("a", now=159.9) is not None
    assert history.get("a", now=160.0) is None
    assert len(history) == 1


def test_only_so_many_ended_requests_are_kept() -> None:
    history = history_of("a", "b", "c", "running")
    for now, request_id in enumerate("abc"):
        history.ended(request_id, float(now))
    assert [history.get(name, 3.0) is not None for name in ("a", "b", "c", "running")] == [False, True, True, True]
    history.ended("unknown", 4.0)
    assert len(history) == 3


def test_nothing_is_kept_where_replay_is_off() -> None:
    for history in (history_of("a", replay_seconds=0.0), history_of("a", replay_requests=0)):
        history.ended("a", now=5.0)
        assert len(history) == 0


def test_an_id_that_runs_again_is_not_evicted() -> None:
    history = history_of("a")
    history.ended("a", now=0.0)
    history.add("a", "again", ResponseLog("r"))
    entry = history.get("a", now=1000.0)
    assert entry is not None
    assert entry.body_digest == "again"
    history.remove("a")
    assert len(history) == 0
