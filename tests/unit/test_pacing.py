"""When responses go out: at once while they are few, in waves within the budget while they are many."""

import asyncio
from collections.abc import Iterator

import pytest

from gateway.pacing import LONGEST_PAUSE, Pacer
from gateway.response_log import ResponseLog
from kvrelay.errors import Unavailable
from kvrelay.request import Chunk, FinishReason, Timings, Token, Usage


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time passes only when the test says so."""

    now = 0.0

    def time(self) -> float:
        return self.now

    async def advance(self, seconds: float) -> None:
        self.now += seconds
        for _ in range(5):  # what is due runs, and what that wakes
            await asyncio.sleep(0)


@pytest.fixture
def loop() -> Iterator[Clock]:
    loop = Clock()
    yield loop
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.close()


class Stream:
    """A log with a reader, and when each response reached it."""

    def __init__(self, loop: Clock, pacer: Pacer | None) -> None:
        self.log = ResponseLog("r", None, pacer)
        self.seen: list[tuple[float, Chunk]] = []
        self.error: Exception | None = None
        self._loop = loop
        self.reading = loop.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for chunk in self.log.read():
                self.seen.append((self._loop.time(), chunk))
        except Unavailable as error:
            self.error = error

    def add(self, *token_ids: int) -> None:
        self.log.append("x" * len(token_ids), [Token(token_id) for token_id in token_ids])

    @property
    def token_ids(self) -> list[list[int]]:
        return [list(chunk.token_ids) for _, chunk in self.seen]

    @property
    def times(self) -> list[float]:
        return [time for time, _ in self.seen]


async def began(loop: Clock, pacer: Pacer | None, count: int) -> list[Stream]:
    """Streams that have had their first token."""
    streams = [Stream(loop, pacer) for _ in range(count)]
    for stream in streams:
        stream.add(0)
    await loop.advance(0.0)
    assert [stream.token_ids for stream in streams] == [[[0]]] * count
    return streams


def test_one_stream_gets_each_token_as_it_comes(loop: Clock) -> None:
    async def scenario() -> None:
        (stream,) = await began(loop, Pacer(100.0), 1)
        for index in range(1, 5):
            await loop.advance(0.02)
            stream.add(index)
            await loop.advance(0.0)
        assert stream.token_ids == [[0], [1], [2], [3], [4]]
        assert stream.times == pytest.approx([0.0, 0.02, 0.04, 0.06, 0.08])

    loop.run_until_complete(scenario())


def test_many_streams_share_the_budget_in_waves(loop: Clock) -> None:
    async def scenario() -> None:
        streams = await began(loop, Pacer(100.0), 8)  # a wave of 8 lasts 0.08 s
        for index in range(1, 13):
            await loop.advance(0.03)
            for stream in streams:
                stream.add(index)
            await loop.advance(0.0)
        for stream in streams:
            assert stream.token_ids == [[0], [1], [2, 3], [4, 5, 6], [7, 8, 9]]
            assert stream.times == pytest.approx([0.0, 0.03, 0.12, 0.21, 0.30])

    loop.run_until_complete(scenario())


def test_no_pause_is_longer_than_the_longest(loop: Clock) -> None:
    async def scenario() -> None:
        streams = await began(loop, Pacer(1.0), 8)
        for index in (1, 2):
            for stream in streams:
                stream.add(index)
            await loop.advance(0.0)
        await loop.advance(LONGEST_PAUSE)
        assert all(stream.times == pytest.approx([0.0, 0.0, LONGEST_PAUSE]) for stream in streams)

    loop.run_until_complete(scenario())


def test_the_first_token_and_the_end_wait_for_nobody(loop: Clock) -> None:
    async def scenario() -> None:
        pacer = Pacer(10.0)
        streams = await began(loop, pacer, 2)
        for stream in streams:
            stream.add(1)
        await loop.advance(0.0)
        for stream in streams:
            stream.add(2)
        streams[0].log.finish(FinishReason.LENGTH, Usage(), Timings())
        streams[1].log.fail(Unavailable("lost"))
        late = Stream(loop, pacer)
        late.add(0)
        await loop.advance(0.0)
        assert [stream.token_ids for stream in streams] == [[[0], [1], [2]]] * 2
        assert streams[0].seen[-1][1].finish_reason is FinishReason.LENGTH
        assert isinstance(streams[1].error, Unavailable)
        assert late.token_ids == [[0]]
        await asyncio.gather(*(stream.reading for stream in streams))

    loop.run_until_complete(scenario())


@pytest.mark.parametrize("unlimited", [Pacer(float("inf")), None])
def test_without_a_limit_every_token_goes_at_once(loop: Clock, unlimited: Pacer | None) -> None:
    async def scenario() -> None:
        streams = await began(loop, unlimited, 8)
        for index in range(1, 4):
            for stream in streams:
                stream.add(index)
            await loop.advance(0.0)
        assert all(stream.token_ids == [[0], [1], [2], [3]] for stream in streams)

    loop.run_until_complete(scenario())


def test_a_reader_that_leaves_is_no_matter_to_the_wave(loop: Clock) -> None:
    async def scenario() -> None:
        leaves, stays = await began(loop, Pacer(10.0), 2)
        for stream in (leaves, stays):
            stream.add(1)
            stream.add(2)
        leaves.reading.cancel()
        await loop.advance(1.0)
        assert stays.token_ids == [[0], [1, 2]]

    loop.run_until_complete(scenario())
