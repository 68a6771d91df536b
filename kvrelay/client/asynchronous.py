"""The client for asyncio."""

import asyncio
import contextlib
from collections.abc import Generator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

import grpc
import grpc.aio

from kvrelay import rpc, wire
from kvrelay.client.shared import (
    HELD_BLOCKS,
    LIST_MODELS,
    STATUS,
    BaseClient,
    Completion,
    GenerateOptions,
    UnaryCall,
    abort,
    completion,
    generate_request,
)
from kvrelay.errors import Unavailable
from kvrelay.request import Chunk, ClusterStatus, HeldBlocks, Model
from kvrelay.v1.inference_pb2_grpc import InferenceServiceStub

if TYPE_CHECKING:
    from kvrelay.v1.inference_pb2_grpc import InferenceServiceAsyncStub

__all__ = ["AsyncClient", "AsyncStream"]

_Response = TypeVar("_Response")


class AsyncStream:
    """The chunks of one request as they come. Closing it, or dropping it before its end, cancels the request.

    Attributes:
        request_id: as sent, so that another task may abort by it.
    """

    def __init__(self, call: Any, request_id: str) -> None:
        self._call = call
        self._closed = False
        self._has_all = False
        self._loop = asyncio.get_running_loop()
        self.request_id = request_id

    def __await__(self) -> Generator[None, None, Self]:
        """Gives the stream itself: `async for chunk in await client.generate(...)` reads as well without the await."""
        yield from ()
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        """Raises `kvrelay.errors`; StopAsyncIteration after the last chunk and once the stream is closed."""
        if self._closed:
            raise StopAsyncIteration
        try:
            with rpc.translated():
                response = await self._call.read()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():  # by another task, while this one waited
                raise StopAsyncIteration from None
            raise
        except Unavailable:
            if self._has_all:  # the connection broke, but nothing is missing
                raise StopAsyncIteration from None
            raise
        if response is grpc.aio.EOF:  # type: ignore[attr-defined]  # missing in its stubs
            self._closed = True
            raise StopAsyncIteration
        chunk = wire.chunk_from_proto(response)
        self._has_all = chunk.finish_reason is not None
        return chunk

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        # Garbage may be collected by any thread, and after the loop has closed.
        if not self._closed:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._call.cancel)

    async def close(self) -> None:
        """Cancels the request if it still runs."""
        self._closed = True
        self._call.cancel()


class AsyncClient(BaseClient):
    """As `Client`, for one event loop."""

    def __init__(self, target: str | None = None, *, timeout: float | None = None) -> None:
        super().__init__(target, timeout=timeout)
        self._channel: grpc.aio.Channel | None = None

    @property
    def _stub(self) -> "InferenceServiceAsyncStub":
        # Opened with the first call: a channel belongs to the event loop that is running then.
        if self._channel is None:
            self._channel = rpc.open_channel(self.target)
        return InferenceServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what runs, and disconnects."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close(None)

    def generate(
        self,
        prompt: str | None = None,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> "AsyncStream":
        """As `Client.generate`, for `async for`."""
        request = generate_request(prompt, **options)
        settings = self._call_settings(timeout, metadata)
        return AsyncStream(self._stub.Generate(request, **settings), request.request_id)

    async def complete(
        self,
        prompt: str | None = None,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """As `Client.complete`."""
        async with self.generate(prompt, timeout=timeout, metadata=metadata, **options) as stream:
            return completion([chunk async for chunk in stream])

    async def abort(self, request_id: str) -> None:
        """As `Client.abort`."""
        await self._run(abort(request_id))

    async def list_models(self) -> tuple[Model, ...]:
        """As `Client.list_models`."""
        return await self._run(LIST_MODELS)

    async def status(self) -> ClusterStatus:
        """As `Client.status`."""
        return await self._run(STATUS)

    async def held_blocks(self) -> tuple[HeldBlocks, ...]:
        """As `Client.held_blocks`."""
        return await self._run(HELD_BLOCKS)

    async def _run(self, call: UnaryCall[_Response]) -> _Response:
        settings = self._call_settings()
        with rpc.translated():
            return call.parse(await getattr(self._stub, call.method)(call.request, **settings))
