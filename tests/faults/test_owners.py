"""Whose the blocks are that a request holds, at each state of the handover: as `kvrelay blocks` tells it."""

import asyncio
from collections.abc import Sequence

import pytest

from kvrelay.client import GenerateOptions
from kvrelay.request import HeldBlocks
from tests.faults.rig import DECODE, GATEWAY, WORKERS, Rig

WAIT_SECONDS = 1.5  # in which there is time to look


def waits_for_a_pull(held: Sequence[HeldBlocks]) -> bool:
    return [entry.owner for entry in held if entry.state == "held"] == [GATEWAY]


def is_being_pulled(held: Sequence[HeldBlocks]) -> bool:
    """The lease is of the decode worker that has reserved blocks, and these are the gateway's."""
    pullers = [entry.owner for entry in held if entry.state == "held"]
    reserved = [(entry.worker_id, entry.owner) for entry in held if entry.worker_id.startswith("decode")]
    return bool(pullers) and [(puller, GATEWAY) for puller in pullers] == reserved


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("point", ["decode.received", "transfer.before_release"])
async def test_a_lease_is_the_gateways_until_a_decode_worker_pulls(rig: Rig, point: str) -> None:
    request_id = f"owned-{point}"
    expected = waits_for_a_pull if point == "decode.received" else is_being_pulled
    options: GenerateOptions = {
        "token_ids": list(range(3, 100)),
        "max_tokens": 4,
        "ignore_eos": True,
        "request_id": request_id,
        "cache_salt": request_id,
    }
    await rig.wait_ready(*WORKERS)
    for name in DECODE:
        rig.processes[name].arm(f"{point}=delay:{WAIT_SECONDS}")
    running = asyncio.create_task(rig.client.complete(**options))

    async def is_as_expected() -> bool:
        held = await rig.client.held_blocks()
        return expected([entry for entry in held if entry.request_id == request_id])

    try:
        await rig.eventually(is_as_expected, WAIT_SECONDS, f"blocks at {point}")
    finally:
        rig.heal()
        await running
    await rig.wait_whole()
