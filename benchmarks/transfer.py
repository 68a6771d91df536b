"""How fast KV blocks travel by each transport, and how much of it a request sees.

    python -m benchmarks.transfer [--rounds 7] [--update-docs]

transfer-rates: the blocks of a prompt of the small shape, from another process on this host. "copy" is what the
transport itself does for all of them at once; "pull" is the whole handover (ticket, events, copies, release) of a
prompt that is complete and not cached. Beside the copy what limits it: for shm a memcpy of the same bytes out of the
other process's memory by one thread, for nixl the bindings' own read of them, a request that was made beforehand and is
only posted. Either is measured right before or right after the copy, in turn, for who comes second finds the caches
warm. Transports that this machine lacks have no row.

transfer-overlap: a prompt of 2,000 tokens through a whole cluster of the small shape. The transfer is what the second
token waits for after prefill has ended.
"""

import argparse
import asyncio
import dataclasses
import functools
import json
import mmap
import os
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from benchmarks import results
from benchmarks.checkpoints import SHAPES, make
from benchmarks.processes import REPOSITORY, cluster
from benchmarks.results import Measure, Row, measure
from kv_transfer.leases import LeaseTable
from kv_transfer.links import Links
from kv_transfer.nixl_agent import NixlAgent, nixl_problem
from kv_transfer.puller import Puller
from kv_transfer.service import KvService
from kv_transfer.shm import offer_pool
from kv_transfer.tickets import sign_ticket
from kvrelay import Client
from kvrelay.control.membership import WorkerEntry
from kvrelay.control.registry import ModelInfo, ShmOffer, WorkerLoad, WorkerRecord
from kvrelay.engine.kv_cache import HEADER_BYTES, KvCache
from kvrelay.engine.kv_layout import KvLayout
from kvrelay.request import WorkerRole, WorkerState
from kvrelay.rpc import Server, Service, open_channel
from kvrelay.v1 import kv_pb2, kv_pb2_grpc

__all__ = ["main", "overlap_table", "rates_table"]

KEY = b"k" * 32
EPOCH = 1
BLOCK_SIZE = 16
CHECKSUMS = ("off", "sampled", "full")
LIMITS = {"shm": "memcpy", "nixl": "raw nixl"}
START_SECONDS = 120.0

Work = Callable[[], Awaitable[Any]]


def layout(shape: str) -> KvLayout:
    sizes = SHAPES[shape]
    layers, heads = sizes["num_hidden_layers"], sizes["num_key_value_heads"]
    return KvLayout(b"m" * 32, "float32", BLOCK_SIZE, layers, heads, sizes["head_dim"])


# The prefill worker's process


