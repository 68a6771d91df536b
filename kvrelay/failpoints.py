"""Failpoints: named places where a test makes this process die, freeze, fail, wait, or spoil a block.

They are inert unless KVRELAY_FAILPOINTS arms them: `pull.after_blocks=kill@3;release.before=delay:0.5`. An action
is done at the n-th time that the place is reached, if `@n` says so, else each time. With `@/a/file` in place of the
text, the file has it, and may change while the process runs; times are then counted from the change.

    kill            SIGKILL to this process
    stop            SIGSTOP to this process, until somebody sends SIGCONT
    raise           InjectedFault
    delay:SECONDS   waits
    flip            flips a byte; where a place has none to offer, nothing happens
"""

import asyncio
import logging
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvrelay.errors import ConfigurationError

__all__ = ["ACTIONS", "POINTS", "VARIABLE", "Failpoint", "InjectedFault", "arm", "flip", "parse", "reach", "reach_now"]

log = logging.getLogger(__name__)

VARIABLE = "KVRELAY_FAILPOINTS"
ACTIONS = ("kill", "stop", "raise", "delay", "flip")

# In the order of a request's way.
POINTS = {
    "prefill.admitted": "prefill worker: the blocks are reserved and the ticket is signed, which is not sent yet",
    "prefill.chunk": "prefill worker: a chunk of the prompt is computed, and not the last",
    "prefill.last_chunk": "prefill worker: all but the last chunk is computed, which is not told yet, if it is to be",
    "prefill.first_token": "prefill worker: the prompt is done, and the first token is not sent yet",
    "decode.received": "decode worker: the call has come, and no block is reserved",
    "decode.reserved": "decode worker: the blocks are reserved, and nothing is pulled",
    "transfer.before_pull": "decode worker: the link stands, and the pull is not sent",
    "pull.before_blocks": "prefill worker: a run of blocks is final, and not read",
    "pull.after_blocks": "prefill worker: a run of blocks was sent",
    "transfer.received": "decode worker: a run of blocks lies in the own pool, and is not verified; its bytes can flip",
    "transfer.verified": "decode worker: a run of blocks is verified",
    "transfer.before_release": "decode worker: all blocks are here, and Release is not sent",
    "release.before": "prefill worker: Release has come, and the lease has not ended",
    "release.after": "prefill worker: the lease has ended, and Release is not answered",
    "transfer.after_release": "decode worker: Release was answered, and the sequence is not adopted",
    "decode.adopted": "decode worker: the sequence is to join the batch",
    "decode.frame": "decode worker: a frame with tokens was sent",
}

_RULE = re.compile(r"(?P<point>[^=]+)=(?P<action>[a-z]+)(:(?P<seconds>\d+(\.\d+)?))?(@(?P<at>[1-9]\d*))?")


class InjectedFault(Exception):
    """What the action `raise` raises: a defect that nobody expects."""


@dataclass(frozen=True, slots=True)
class Failpoint:
    """What happens at a place.

    Attributes:
        seconds: of a delay.
        at: the how many-th time that the place is reached; 0 means each.
    """

    point: str
    action: str
    seconds: float = 0.0
    at: int = 0

    def __str__(self) -> str:
        seconds = f":{self.seconds:g}" if self.action == "delay" else ""
        return f"{self.point}={self.action}{seconds}" + (f"@{self.at}" if self.at else "")


def parse(text: str) -> list[Failpoint]:
    """The failpoints of a text as the module's description has it.

    Raises:
        ConfigurationError: naming what is wrong and the valid names.
    """
    return [_parse_one(part.strip()) for part in text.split(";") if part.strip()]


def _parse_one(text: str) -> Failpoint:
    match = _RULE.fullmatch(text)
    if match is None:
        raise ConfigurationError(f"{VARIABLE}: {text!r} is not POINT=ACTION, POINT=delay:SECONDS or POINT=ACTION@N")
    point, action, seconds = match["point"], match["action"], match["seconds"]
    if point not in POINTS:
        raise ConfigurationError(f"{VARIABLE}: {point!r} is no failpoint; valid are {', '.join(POINTS)}")
    if action not in ACTIONS:
        raise ConfigurationError(f"{VARIABLE}: {action!r} is no action; valid are {', '.join(ACTIONS)}")
    if (action == "delay") != (seconds is not None):
        raise ConfigurationError(f"{VARIABLE}: {text!r}: delay takes seconds, and no other action does")
    return Failpoint(point, action, float(seconds or 0.0), int(match["at"] or 0))


class _Armed:
    """The failpoints in force, and how often each place has been reached."""

    def __init__(self, text: str) -> None:
        self._file = Path(text[1:]) if text.startswith("@") else None
        self._version: tuple[int, int] | None = None
        self._failpoints = [] if self._file else parse(text)
        self._reached: Counter[str] = Counter()
        self._look()

    def due(self, point: str) -> Failpoint | None:
        """The place is reached: what is to happen now, if anything."""
        self._look()
        self._reached[point] += 1
        times = self._reached[point]
        found = next((each for each in self._failpoints if each.point == point and each.at in (0, times)), None)
        if found is not None:
            log.warning("failpoint %s", found)
        return found

    def _look(self) -> None:
        if self._file is None:
            return
        try:
            found = self._file.stat()
        except FileNotFoundError:
            version, text = None, ""
        else:
            version = (found.st_mtime_ns, found.st_ino)
            text = self._file.read_text(encoding="utf-8") if version != self._version else ""
        if version != self._version:
            self._failpoints, self._version, self._reached = parse(text), version, Counter()


_armed: _Armed | None = None


def arm(text: str) -> None:
    """Puts the failpoints of a text in force; an empty text none.

    Raises:
        ConfigurationError: as `parse`.
    """
    global _armed
    _armed = _Armed(text) if text else None


async def reach(point: str) -> None:
    """A coroutine has come to a place. Raises: InjectedFault."""
    if _armed is not None and (due := _armed.due(point)) is not None:
        if due.action == "delay":
            await asyncio.sleep(due.seconds)
        else:
            _do(due)


def reach_now(point: str) -> None:
    """As `reach`, where nobody can wait: a delay holds the whole thread up."""
    if _armed is not None and (due := _armed.due(point)) is not None:
        _do(due)


async def flip(point: str, view: Callable[[], memoryview]) -> None:
    """As `reach`, at a place that has bytes; `view` gives them, writable."""
    if _armed is not None and (due := _armed.due(point)) is not None:
        if due.action == "flip":
            data = view()
            data[len(data) // 2 | 3] ^= 0x40  # of a number's exponent, so that whoever reads it gets something else
        elif due.action == "delay":
            await asyncio.sleep(due.seconds)
        else:
            _do(due)


def _do(due: Failpoint) -> None:
    match due.action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "delay":
            time.sleep(due.seconds)
        case "raise":
            raise InjectedFault(f"injected at {due.point}")
