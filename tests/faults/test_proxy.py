"""The proxy carries everything until it is told otherwise, and then does exactly that to that one link."""

import asyncio
import os
from collections.abc import AsyncIterator

import pytest

from tests.faults.proxy import MIN_SPOILED_BYTES, NUM_SPOILED_BYTES, Direction, Link, Proxy
from tests.patience import SOON

TEXT = b"something" * MIN_SPOILED_BYTES
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    """In front of a server that sends everything back."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    proxy = Proxy(server.sockets[0].getsockname()[1], lambda: {"me": os.getpid()})
    await proxy.start()
    yield proxy
    await proxy.stop()
    server.close()


async def connect(proxy: Proxy) -> Connection:
    return await asyncio.open_connection("127.0.0.1", proxy.port)


async def echoed(connection: Connection, text: bytes = TEXT) -> bytes:
    reader, writer = connection
    writer.write(text)
    return await asyncio.wait_for(reader.readexactly(len(text)), SOON)


async def stays_silent(connection: Connection) -> bool:
    try:
        await asyncio.wait_for(connection[0].read(1), 0.2)
    except TimeoutError:
        return True
    return False


def link(proxy: Proxy) -> Link:
    return proxy.link("me")


async def test_everything_passes(proxy: Proxy) -> None:
    assert await echoed(await connect(proxy)) == TEXT
    assert link(proxy).num_struck == 0


async def test_a_cut_ends_what_is_open_and_lets_new_ones_in(proxy: Proxy) -> None:
    connection = await connect(proxy)
    await echoed(connection)
    link(proxy).cut()
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await echoed(connection)
    assert await echoed(await connect(proxy)) == TEXT


async def test_another_clients_link_is_another(proxy: Proxy) -> None:
    connection = await connect(proxy)
    await echoed(connection)
    proxy.link("somebody").cut()
    proxy.link("somebody").stalled = frozenset(Direction)
    assert await echoed(connection) == TEXT


async def test_nobody_comes_in_until_it_is_healed(proxy: Proxy) -> None:
    link(proxy).refuses = True
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await echoed(await connect(proxy))
    link(proxy).heal()
    assert await echoed(await connect(proxy)) == TEXT


@pytest.mark.parametrize("direction", Direction)
async def test_what_is_stalled_comes_when_it_is_healed(proxy: Proxy, direction: Direction) -> None:
    connection = await connect(proxy)
    await echoed(connection)
    link(proxy).stalled = frozenset({direction})
    connection[1].write(TEXT)
    assert await stays_silent(connection)
    link(proxy).heal()
    assert await asyncio.wait_for(connection[0].readexactly(len(TEXT)), SOON) == TEXT


async def test_a_few_bits_flip_on_the_way_back(proxy: Proxy) -> None:
    connection = await connect(proxy)
    link(proxy).num_flips = 1
    spoiled = await echoed(connection)
    assert sum((had ^ got).bit_count() for had, got in zip(TEXT, spoiled, strict=True)) == NUM_SPOILED_BYTES
    assert await echoed(connection) == TEXT


async def test_what_is_delayed_comes(proxy: Proxy) -> None:
    link(proxy).delay = 0.05
    assert await echoed(await connect(proxy)) == TEXT
    assert link(proxy).num_struck > 0
