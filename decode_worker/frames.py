"""One stream of frames per gateway: the new tokens of all its sequences, a frame per engine step at most."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from kvrelay import failpoints, wire
from kvrelay.errors import FailedPrecondition
from kvrelay.request import Token
from kvrelay.v1 import worker_pb2

__all__ = ["FrameStream", "FrameStreams"]


class FrameStreams:
    """The streams that stand, one per gateway.

    A gateway that connects anew replaces its former stream. Belongs to one event loop.
    """

    def __init__(self) -> None:
        self._streams: dict[str, FrameStream] = {}

    def standing(self, gateway_id: str) -> "FrameStream":
        """The gateway's stream. Raises: FailedPrecondition, reason NO_FRAME_STREAM, if it reads no frames here."""
        stream = self._streams.get(gateway_id)
        if stream is None:
            raise _no_stream()
        return stream

    def flush(self) -> None:
        """The step is over."""
        for stream in self._streams.values():
            stream.flush()

    async def stream(self, gateway_id: str) -> AsyncGenerator[worker_pb2.StreamFramesResponse, None]:
        """The gateway's frames until it leaves; an empty one at once says that the stream stands."""
        former = self._streams.get(gateway_id)
        if former is not None:
            former.end()
        stream = self._streams[gateway_id] = FrameStream()
        try:
            yield worker_pb2.StreamFramesResponse()
            while (frame := await stream.next()) is not None:
                yield frame
                await failpoints.reach("decode.frame")
        finally:
            stream.end()
            if self._streams.get(gateway_id) is stream:
                del self._streams[gateway_id]


class FrameStream:
    """Collects tokens during a step, and wakes its reader after it.

    What a gateway does not read yet grows into one larger frame, so a slow gateway costs no more than its tokens.
    A sequence has its tokens in one stream or nowhere: of two streams to one gateway the former may belong to a
    connection that the gateway has given up, with handles that mean other sequences on the new one.
    """

    def __init__(self) -> None:
        self._pending: dict[int, worker_pb2.SequenceTokens] = {}
        self._frame = worker_pb2.StreamFramesResponse()
        self._ready = asyncio.Event()
        self._calls: set[asyncio.Task[Any]] = set()
        self._ended = False

    @contextlib.contextmanager
    def carrying(self) -> Iterator[None]:
        """Inside, the end of the stream ends what the current task waits for.

        Raises:
            FailedPrecondition: reason NO_FRAME_STREAM; the stream ended.
        """
        task = asyncio.current_task()
        assert task is not None
        self._calls.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self._ended or task.uncancel() > 0:
                raise
            raise _no_stream() from None
        finally:
            self._calls.discard(task)

    def add(self, handle: int, index: int, token: Token, local_prompt: worker_pb2.LocalPrompt | None = None) -> None:
        """A token for the frame of this step.

        Args:
            local_prompt: with the first token of a sequence whose prompt was computed here.
        """
        tokens = self._pending.get(handle)
        # A recomputed sequence may begin again at a lower index.
        if tokens is None or tokens.first_index + len(tokens.token_ids) != index:
            tokens = self._pending[handle] = self._frame.sequences.add(handle=handle, first_index=index)
        tokens.token_ids.append(token.token_id)
        if token.logprobs is not None:
            tokens.logprobs.append(wire.logprobs_to_proto(token.logprobs))
        if local_prompt is not None:
            tokens.local_prompt.CopyFrom(local_prompt)

    def flush(self) -> None:
        if self._pending:
            self._ready.set()

    def end(self) -> None:
        """Ends the calls that it carries, too."""
        if not self._ended:
            self._ended = True
            self._ready.set()
            for task in self._calls:
                task.cancel()

    async def next(self) -> worker_pb2.StreamFramesResponse | None:
        """The next frame; None after the end."""
        await self._ready.wait()
        if self._ended:
            return None
        self._ready.clear()
        frame, self._frame, self._pending = self._frame, worker_pb2.StreamFramesResponse(), {}
        return frame


def _no_stream() -> FailedPrecondition:
    return FailedPrecondition("this gateway has no stream of frames here", reason="NO_FRAME_STREAM")
