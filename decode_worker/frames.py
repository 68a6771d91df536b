"""One stream of frames per gateway: the new tokens of all its sequences, a frame per engine step at most."""

import asyncio
from collections.abc import AsyncIterator

from kvrelay import failpoints, wire
from kvrelay.errors import FailedPrecondition
from kvrelay.request import Token
from kvrelay.v1 import worker_pb2

__all__ = ["FrameStreams"]


class FrameStreams:
    """Collects tokens during a step and wakes the streams after it.

    What a gateway does not read yet grows into one larger frame, so a slow gateway costs no more than its tokens. A
    gateway that connects anew replaces its former stream. Belongs to one event loop.
    """

    def __init__(self) -> None:
        self._streams: dict[str, _Stream] = {}

    def check(self, gateway_id: str) -> None:
        """Raises: FailedPrecondition if the gateway reads no frames, so tokens for it would be lost."""
        if gateway_id not in self._streams:
            raise FailedPrecondition("this gateway has no stream of frames here", reason="NO_FRAME_STREAM")

    def add(
        self,
        gateway_id: str,
        handle: int,
        index: int,
        token: Token,
        local_prompt: worker_pb2.LocalPrompt | None = None,
    ) -> None:
        """A token for the frame of this step. Passed over if the gateway has left.

        Args:
            local_prompt: with the first token of a sequence whose prompt was computed here.
        """
        stream = self._streams.get(gateway_id)
        if stream is not None:
            stream.add(handle, index, token, local_prompt)

    def flush(self) -> None:
        """The step is over."""
        for stream in self._streams.values():
            stream.flush()

    async def stream(self, gateway_id: str) -> AsyncIterator[worker_pb2.StreamFramesResponse]:
        """The gateway's frames until it leaves; an empty one at once says that the stream stands."""
        former = self._streams.get(gateway_id)
        if former is not None:
            former.close()
        stream = self._streams[gateway_id] = _Stream()
        try:
            yield worker_pb2.StreamFramesResponse()
            while (frame := await stream.next()) is not None:
                yield frame
                await failpoints.reach("decode.frame")
        finally:
            if self._streams.get(gateway_id) is stream:
                del self._streams[gateway_id]


class _Stream:
    def __init__(self) -> None:
        self._pending: dict[int, worker_pb2.SequenceTokens] = {}
        self._frame = worker_pb2.StreamFramesResponse()
        self._ready = asyncio.Event()
        self._closed = False

    def add(self, handle: int, index: int, token: Token, local_prompt: worker_pb2.LocalPrompt | None) -> None:
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

    def close(self) -> None:
        self._closed = True
        self._ready.set()

    async def next(self) -> worker_pb2.StreamFramesResponse | None:
        await self._ready.wait()
        if self._closed:
            return None
        self._ready.clear()
        frame, self._frame, self._pending = self._frame, worker_pb2.StreamFramesResponse(), {}
        return frame
