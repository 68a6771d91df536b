"""When responses go out: at once while there are few of them, in waves while there are many.

Each response costs the gateway a gRPC message, whether it brings one token or ten. docs/performance.md has the CPU time
that this comes to. So there is a budget of responses per second for all streams together. Within it, every token goes
out as it comes: one stream, or a few, notice nothing. Beyond it, the responses of all streams go out together in waves,
each as long after the last as that one has used up of the budget, and a response brings all the tokens of its stream
since then.

The first token of a request and its end wait for nobody, so the time to first token and the total are not affected.
Between them a token waits for the next wave, at most `streams / responses_per_second` and never over LONGEST_PAUSE:
the time from one response to the next grows to that, the number of tokens a second stays.
"""

import asyncio

__all__ = ["LONGEST_PAUSE", "Pacer"]

LONGEST_PAUSE = 0.2  # seconds


class Pacer:
    """Wakes the readers of many response logs, in waves. Belongs to one event loop.

    Args:
        responses_per_second: the budget; may be infinite.
    """

    def __init__(self, responses_per_second: float) -> None:
        self._seconds_per_response = 1 / responses_per_second
        self._waiting: set[asyncio.Event] = set()
        self._next_wave = 0.0
        self._wave: asyncio.Handle | None = None

    def set_in_turn(self, event: asyncio.Event) -> None:
        """Sets the event with the next wave."""
        self._waiting.add(event)
        if self._wave is None:
            loop = asyncio.get_running_loop()
            # Never before this callback ends: the other streams' tokens, of the same frame, belong to the same wave.
            if loop.time() >= self._next_wave:
                self._wave = loop.call_soon(self._send_wave)
            else:
                self._wave = loop.call_at(self._next_wave, self._send_wave)

    def _send_wave(self) -> None:
        self._wave = None
        wave, self._waiting = self._waiting, set()
        pause = min(LONGEST_PAUSE, len(wave) * self._seconds_per_response)
        self._next_wave = asyncio.get_running_loop().time() + pause
        for event in wave:
            event.set()
