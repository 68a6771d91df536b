"""Frames: one a step, in order, larger for a gateway that reads late, and none for one that is not there."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from decode_worker.frames import FrameStreams
from kvrelay.errors import FailedPrecondition
from kvrelay.request import Token, TokenLogprobs
from kvrelay.v1 import worker_pb2
from tests.patience import SOON


async def next_of(frames: AsyncIterator[worker_pb2.StreamFramesResponse]) -> list[tuple[int, int, list[int]]]:
    frame = await asyncio.wait_for(anext(frames), SOON)
    return [(entry.handle, entry.first_index, list(entry.token_ids)) for entry in frame.sequences]


async def test_a_step_is_a_frame() -> None:
    streams = FrameStreams()
    async with contextlib.aclosing(streams.stream("gateway")) as frames:
        assert await next_of(frames) == []
        streams.standing("gateway").add(1, 0, Token(10))
        streams.standing("gateway").add(2, 4, Token(20))
        streams.flush()
        assert await next_of(frames) == [(1, 0, [10]), (2, 4, [20])]


async def test_the_first_token_of_a_local_prompt_tells_of_the_prompt() -> None:
    streams = FrameStreams()
    local_prompt = worker_pb2.LocalPrompt(cached_tokens=32, prefill_queue=0.5, prefill=0.25)
    async with contextlib.aclosing(streams.stream("gateway")) as frames:
        await next_of(frames)
        streams.standing("gateway").add(1, 0, Token(10), local_prompt)
        streams.standing("gateway").add(1, 1, Token(11))
        streams.standing("gateway").add(2, 0, Token(20))
        streams.flush()
        frame = await asyncio.wait_for(anext(frames), SOON)
        assert [list(entry.token_ids) for entry in frame.sequences] == [[10, 11], [20]]
        assert frame.sequences[0].local_prompt == local_prompt
        assert not frame.sequences[1].HasField("local_prompt")


async def test_what_was_not_read_becomes_one_frame() -> None:
    streams = FrameStreams()
    async with contextlib.aclosing(streams.stream("gateway")) as frames:
        await next_of(frames)
        for index in range(3):
            streams.standing("gateway").add(1, index, Token(10 + index, TokenLogprobs(10 + index, -0.5)))
            streams.flush()
        frame = await asyncio.wait_for(anext(frames), SOON)
        assert [list(entry.token_ids) for entry in frame.sequences] == [[10, 11, 12]]
        assert [entry.chosen.token_id for entry in frame.sequences[0].logprobs] == [10, 11, 12]


async def test_a_recomputed_sequence_may_begin_again() -> None:
    streams = FrameStreams()
    async with contextlib.aclosing(streams.stream("gateway")) as frames:
        await next_of(frames)
        for index, token_id in ((1, 11), (0, 10), (1, 11), (2, 12)):
            streams.standing("gateway").add(1, index, Token(token_id))
        streams.flush()
        assert await next_of(frames) == [(1, 1, [11]), (1, 0, [10, 11, 12])]


async def test_a_gateway_that_is_not_there_has_no_stream() -> None:
    streams = FrameStreams()
    with pytest.raises(FailedPrecondition):
        streams.standing("gateway")
    async with contextlib.aclosing(streams.stream("gateway")) as frames:
        await next_of(frames)
        streams.standing("gateway")
    with pytest.raises(FailedPrecondition):
        streams.standing("gateway")


async def test_a_gateway_that_connects_anew_ends_its_former_stream() -> None:
    streams = FrameStreams()
    former, current = streams.stream("gateway"), streams.stream("gateway")
    await next_of(former)
    carrier = streams.standing("gateway")
    await next_of(current)
    with pytest.raises(StopAsyncIteration):
        await next_of(former)
    carrier.add(1, 0, Token(9))  # of a sequence that nobody waits for any more
    streams.standing("gateway").add(1, 0, Token(10))
    streams.flush()
    assert await next_of(current) == [(1, 0, [10])]
    await current.aclose()