async def serve(shape: str, tokens: int, num_tickets: int) -> None:
    """Prints where it is and tickets for the same blocks, each good for one pull; ends when its input does."""
    cache = KvCache(layout(shape), -(-tokens // BLOCK_SIZE), torch.device("cpu"))
    cache.tensor.normal_()
    cache.write_header(EPOCH)
    leases = LeaseTable("prefill-0", 600.0, lambda _: 0, lambda _: None)
    leases.epoch = EPOCH
    service = Service(
        "kvrelay.v1.KvService", kv_pb2_grpc.add_KvServiceServicer_to_server, KvService(leases, cache, KEY)
    )
    server = Server("127.0.0.1", 0, [service])
    port = await server.start()
    blocks, offer = tuple(range(cache.num_blocks)), offer_pool(cache)
    tickets = []
    for number in range(num_tickets):
        generations = (0,) * len(blocks)
        handover, ticket = leases.grant(
            f"r{number}", "gateway", blocks, generations, time.monotonic(), ends_with_call=True
        )
        handover.complete(42, time.monotonic())
        tickets.append(sign_ticket(ticket, KEY).hex())
    shm = dataclasses.asdict(offer) if offer else None
    print(json.dumps({"port": port, "shm": shm, "tickets": tickets}), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await server.stop()


# The decode worker's


class _Registry:
    """One prefill worker, for good."""

    def __init__(self, record: WorkerRecord) -> None:
        load = WorkerLoad(WorkerState.READY, 0, 0, 1, 1, 0)
        self._workers = {record.worker_id: WorkerEntry(record, load, 0.0)}

    def snapshot(self) -> Mapping[str, WorkerEntry]:
        return self._workers

    async def wait_for(self, predicate: Callable[[Mapping[str, WorkerEntry]], bool], timeout: float) -> None:
        raise TimeoutError


def _record(told: Mapping[str, Any], pid: int) -> WorkerRecord:
    model = ModelInfo("small", "LlamaForCausalLM", 4096, 100, BLOCK_SIZE, "00")
    shm = ShmOffer(**told["shm"]) if told["shm"] else None
    return WorkerRecord("prefill-0", WorkerRole.PREFILL, f"127.0.0.1:{told['port']}", pid, model, shm, EPOCH)


async def rates_table(shape: str, tokens: int, rounds: int) -> list[Row]:
    """Pulls by every transport that works here, in turn, with each kind of checksums."""
    transports = [name for name in ("shm", "nixl", "grpc") if name != "nixl" or nixl_problem() is None]
    num_tickets = (rounds + 1) * len(transports) * len(CHECKSUMS)
    command = [sys.executable, "-m", "benchmarks.transfer", "--serve", str(num_tickets), "--shape", shape]
    process = await asyncio.create_subprocess_exec(
        *command,
        *("--tokens", str(tokens)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=REPOSITORY,
        limit=1 << 30,
    )
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the process has no pipes")
    try:
        told = json.loads(await asyncio.wait_for(process.stdout.readline(), START_SECONDS))
        cache = KvCache(layout(shape), -(-tokens // BLOCK_SIZE), torch.device("cpu"))
        registry = _Registry(_record(told, process.pid))
        found = await _pull_all(registry, cache, transports, told["tickets"], rounds)
    finally:
        process.stdin.close()
        await process.wait()
    return _rates_rows(found, transports)


async def _pull_all(
    registry: _Registry, cache: KvCache, transports: Sequence[str], tickets: list[str], rounds: int
) -> dict[str, list[float]]:
    """Bytes per second of each round, by what was measured; the first round is not counted."""
    links = {name: Links(registry, "decode-0", cache, name) for name in transports}
    blocks, found = range(cache.num_blocks), defaultdict(list)
    num_bytes = cache.block_bytes.numel()
    limits = {"shm": _memcpy(registry, cache)}
    if "nixl" in transports:
        limits["nixl"] = await _raw_nixl(registry, cache)

    async def timed(name: str, work: Work) -> None:
        started = time.perf_counter()
        await work()
        found[name].append(num_bytes / (time.perf_counter() - started))

    for number in range(rounds + 1):
        for name in transports:
            if name in limits:  # not grpc, whose bytes come in the events
                async with links[name].use("prefill-0", EPOCH) as link:
                    copy = functools.partial(link.receiver.receive, blocks, blocks, b"")
                    pair: list[tuple[str, Work]] = [(LIMITS[name], limits[name]), (f"{name} copy", copy)]
                    for what, work in pair if number % 2 else reversed(pair):
                        await timed(what, work)
            for mode in CHECKSUMS:
                puller = Puller(links[name], cache, KEY, mode)
                ticket = bytes.fromhex(tickets.pop())
                await timed(f"{name} {mode}", functools.partial(puller.pull, ticket, blocks, 0))
    for each in links.values():
        await each.close()
    return {name: values[1:] for name, values in found.items()}


def _memcpy(registry: _Registry, cache: KvCache) -> Callable[[], Awaitable[None]]:
    """A copy of the other process's blocks by the thread that asks for it."""
    source, own = _mapped(registry.snapshot()["prefill-0"].record.shm), cache.block_bytes.view(-1).numpy()

    async def copy() -> None:
        numpy.copyto(own, source)

    return copy


def _mapped(offer: ShmOffer | None) -> "numpy.ndarray[Any, Any]":
    """The blocks of the other process's pool, in this one's address space."""
    if offer is None:
        raise RuntimeError("this system has no memory to share")
    with open(f"/proc/{offer.pid}/fd/{offer.fd}", "rb") as pool:
        memory = mmap.mmap(pool.fileno(), offer.size, prot=mmap.PROT_READ)
    return numpy.frombuffer(memory, dtype=numpy.uint8, offset=HEADER_BYTES)


async def _raw_nixl(registry: _Registry, cache: KvCache) -> Callable[[], Awaitable[None]]:
    """NIXL's own read of the whole pool in one piece, with nothing of kvrelay's around it."""
    channel = open_channel(registry.snapshot()["prefill-0"].record.address)
    stub = kv_pb2_grpc.KvServiceStub(channel)
    export = (await stub.Export(kv_pb2.ExportRequest(transport="nixl"))).nixl
    await channel.close(None)
    agent, num_bytes = NixlAgent(cache), cache.block_bytes.numel()
    peer = agent.meet(export.metadata)
    bindings, own = agent._bindings, agent._agent
    here = bindings.nixlXferDList(agent.segment, [(cache.block_bytes.data_ptr(), num_bytes, 0)])
    there = bindings.nixlXferDList(agent.segment_of(export), [(export.base_address, num_bytes, 0)])
    request = own.createXferReq(bindings.NIXL_READ, here, there, peer, b"", [])

    async def read() -> None:
        status = own.postXferReq(request, b"")
        while status == bindings.NIXL_IN_PROG:
            status = own.getXferStatus(request)
        if status != bindings.NIXL_SUCCESS:
            raise RuntimeError(str(status))

    return read


def _rates_rows(found: Mapping[str, Sequence[float]], transports: Sequence[str]) -> list[Row]:
    def gigabytes(name: str) -> Measure:
        return measure(value / 1e9 for value in found[name])

    rows: list[Row] = []
    for name in transports:
        limit = LIMITS.get(name)
        row: Row = {
            "transport": name,
            "copy, GB/s": gigabytes(f"{name} copy") if limit else None,
            "limit": f"{limit}, {gigabytes(limit)}" if limit else None,
            "% of the limit": _percent(found[f"{name} copy"], found[limit]) if limit else None,
            **{f"pull, checksums {mode}, GB/s": gigabytes(f"{name} {mode}") for mode in CHECKSUMS},
        }
        rows.append(row)
    return rows


def _percent(values: Sequence[float], limits: Sequence[float]) -> Measure:
    return measure(100 * value / limit for value, limit in zip(values, limits, strict=True))


# A whole cluster


def overlap_table(shape: str, tokens: int, rounds: int, port: int) -> list[Row]:
    """What is left of the transfer when prefill has ended, by each transport."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="kvrelay-benchmark-") as name:
        folder = Path(name)
        model = make(folder / shape, shape)
        for transport in ("shm", "nixl", "grpc"):
            if transport == "nixl" and nixl_problem() is not None:
                continue
            (folder / transport).mkdir()
            settings = {"model": model, "transport": transport, "disaggregation": "always"}
            with cluster(folder / transport, port, **settings) as target:
                rows.append({"transport": transport, **_ask(target, tokens, rounds)})
    return rows


def _ask(target: str, tokens: int, rounds: int) -> Row:
    random.seed(0)
    seen = []
    with Client(target, timeout=START_SECONDS) as client:
        for _ in range(rounds + 1):
            prompt = [random.randrange(1000, 4000) for _ in range(tokens)]
            timings = client.complete(token_ids=prompt, max_tokens=2, temperature=0).timings
            if timings is None:
                raise RuntimeError("a request had no timings")
            seen.append(timings)
    return {
        "prefill, ms": measure(1e3 * each.prefill for each in seen[1:]),
        "transfer, ms": measure(1e3 * each.transfer for each in seen[1:]),
        "% of prefill": measure(100 * each.transfer / each.prefill for each in seen[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--tokens", type=int, default=2000, help="of a prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--port", type=int, default=50953)
    parser.add_argument("--serve", type=int, default=0, metavar="TICKETS", help="be the prefill worker's process")
    parser.add_argument("--only", choices=("rates", "overlap"), help="one of the tables")
    results.add_flags(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shape, arguments.tokens, arguments.rounds = "tiny", 200, 1
    if arguments.serve:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        asyncio.run(serve(arguments.shape, arguments.tokens, arguments.serve))
        return
    packages = results.versions([*results.PACKAGES, "nixl"])
    about = f"{arguments.tokens} tokens of the {arguments.shape} shape, float32"
    if arguments.only != "overlap":
        rows = asyncio.run(rates_table(arguments.shape, arguments.tokens, arguments.rounds))
        size = layout(arguments.shape).token_bytes * arguments.tokens / 2**20
        caption = f"{about}, {size:.0f} MiB, between two processes."
        results.publish("transfer-rates", rows, arguments, caption=caption, packages=packages)
    if arguments.only != "rates":
        rows = overlap_table(arguments.shape, arguments.tokens, arguments.rounds, arguments.port)
        caption = f"{about}: one prompt at a time, by checksums of all blocks, overlapped with prefill."
        results.publish("transfer-overlap", rows, arguments, caption=caption, packages=packages)


if __name__ == "__main__":
    main()
