"""The requests that this gateway runs or has run: which id is whose, and who still wants it."""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from gateway.pacing import Pacer
from gateway.response_log import ResponseHistory, ResponseLog
from gateway.validation import GenerateCall
from kvrelay.errors import AlreadyExists, FailedPrecondition, Internal, NotFound
from kvrelay.request import FinishReason, Timings, Usage

__all__ = ["CancelHandle", "Requests"]

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class CancelHandle:
    """How a request is ended from outside. Aborted is ended well, by the client's word; else nobody reads it."""

    aborted: bool = False
    task: "asyncio.Task[None] | None" = None

    def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()


Run = Callable[[GenerateCall, ResponseLog, CancelHandle], Coroutine[Any, Any, None]]


class Requests:
    """Runs each request once, in a task that lives until its end, an abort, or the leaving of its last reader.

    Args:
        history: what can be resumed.
        pacer: says when the responses of all requests go out.
    """

    def __init__(self, history: ResponseHistory, pacer: Pacer | None = None) -> None:
        self._history = history
        self._pacer = pacer
        self._handles: dict[str, CancelHandle] = {}

    def find(self, call: GenerateCall) -> ResponseLog | None:
        """The log of the request that has this id already.

        Raises:
            AlreadyExists: it was another request.
            FailedPrecondition: the client wants to go on reading what is not held any more.
        """
        entry = self._history.get(call.request_id, time.monotonic())
        if entry is not None and entry.body_digest != call.body_digest:
            raise AlreadyExists(
                f"request_id: {call.request_id} was used for another request", reason="REQUEST_ID_REUSED"
            )
        if entry is None and call.resume_after_seq:
            raise FailedPrecondition(
                f"resume_after_seq: the responses of request {call.request_id} are not held here (any more)",
                reason="RESPONSES_NOT_HELD",
            )
        return None if entry is None else entry.log

    def begin(self, call: GenerateCall, run: Run) -> ResponseLog:
        """Starts a new request."""
        handle = CancelHandle()
        log = ResponseLog(call.request_id, handle.cancel, self._pacer)
        handle.task = asyncio.create_task(run(call, log, handle), name=f"request {call.request_id}")
        handle.task.add_done_callback(lambda task: self._ended(call.request_id, log, handle, task))
        self._handles[call.request_id] = handle
        self._history.add(call.request_id, call.body_digest, log)
        return log

    def abort(self, request_id: str) -> None:
        """Ends a request; one that has ended already stays as it is.

        Raises:
            NotFound: the id is not known.
        """
        if self._history.get(request_id, time.monotonic()) is None:
            raise NotFound(f"request_id: no request {request_id} is known", reason="REQUEST_NOT_FOUND")
        handle = self._handles.get(request_id)
        if handle is not None:
            handle.aborted = True
            handle.cancel()

    def _ended(self, request_id: str, log: ResponseLog, handle: CancelHandle, task: "asyncio.Task[None]") -> None:
        del self._handles[request_id]
        if handle.aborted:  # possibly before the task began, which then has written no end
            log.finish(FinishReason.ABORT, Usage(), Timings())
        else:
            log.fail(Internal("the gateway failed to run the request"))
        if log.failed:
            # There is nothing to replay, and the same id may try again.
            self._history.remove(request_id)
        else:
            self._history.ended(request_id, time.monotonic())
        if not task.cancelled() and task.exception() is not None:
            logger.error("request %s met a defect", request_id, exc_info=task.exception())
