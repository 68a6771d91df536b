"""A prefill worker in a process of its own; `test_transport_shm` starts it and reads what it prints."""

import asyncio
import dataclasses
import json
import sys

from kv_transfer.shm import offer_pool
from tests.contract.transport_kit import Prefill


async def main() -> None:
    prefill = Prefill()
    for block_id in range(16):
        prefill.cache.block_view(block_id, 1)[:] = bytes([block_id + 1]) * prefill.cache.layout.block_bytes
    async with prefill.serving():
        handover, ticket = prefill.grant(range(16))
        handover.advance(8)
        offer = offer_pool(prefill.cache)
        assert offer is not None
        told = {"port": prefill.port, "shm": dataclasses.asdict(offer), "ticket": ticket.hex()}
        print(json.dumps(told), flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        handover.complete(42, prefill.now)
        await asyncio.to_thread(sys.stdin.readline)


asyncio.run(main())
