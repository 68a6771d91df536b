"""The processes of a cluster that can be killed, stopped and asked to end, and are there again afterwards."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from redis import Redis

from kvrelay.control.private_redis import PrivateRedis
from kvrelay.failpoints import VARIABLE
from tests.e2e.processes import clean_environment
from tests.stopping import is_stopped

__all__ = ["Member", "Process", "RedisServer"]

# A function to run in the child would need a fork, which may hang where gRPC has threads.
DIE_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")
_MET = re.compile(rb"failpoint ([a-z_.]+)=")


class Member:
    """One process of the cluster, under all of its process ids.

    Attributes:
        away_seconds: after which it is started again when it has ended, and goes on when it was stopped.
        exit_codes: of the starts that have ended, but for the last.
    """

    def __init__(self) -> None:
        self.away_seconds = 0.0
        self.exit_codes: list[int] = []
        self._away_since: float | None = None

    @property
    def pid(self) -> int:
        """0 before the first start."""
        raise NotImplementedError

    @property
    def alive(self) -> bool:
        raise NotImplementedError

    def start(self) -> None:
        raise NotImplementedError

    def end(self) -> None:
        """Whatever it does; it is not there any more afterwards."""
        raise NotImplementedError

    @property
    def frozen(self) -> bool:
        return is_stopped(self.pid)

    def signal(self, number: int) -> None:
        if self.alive:
            os.kill(self.pid, number)

    def look_after(self) -> None:
        """To be called often: brings it back when it has been away for long enough."""
        if self.alive and not self.frozen:
            self._away_since = None
            return
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
        if now - self._away_since >= self.away_seconds:
            self._away_since = None
            self.signal(signal.SIGCONT)
            if not self.alive:
                self.start()


@dataclass(eq=False)
class Process(Member):
    """A kvrelay process, with a file of failpoints and a log."""

    name: str
    arguments: list[str]
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    popen: "subprocess.Popen[bytes] | None" = None

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def failpoints(self) -> Path:
        return self.folder / f"{self.name}.failpoints"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def pid(self) -> int:
        return 0 if self.popen is None else self.popen.pid

    @property
    def alive(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    def start(self, place: Callable[..., list[str]] = lambda *command: list(command)) -> None:
        """Starts it; `place` makes the command that runs a command where it belongs."""
        self.arm("")  # else the next start would meet what ended this one
        if self.popen is not None:
            self.exit_codes.append(self.popen.wait())
        environment = clean_environment(
            **{VARIABLE: f"@{self.failpoints}", "GRPC_VERBOSITY": "NONE"}, **self.environment
        )
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [*DIE_WITH_PARENT, *place(sys.executable, "-m", "kvrelay", *self.arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )

    def arm(self, text: str) -> None:
        """Puts failpoints in force, in a running process too."""
        new = self.failpoints.with_suffix(".new")
        new.write_text(text)
        new.replace(self.failpoints)

    def met(self) -> Counter[str]:
        """Failpoints that have been met since the first start, and how often."""
        log = self.log.read_bytes() if self.log.exists() else b""
        return Counter(point.decode() for point in _MET.findall(log))

    def num_fired(self) -> int:
        """As `met`, of all failpoints together."""
        return self.met().total()

    def end(self) -> None:
        if self.popen is not None:
            self.popen.kill()
            self.popen.wait()


class RedisServer(Member):
    """The cluster's Redis, on one address through all of its starts, each of which finds it empty."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._server = PrivateRedis(folder)
        self.socket = folder / "redis.sock"

    @property
    def pid(self) -> int:
        return self._server.pid or 0

    @property
    def alive(self) -> bool:
        return self._server.alive

    def start(self) -> None:
        self._server.start()

    def wipe(self) -> None:
        with Redis(unix_socket_path=str(self.socket)) as redis:
            redis.flushall()

    def end(self) -> None:
        self.signal(signal.SIGCONT)  # one that is stopped would not hear that it is to end
        self._server.stop()
