"""How every process of a cluster begins and ends: its log, and the signals that ask it to stop."""

import asyncio
import gc
import logging
import signal
import sys

__all__ = ["StopRequest", "settle", "start_logging"]


class StopRequest(asyncio.Event):
    """Set by SIGTERM or SIGINT, from the moment of its making on.

    Attributes:
        interrupted: it was SIGINT.
    """

    def __init__(self) -> None:
        super().__init__()
        self.interrupted = False
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.set)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)

    def _interrupt(self) -> None:
        self.interrupted = True
        self.set()


def start_logging(level: str) -> None:
    """One line an entry, to stderr."""
    form = "%(asctime)s %(levelname).1s %(name)s: %(message)s"
    logging.basicConfig(level=level.upper(), format=form, stream=sys.stderr)
    logging.getLogger("grpc").setLevel(logging.WARNING)


def settle() -> None:
    """To be called when a process has started: what exists now stays, so the garbage collector need not look again.

    With torch loaded a full collection takes a good part of a second, in which no token would be made or sent.
    """
    gc.collect()
    gc.freeze()
