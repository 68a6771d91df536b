"""How time and memory grow with running sequences, their context, and the requests that wait.

    python -m benchmarks.growth [--steps 30] [--update-docs]

Steps are decode steps of the small shape, in the one process, with the real model. The KV caches of the running
sequences are taken as if a prefill worker had sent them, so that a context of 4,096 tokens costs nothing to make; what
is in them does not matter to the time. The scheduler's part is what `schedule`, `assume`, `commit` and `load` take.

Tables: growth-running, growth-context, growth-waiting, growth-memory.
"""

import argparse
import asyncio
import os
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.checkpoints import SHAPES, make
from benchmarks.offline import OfflineEngine, new_scheduler, new_sequence
from benchmarks.results import Cell, Row, measure
from kvrelay.control.connection import connect
from kvrelay.control.private_redis import PrivateRedis
from kvrelay.control.request_queue import RequestQueue
from kvrelay.engine.block_pool import BlockPool
from kvrelay.engine.engine import Engine
from kvrelay.engine.limits import Limits
from kvrelay.engine.scheduler import Scheduler
from kvrelay.engine.sequence import Role
from kvrelay.settings import EngineSettings

__all__ = ["Case", "Timed", "main", "run_case", "waiting_memory"]

RUNNING = (1, 4, 16, 64, 256)
CONTEXTS = (128, 512, 1024, 2048, 4096)
WAITING = (0, 100, 1_000, 10_000)
PROMPT_TOKENS = (1, 128, 1024)
REDIS_REQUESTS = 2_000
WARM_UP_STEPS = 3
FAR_AWAY = 1e12  # a deadline


@dataclass(frozen=True, slots=True)
class Case:
    """What a step is measured with: sequences that decode, tokens of each when the last step ends, others waiting."""

    running: int
    context: int
    waiting: int = 0


class Timed:
    """A scheduler whose methods are timed. Engine and tests use it as the scheduler itself.

    Attributes:
        seconds: spent in it since this was last set to 0.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._scheduler, name)
        if name not in ("schedule", "assume", "commit", "load"):
            return attribute
        return self._timed(attribute)

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                self.seconds += time.perf_counter() - started

        return call


def run_case(engine: OfflineEngine, case: Case, steps: int) -> dict[str, Cell]:
    """Measures decode steps.

    Raises:
        RuntimeError: a step did not hold all running sequences.
    """
    settings = replace(engine.settings, max_num_sequences=case.running, prefix_caching=True)
    timed: Any = Timed(new_scheduler(engine.runner, settings))
    prompt = case.context - steps - WARM_UP_STEPS - 1
    for index in range(case.running):
        timed.add(new_sequence(f"running-{index}", _tokens(index, prompt), 2 * steps, Role.DECODE))
    timed.schedule(0.0)
    for index in range(case.running):
        timed.adopt(f"running-{index}", 3)
    for index in range(case.waiting):
        timed.add(new_sequence(f"waiting-{index}", _tokens(index, 16), 128, deadline=FAR_AWAY + index))
    _forget_peak()
    before = _memory("VmRSS")
    seconds, shares = _time_steps(Engine(timed, engine.runner), timed, case, steps)
    return {
        **_described(case),
        "ms a step": measure(1e3 * each for each, _ in seconds),
        "scheduler, µs a step": measure(1e6 * each for _, each in seconds),
        "scheduler, % of the step": 100 * sorted(shares)[len(shares) // 2],
        "KV, MiB": case.running
        * engine.runner.layout.block_bytes
        * engine.runner.layout.blocks_for(case.context)
        / 2**20,
        "peak of other memory, MiB": max(0.0, (_memory("VmHWM") - before) / 2**20),
    }


def _time_steps(engine: Engine, timed: Timed, case: Case, steps: int) -> tuple[list[tuple[float, float]], list[float]]:
    """(seconds, seconds in the scheduler) of each step, and the latter's share."""
    found = []
    for _ in range(WARM_UP_STEPS):
        engine.step()
    for _ in range(steps):
        timed.seconds = 0.0
        started = time.perf_counter()
        step = engine.step()
        found.append((time.perf_counter() - started, timed.seconds))
        if step.num_tokens != case.running:
            raise RuntimeError(f"{step.num_tokens} tokens in a step of {case.running} sequences")
    return found, [scheduler / whole for whole, scheduler in found]


