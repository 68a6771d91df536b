"""The health check of the containers, against a real server."""

import asyncio
import socket
import subprocess
import sys

import pytest

from kvrelay import rpc


async def probe(port: int) -> int:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kvrelay.rpc.probe", f"127.0.0.1:{port}", stdout=subprocess.DEVNULL
    )
    return await process.wait()


@pytest.mark.parametrize(("serving", "exit_code"), [(True, 0), (False, 1)])
async def test_exit_code_tells_whether_it_serves(serving: bool, exit_code: int) -> None:
    server = rpc.Server("127.0.0.1", 0, [])
    port = await server.start()
    try:
        await server.set_serving(serving)
        assert await probe(port) == exit_code
    finally:
        await server.stop()


async def test_nobody_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert await probe(unused.getsockname()[1]) == 1
