"""Whether a request goes on after a worker failed it, and which workers it had better avoid: a policy without I/O."""

from gateway.router_memory import WorkerStart
from kvrelay.errors import KvrelayError, Unavailable

__all__ = ["Recovery", "broken_from", "leaves_the_ticket"]

# Another can go on, and nobody is to blame: the worker leaves, has no room, or has not noticed yet that it lost the
# gateway which sent it the same request before. An attempt has an id of its own.
_BLAMELESS = frozenset({"WORKER_DRAINING", "EVICTED", "NO_WORKERS", "ALREADY_ON_WORKER"})
# The worker is not there for this request; another, or another start of this one, may be.
_ABSENCES = frozenset({"WORKER_LOST", "STALE_EPOCH", "NO_FRAME_STREAM"})
# The KV cache is not there, or did not come over; it is computed again.
_LOST_CACHES = frozenset({"HANDOVER_ENDED", "TRANSFER_FAILED"})
_FAILURES = _ABSENCES | _LOST_CACHES
FIRST_DELAY_SECONDS = 0.1
LONGEST_DELAY_SECONDS = 1.0


class Recovery:
    """Counts the failures of one request.

    What is wrong with the request itself, or has become of it (a deadline, a cancellation), is not recovered from.

    Args:
        max_failures: with the next one the request ends.

    Attributes:
        avoided: the starts of workers that failed it; another start of the same worker is another chance.
    """

    def __init__(self, max_failures: int) -> None:
        self._max_failures = max_failures
        self._num_failures = 0
        self.avoided: set[WorkerStart] = set()

    def note(self, error: KvrelayError, start: WorkerStart | None) -> None:
        """An attempt ended with this error, by the doing of this worker if one is known.

        Raises:
            KvrelayError: the request does not go on. Unavailable with stage, worker and the number of failures where
                workers failed it too often; else, and if that was said before, the error itself.
        """
        if error.reason not in _FAILURES | _BLAMELESS or self._num_failures > self._max_failures:
            raise error
        if _came_too_late(error):
            return
        if start is not None:
            self.avoided.add(start)
        if error.reason in _FAILURES:
            self._num_failures += 1
            if self._num_failures > self._max_failures:
                raise _given_up(error, self._num_failures) from error

    @property
    def delay(self) -> float:
        """Seconds before the next attempt: none after the first failure, then twice as long each time."""
        if self._num_failures < 2:
            return 0.0
        return min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2.0 ** (self._num_failures - 2))


def leaves_the_ticket(error: KvrelayError) -> bool:
    """Whether a decode worker's error says nothing against the KV cache that it was to take over."""
    return error.reason in _ABSENCES | _BLAMELESS


def _came_too_late(error: KvrelayError) -> bool:
    """Whether a decode worker found that the lease or the ticket had ended, which it can do nothing about."""
    causes = {"TICKET_UNKNOWN", "TICKET_EXPIRED"}
    return error.reason == "TRANSFER_FAILED" and error.metadata.get("cause") in causes


def broken_from(error: KvrelayError) -> str:
    """The worker from which a KV cache did not arrive; empty if the error is of another kind."""
    if error.reason != "TRANSFER_FAILED" or _came_too_late(error):
        return ""
    return error.metadata.get("source", "")


def _given_up(error: KvrelayError, num_failures: int) -> Unavailable:
    stage, worker = (error.metadata.get(key, "unknown") for key in ("stage", "worker"))
    return Unavailable(
        f"{num_failures} attempts failed, the last on {stage} worker {worker}; the request can be sent again",
        reason="WORKER_LOST",
        metadata={"stage": stage, "worker": worker, "cause": error.reason, "failures": str(num_failures)},
        retry_after=1.0,
    )
