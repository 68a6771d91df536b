"""Record locks on bytes of a file, which the kernel frees when their holder dies. Linux only.

Two kinds, because each can do what the other cannot. A lock of an open file belongs to the descriptor, so that a
process may close other descriptors of the file; it says of no lock whose it is. A lock of a process says that, and is
lost when the process closes any descriptor of the file.
"""

import fcntl
import logging
import os
import signal
import struct
import time
from collections.abc import Callable

import numpy
from numpy.typing import NDArray

__all__ = ["Mutex", "is_locked", "lock", "try_lock", "unlock"]

log = logging.getLogger(__name__)

# `struct flock`: type, whence, start, length, pid.
_FLOCK = struct.Struct("@hhqqi0q")
LONGEST_NAP_SECONDS = 0.001


def lock(fd: int, byte: int) -> None:
    """Locks a byte for this open file; waits for it."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, _request(fcntl.F_WRLCK, byte))


def try_lock(fd: int, byte: int) -> bool:
    """Locks a byte for this open file, if no other open file has it."""
    return _try(fd, fcntl.F_OFD_SETLK, byte)


def unlock(fd: int, byte: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _request(fcntl.F_UNLCK, byte))


def is_locked(fd: int, byte: int) -> bool:
    """Whether another open file has the byte."""
    return bool(_conflicting(fd, fcntl.F_OFD_GETLK, byte)[0] != fcntl.F_UNLCK)


class Mutex:
    """Lets one process after the other at what they share. May be entered again by who is inside.

    Who dies or fails inside leaves what it was changing half changed, and the next one to enter is told. Who stands
    still inside keeps all others waiting, so whoever has waited for `patience` seconds kills it.

    For one thread of each process, and while the process closes no other descriptor of the file.

    Args:
        fd: of the file, whose byte `byte` is the lock.
        words: two integers that the processes share, at first 0: whether somebody is inside, and how many have been.
        arrive: called by who has entered, with whether the one before did not come out.
    """

    def __init__(
        self, fd: int, byte: int, words: NDArray[numpy.int64], arrive: Callable[[bool], None], patience: float
    ) -> None:
        self._fd = fd
        self._byte = byte
        self._words = words
        self._arrive = arrive
        self._patience = patience
        self._depth = 0

    def __enter__(self) -> None:
        if self._depth == 0:
            self._acquire()
            is_torn = bool(self._words[0])
            self._words[0] = 1
            self._words[1] += 1
            self._depth = 1
            self._arrive(is_torn)
        else:
            self._depth += 1

    def __exit__(self, failure: type[BaseException] | None, *details: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            if failure is None:
                self._words[0] = 0
            fcntl.fcntl(self._fd, fcntl.F_SETLK, _request(fcntl.F_UNLCK, self._byte))

    def _acquire(self) -> None:
        nap, seen, since = 20e-6, (0, 0), time.monotonic()
        while not _try(self._fd, fcntl.F_SETLK, self._byte):
            inside = (self._holder(), int(self._words[1]))
            if inside != seen:
                seen, since = inside, time.monotonic()
            elif time.monotonic() - since > self._patience:
                self._kill(*inside)
                since = time.monotonic()
            time.sleep(nap)
            nap = min(2 * nap, LONGEST_NAP_SECONDS)

    def _holder(self) -> int:
        """The process inside; 0 if there is none, or none that this one could name."""
        kind, _, _, _, pid = _conflicting(self._fd, fcntl.F_GETLK, self._byte)
        return 0 if kind == fcntl.F_UNLCK else max(0, pid)

    def _kill(self, pid: int, num_entries: int) -> None:
        if pid == 0:
            return
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            # Asked again with the process in hand, whose id cannot come to mean another one now.
            if (self._holder(), int(self._words[1])) == (pid, num_entries):
                log.warning("process %d stands still with a lock that others wait for; killing it", pid)
                signal.pidfd_send_signal(process, signal.SIGKILL)
        finally:
            os.close(process)


def _try(fd: int, command: int, byte: int) -> bool:
    try:
        fcntl.fcntl(fd, command, _request(fcntl.F_WRLCK, byte))
    except (BlockingIOError, PermissionError):
        return False
    return True


def _conflicting(fd: int, command: int, byte: int) -> tuple[int, int, int, int, int]:
    """The `struct flock` of a lock that keeps this one from the byte; its type is F_UNLCK if there is none."""
    kind, whence, start, length, pid = _FLOCK.unpack(fcntl.fcntl(fd, command, _request(fcntl.F_WRLCK, byte)))
    return kind, whence, start, length, pid


def _request(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
