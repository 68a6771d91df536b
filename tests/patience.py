"""How long tests wait for what should come at once, and how they wait for what nobody announces."""

import asyncio
import inspect
import time
from collections.abc import Callable

__all__ = ["SOON", "eventually", "until"]

# Seconds after which a test gives up; so many that no other load of the machine makes it wrong.
SOON = 60.0
HOLDS = "the condition holds"


def eventually(
    condition: Callable[[], object],
    seconds: float = SOON,
    what: str | Callable[[], str] = HOLDS,
    *,
    pause: float = 0.02,
) -> None:
    """Waits until the condition holds; `until` does in an event loop.

    Args:
        what: is to hold; if it says more when it is asked then, it is a function.
        pause: between two looks.

    Raises:
        AssertionError: it did not hold in time.
    """
    __tracebackhide__ = True
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(_too_late(seconds, what))
        time.sleep(pause)


async def until(
    condition: Callable[[], object],
    seconds: float = SOON,
    what: str | Callable[[], str] = HOLDS,
    *,
    pause: float = 0.005,
) -> None:
    """As `eventually`; the condition may be a coroutine function."""
    __tracebackhide__ = True
    deadline = time.monotonic() + seconds
    while not await _answer(condition):
        if time.monotonic() > deadline:
            raise AssertionError(_too_late(seconds, what))
        await asyncio.sleep(pause)


async def _answer(condition: Callable[[], object]) -> object:
    answer = condition()
    return await answer if inspect.isawaitable(answer) else answer


def _too_late(seconds: float, what: str | Callable[[], str]) -> str:
    return f"not within {seconds:g} s: {what() if callable(what) else what}"
