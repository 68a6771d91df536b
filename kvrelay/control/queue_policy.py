"""Who is next, and when to come back: the queue's policy, without I/O or a clock of its own."""

from collections.abc import Sequence

__all__ = ["rank", "retry_after"]

_LOWEST_PRIORITY, _HIGHEST_PRIORITY = -(1 << 31), (1 << 31) - 1
_LATEST_MS = (1 << 48) - 1
_LATEST_US = (1 << 56) - 1
_SHORTEST_RETRY, _USUAL_RETRY, _LONGEST_RETRY = 0.1, 1.0, 30.0


def rank(priority: int, deadline_unix: float | None, now: float) -> str:
    """A text that sorts before another if the request comes first: higher priority, earlier deadline, earlier arrival.

    All ranks have the same length. A request without a deadline comes after all that have one.

    Args:
        priority: clamped to 32 bits with sign.
        deadline_unix: seconds of Unix time.
        now: its arrival, in seconds of Unix time.
    """
    urgency = _HIGHEST_PRIORITY - min(max(priority, _LOWEST_PRIORITY), _HIGHEST_PRIORITY)
    deadline = _LATEST_MS if deadline_unix is None else int(min(max(deadline_unix * 1000, 0), _LATEST_MS - 1))
    arrival = int(min(max(now * 1_000_000, 0), _LATEST_US))
    return f"{urgency:08x}{deadline:012x}{arrival:014x}"


def retry_after(finishes: Sequence[float], now: float) -> float:
    """Seconds until a place in a full queue can be expected: the mean time between the last finishes.

    Args:
        finishes: times of the last finishes in seconds, newest first.
        now: on the same clock. The time since the newest counts too, so a queue that stands still says so.
    """
    if not finishes:
        return _USUAL_RETRY
    return min(max((now - finishes[-1]) / len(finishes), _SHORTEST_RETRY), _LONGEST_RETRY)
