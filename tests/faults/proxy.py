"""A TCP proxy that delays, stalls, cuts and spoils what passes, for each pair of processes on its own."""

import asyncio
import contextlib
import enum
from collections.abc import Callable, Iterable
from pathlib import Path

__all__ = ["Direction", "Link", "Proxy"]

CHUNK_BYTES = 1 << 16
# Of smaller pieces hardly any byte is a block's.
MIN_SPOILED_BYTES = 512
NUM_SPOILED_BYTES = 4  # one of which is a number's exponent, so that whoever reads it gets something else


class Direction(enum.Enum):
    TO_SERVER = "to server"
    TO_CLIENT = "to client"


class Link:
    """What passes between one client and one server, and what is to become of it.

    Attributes:
        delay: seconds that each piece is held back.
        stalled: directions in which nothing passes; it is kept, as by a network that loses and a TCP that sends again.
        refuses: new connections are closed at once.
        num_flips: pieces of which a few bits are still to flip.
        num_struck: connections and pieces that were cut, held back or spoiled.
    """

    def __init__(self) -> None:
        self.delay = 0.0
        self.stalled: frozenset[Direction] = frozenset()
        self.refuses = False
        self.num_flips = 0
        self.num_struck = 0
        self._connections: set[asyncio.StreamWriter] = set()
        self._healed = asyncio.Event()

    def cut(self) -> None:
        """Resets all connections."""
        for writer in self._connections:
            self.num_struck += 1
            writer.transport.abort()

    def heal(self) -> None:
        """From now on everything passes."""
        self.delay, self.stalled, self.refuses, self.num_flips = 0.0, frozenset(), False, 0
        self._healed.set()
        self._healed = asyncio.Event()

    async def carry(self, *ends: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        """Both directions of a connection from client to server, until either side ends."""
        (from_client, to_client), (from_server, to_server) = ends
        self._connections |= {to_client, to_server}
        pumps = [
            asyncio.create_task(self._pump(from_client, to_server, Direction.TO_SERVER)),
            asyncio.create_task(self._pump(from_server, to_client, Direction.TO_CLIENT)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._connections -= {to_client, to_server}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                if self.delay:
                    self.num_struck += 1
                    await asyncio.sleep(self.delay)
                while direction in self.stalled:
                    self.num_struck += 1
                    await self._healed.wait()
                writer.write(self._spoiled(data, direction))
                await writer.drain()

    def _spoiled(self, data: bytes, direction: Direction) -> bytes:
        if self.num_flips == 0 or direction is not Direction.TO_CLIENT or len(data) < MIN_SPOILED_BYTES:
            return data
        self.num_flips -= 1
        self.num_struck += 1
        spoiled = bytearray(data)
        for index in range(len(data) // 2, len(data) // 2 + NUM_SPOILED_BYTES):
            spoiled[index] ^= 0x40
        return bytes(spoiled)


class Proxy:
    """Listens on a port of its own and carries everything to one server.

    Args:
        target: a port of this host, or the path of a Unix socket.
        clients: the processes that may connect, by name; asked at each connection. Others share the link "".
    """

    def __init__(self, target: int | Path, clients: Callable[[], dict[str, int]]) -> None:
        self.port = 0
        self._target = target
        self._clients = clients
        self._links: dict[str, Link] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    def link(self, client: str) -> Link:
        return self._links.setdefault(client, Link())

    @property
    def links(self) -> Iterable[Link]:
        return self._links.values()

    async def start(self, host: str = "127.0.0.1") -> None:
        self._server = await asyncio.start_server(self._accept, host, 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        link = self.link(owner(writer.get_extra_info("peername")[1], self._clients()))
        try:
            if not link.refuses:
                with contextlib.suppress(OSError):
                    await self._carry(link, reader, writer)
        except asyncio.CancelledError:
            pass  # the proxy stops
        finally:
            writer.transport.abort()

    async def _carry(self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if isinstance(self._target, Path):
            server = await asyncio.open_unix_connection(self._target)
        else:
            server = await asyncio.open_connection("127.0.0.1", self._target)
        try:
            await link.carry((reader, writer), server)
        finally:
            server[1].transport.abort()


def owner(port: int, processes: dict[str, int]) -> str:
    """Which of the processes has a TCP socket with this local port; empty if none has."""
    inodes = {f"socket:[{inode}]" for inode in _inodes(port)}
    for name, pid in processes.items():
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(entry.readlink()) in inodes:
                        return name
    return ""


def _inodes(port: int) -> list[str]:
    wanted = f":{port:04X}"
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[9] for row in rows if row[1].endswith(wanted)]