def waiting_memory(requests: int, prompt: int) -> tuple[float, float]:
    """Bytes that a waiting request costs a worker, by Python's books and by the kernel's."""
    scheduler = Scheduler(BlockPool(4096 // 16), Limits(64, 512, 4096, 16))
    resident = _memory("VmRSS")
    for index in range(requests):
        scheduler.add(new_sequence(f"{index:032d}", _tokens(index, prompt), 128, deadline=FAR_AWAY + index))
    resident = _memory("VmRSS") - resident
    scheduler = Scheduler(BlockPool(4096 // 16), Limits(64, 512, 4096, 16))
    with _traced() as allocated:
        for index in range(requests):
            scheduler.add(new_sequence(f"{index:032d}", _tokens(index, prompt), 128, deadline=FAR_AWAY + index))
        return allocated() / requests, resident / requests


async def redis_memory(requests: int) -> float:
    """Bytes that a waiting request costs Redis."""
    with tempfile.TemporaryDirectory(prefix="kvrelay-") as folder:
        server = PrivateRedis(Path(folder, "redis"))
        server.start()
        try:
            client = await connect(server.url)
            try:
                queue = RequestQueue(client, b"key", "gateway", max_running=1, max_waiting=requests, lease_seconds=600)
                await queue.enter("runs", "0" * 64, 0, None, 0.0)
                before = (await client.info("memory"))["used_memory"]
                for index in range(requests):
                    await queue.enter(f"{index:032d}", "0" * 64, 0, FAR_AWAY, float(index))
                return float((await client.info("memory"))["used_memory"] - before) / requests
            finally:
                await client.aclose()
        finally:
            server.stop()


def memory_table(requests: int) -> list[Row]:
    """What a waiting request costs, by who holds it."""
    rows: list[Row] = []
    for prompt in PROMPT_TOKENS:
        traced, resident = waiting_memory(requests, prompt)
        rows.append(
            {
                "holder": "worker",
                "prompt tokens": prompt,
                "bytes, by tracemalloc": traced,
                "bytes, by resident memory": resident,
                "beyond 4 bytes a token": traced - 4 * prompt,
            }
        )
    redis = asyncio.run(redis_memory(REDIS_REQUESTS))
    return [*rows, {"holder": "Redis", "prompt tokens": "any", "beyond 4 bytes a token": redis}]


@contextmanager
def _traced() -> Iterator[Callable[[], int]]:
    """Gives a function that says how many bytes Python has allocated since the beginning of the block."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield lambda: tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


def _described(case: Case) -> dict[str, Cell]:
    return {"running": case.running, "context": case.context, "waiting": case.waiting}


def _tokens(seed: int, count: int) -> list[int]:
    """Token ids that differ between seeds; each an object of its own, as those that come from a wire are."""
    return [1000 + (seed * 7919 + position) % 3000 for position in range(count)]


def _memory(name: str) -> int:
    """Bytes of this process, as /proc/self/status names them."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def _forget_peak() -> None:
    """Lets VmHWM begin again at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def cases(quick: bool) -> dict[str, list[Case]]:
    """What each table has."""
    if quick:
        return {"growth-running": [Case(1, 64), Case(4, 64)], "growth-waiting": [Case(4, 64), Case(4, 64, 1000)]}
    return {
        "growth-running": [Case(running, 256) for running in RUNNING],
        "growth-context": [Case(8, context) for context in CONTEXTS],
        "growth-waiting": [Case(64, 256, waiting) for waiting in WAITING],
    }


def needed_blocks(tables: Sequence[Case], block_size: int) -> int:
    """Blocks of a pool in which every case, and a sequence of the longest context, has room."""
    return max(case.running * -(-case.context // block_size) for case in tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path.home() / ".cache" / "kvrelay-benchmarks"
    parser.add_argument("--folder", type=Path, default=default, help="for the checkpoint")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--requests", type=int, default=10_000, help="that wait, where memory is measured")
    parser.add_argument("--threads", type=int, default=2)
    results.add_flags(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shape, arguments.steps, arguments.requests = "tiny", 5, 100
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    tables = cases(arguments.quick)
    memory = memory_table(arguments.requests)  # first, while this process is small
    engine = load(arguments, [case for table in tables.values() for case in table])
    caption = f"Decode steps of the {arguments.shape} shape, float32, {arguments.threads} threads."
    for name, table in tables.items():
        rows = []
        for case in table:
            print(f"  {name}: {case}", file=sys.stderr, flush=True)
            rows.append(run_case(engine, case, arguments.steps))
        results.publish(name, rows, arguments, caption=caption)
    results.publish("growth-memory", memory, arguments, caption=f"{arguments.requests} requests that wait.")


def load(arguments: argparse.Namespace, every: Sequence[Case]) -> OfflineEngine:
    """The engine, with a pool for the largest case."""
    folder = make(arguments.folder.expanduser() / arguments.shape, arguments.shape)
    settings = EngineSettings(dtype="float32", max_num_sequences=max(case.running for case in every))
    longest = max(case.context for case in every)
    blocks = needed_blocks(every, settings.block_size)
    settings = replace(settings, num_blocks=blocks, context_length=min(longest, blocks * settings.block_size))
    engine = OfflineEngine(folder, settings, arguments.threads)
    engine.warm_up()
    return engine


if __name__ == "__main__":
    main()
