"""What stands between gRPC and every handler: parsing, errors, and the count of calls that a drain waits for."""

import asyncio
import contextlib
import functools
import inspect
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from kvrelay import wire
from kvrelay.errors import (
    Internal,
    InvalidArgument,
    KvrelayError,
    ResourceExhausted,
    Unavailable,
    error_for_code,
)
from kvrelay.rpc.channel import STATUS_DETAILS_KEY, is_being_cancelled

__all__ = ["Calls", "Interceptor", "Parser"]

Parser = Callable[[bytes], Message]

# A peer refuses trailers over 8 KiB, and an error travels in them twice: percent-encoded and in base64.
MAX_STATUS_BYTES = 1536
MAX_CLIPPED_CHARACTERS = 200
CLEANUP_SECONDS = 5.0  # what a cancelled handler may take for its `finally`

_log = logging.getLogger(__name__)


class Calls:
    """The calls in progress, and whether new ones may begin.

    Attributes:
        ended: no call may begin or go on.
    """

    def __init__(self, work: Mapping[str, Collection[str] | None]) -> None:
        """Knows for each service, by full name, the methods that a drain refuses and waits for; None means all."""
        self._work = dict(work)
        self._running: dict[asyncio.Task[Any], str] = {}
        self._ending: dict[asyncio.Task[Any], KvrelayError] = {}
        self._refusing = False
        self._fence: KvrelayError | None = None
        self.ended = False

    def begin(self, method: str) -> None:
        """Counts the current task as a call until it has sent its status.

        Raises:
            KvrelayError: Unavailable while draining; that of the fence while there is one.
        """
        if self.ended or (self._refusing and self._is_work(method)):
            raise _draining()
        if self._fence is not None:
            raise self._fence.with_traceback(None)
        task = asyncio.current_task()
        if task is not None and task not in self._running:
            self._running[task] = method
            task.add_done_callback(self._running.pop)

    def _is_work(self, method: str) -> bool:
        _, service, name = method.split("/")
        work = self._work.get(service, ())
        return work is None or name in work

    def refuse_work(self) -> None:
        self._refusing = True

    async def wait_for_work(self) -> None:
        while work := [task for task, method in self._running.items() if self._is_work(method)]:
            await asyncio.wait(work)

    async def end_all(self) -> None:
        """Cancels every call; the handlers clean up, then the interceptor sends the status."""
        self.ended = True
        await self._end_running(_draining())

    async def fence(self, error: KvrelayError) -> None:
        """As `end_all`, with this error and until `unfence`."""
        self._fence = error
        await self._end_running(error)

    def unfence(self) -> None:
        self._fence = None

    async def _end_running(self, error: KvrelayError) -> None:
        running = list(self._running)
        for task in running:
            self._ending[task] = error
            task.add_done_callback(lambda task: self._ending.pop(task, None))
            task.cancel()
        if running:
            await asyncio.wait(running, timeout=CLEANUP_SECONDS)

    def why_ended(self, task: "asyncio.Task[Any] | None") -> KvrelayError | None:
        """What a call was ended with, if it was."""
        return None if task is None else self._ending.get(task)


def _draining() -> Unavailable:
    return Unavailable("the server is shutting down", reason="DRAINING")


class Interceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Parses requests and turns exceptions into statuses, so that no Python text reaches a client.

    Serves all kinds of handlers but stream-unary, which nobody has.

    Args:
        parsers: by method path, what stands in for the handler's own deserializer.
    """

    def __init__(self, calls: Calls, max_message_bytes: int, parsers: Mapping[str, Parser]) -> None:
        self._calls, self._max_message_bytes, self._parsers = calls, max_message_bytes, parsers

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        # Without a deserializer the wrapper gets the bytes, and may answer for what is wrong with them.
        if handler.request_streaming:
            streams = functools.partial(self._stream_stream, method, handler)
            return grpc.stream_stream_rpc_method_handler(streams, None, handler.response_serializer)
        if handler.response_streaming:
            stream = functools.partial(self._unary_stream, method, handler)
            return grpc.unary_stream_rpc_method_handler(stream, None, handler.response_serializer)
        unary = functools.partial(self._unary_unary, method, handler)
        return grpc.unary_unary_rpc_method_handler(unary, None, handler.response_serializer)

    async def _unary_unary(self, method: str, handler: Any, message: bytes, context: Any) -> Any:
        async with self._answering(method, context):
            return await handler.unary_unary(self._parse(method, handler, message), context)

    async def _unary_stream(self, method: str, handler: Any, message: bytes, context: Any) -> None:
        async with self._answering(method, context):
            await _send(handler.unary_stream(self._parse(method, handler, message), context), context)

    async def _stream_stream(self, method: str, handler: Any, messages: AsyncIterator[bytes], context: Any) -> None:
        async with self._answering(method, context):
            requests = (self._parse(method, handler, message) async for message in messages)
            await _send(handler.stream_stream(requests, context), context)

    def _parse(self, method: str, handler: Any, message: bytes) -> Any:
        if len(message) > self._max_message_bytes:
            raise ResourceExhausted(
                f"the message has {len(message)} bytes; the limit is {self._max_message_bytes}",
                reason="MESSAGE_TOO_LARGE",
                metadata={"size": str(len(message)), "limit": str(self._max_message_bytes)},
            )
        try:
            return self._parsers.get(method, handler.request_deserializer)(message)
        except (DecodeError, ValueError):
            problem = "is malformed or has text that is not UTF-8"
            raise InvalidArgument.field("request", problem) from None

    @contextlib.asynccontextmanager
    async def _answering(self, method: str, context: Any) -> AsyncIterator[None]:
        """Answers with the status of what is raised inside."""
        error: KvrelayError
        try:
            self._calls.begin(method)
            yield
            return
        except asyncio.CancelledError as cancelled:
            error = self._error_from_cancellation(method, cancelled)
        except grpc.aio.UsageError as defect:
            error = _incident(method, defect)
        except grpc.aio.BaseError:
            raise  # the status is sent already, or the connection is gone
        except KvrelayError as raised:
            error = raised
        except Exception as defect:
            error = _incident(method, defect)
        await _abort(context, error)

    def _error_from_cancellation(self, method: str, cancelled: asyncio.CancelledError) -> KvrelayError:
        task = asyncio.current_task()
        if (error := self._calls.why_ended(task)) is not None:
            return error
        if is_being_cancelled():
            raise cancelled  # the client left or its deadline passed
        # What the handler waited for was cancelled, not the handler; gRPC would leave the client without an answer.
        return _incident(method, cancelled)


async def _send(responses: Any, context: Any) -> None:
    if inspect.isawaitable(responses):  # the handler writes for itself
        await responses
        return
    # Closing here runs the handler's `finally` when the client leaves, not at some garbage collection.
    async with contextlib.aclosing(responses):
        async for response in responses:
            await context.write(response)


def _incident(method: str, defect: BaseException) -> Internal:
    """Logs a defect under an id and gives the client the id alone."""
    incident = uuid.uuid4().hex
    _log.error("incident %s in %s", incident, method, exc_info=defect)
    return Internal(f"internal error; the server's log describes incident {incident}", metadata={"incident": incident})


async def _abort(context: Any, error: KvrelayError) -> None:
    status = wire.error_to_status(error)
    if status.ByteSize() > MAX_STATUS_BYTES:
        message = error.message[:MAX_CLIPPED_CHARACTERS]
        status = wire.error_to_status(
            error_for_code(error.code)(message, reason=error.reason, retry_after=error.retry_after)
        )
    details = ((STATUS_DETAILS_KEY, status.SerializeToString()),)
    await context.abort(grpc.StatusCode[error.code], status.message, details)
