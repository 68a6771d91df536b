"""Closed-loop streams through the SDK, in a process of their own, and what they saw.

    python -m benchmarks.stream_load --target HOST:PORT --seconds 5 [--streams 64] [--watch PID]

Each stream sends its next request as soon as the last has ended. After a warm-up everything is counted for
`--seconds`, also the CPU of the process `--watch`. Prints one JSON object.
"""

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

from benchmarks.processes import cpu_seconds, resident_bytes
from kvrelay import AsyncClient

__all__ = ["Load", "Observed", "percentile", "run_streams"]


@dataclass(slots=True)
class Observed:
    """What the clients saw. Times in seconds; an inter-token time belongs to a response, not to each of its tokens."""

    requests: int = 0
    tokens: int = 0
    responses: int = 0
    first_token_times: list[float] = field(default_factory=list)
    inter_token_times: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Load:
    """A window of a steady load.

    Attributes:
        server_cpu_seconds: of the process that was watched; its memory in bytes at the end.
    """

    seconds: float
    requests: int
    tokens: int
    responses: int
    client_cpu_seconds: float
    server_cpu_seconds: float
    server_memory: int
    first_token_p50: float
    first_token_p99: float
    inter_token_p50: float


async def run_streams(
    client: AsyncClient, requests: Iterable[tuple[list[int], int]], streams: int, seen: Observed
) -> None:
    """Runs the requests, so many at once, each forced to its output length; ends when all have."""
    pending: Iterator[tuple[list[int], int]] = iter(requests)

    async def work() -> None:
        for prompt, length in pending:
            await _run(client, prompt, length, seen)

    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(work())


async def _run(client: AsyncClient, prompt: list[int], length: int, seen: Observed) -> None:
    last, first, count = time.perf_counter(), True, 0
    async for chunk in client.generate(token_ids=prompt, max_tokens=length, temperature=0, ignore_eos=True):
        now = time.perf_counter()
        (seen.first_token_times if first else seen.inter_token_times).append(now - last)
        last, first = now, False
        seen.responses += 1
        seen.tokens += len(chunk.token_ids)
        count += len(chunk.token_ids)
    if count != length:
        raise RuntimeError(f"{count} tokens came instead of {length}")
    seen.requests += 1


async def measure(
    target: str, streams: int, prompt: int, output: int, warm_up: float, seconds: float, pid: int
) -> Load:
    """A steady load of equal requests, observed for `seconds`."""
    seen, stopping = Observed(), asyncio.Event()

    def requests() -> Iterator[tuple[list[int], int]]:
        # Outputs of different length at first, so that the streams do not all begin and end together.
        for index in range(streams):
            yield list(range(3, 3 + prompt)), max(2, output * (index + 1) // streams)
        while not stopping.is_set():
            yield list(range(3, 3 + prompt)), output

    async with AsyncClient(target) as client:
        running = asyncio.create_task(run_streams(client, requests(), streams, seen))
        await asyncio.sleep(warm_up)
        seen.requests = seen.tokens = seen.responses = 0
        seen.first_token_times.clear()
        seen.inter_token_times.clear()
        started, own, other = time.perf_counter(), cpu_seconds(os.getpid()), cpu_seconds(pid)
        await asyncio.sleep(seconds)
        load = Load(
            seconds=time.perf_counter() - started,
            requests=seen.requests,
            tokens=seen.tokens,
            responses=seen.responses,
            client_cpu_seconds=cpu_seconds(os.getpid()) - own,
            server_cpu_seconds=cpu_seconds(pid) - other,
            server_memory=resident_bytes(pid),
            first_token_p50=percentile(seen.first_token_times, 50),
            first_token_p99=percentile(seen.first_token_times, 99),
            inter_token_p50=percentile(seen.inter_token_times, 50),
        )
        stopping.set()
        await running
    return load


def percentile(values: list[float], percent: int) -> float:
    """Of 1 to 99; 0 if there are no two values."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--warm-up", type=float, default=2.0, help="seconds")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--watch", type=int, default=os.getpid(), help="process id")
    arguments = parser.parse_args()
    load = measure(
        arguments.target,
        arguments.streams,
        arguments.prompt_tokens,
        arguments.output_tokens,
        arguments.warm_up,
        arguments.seconds,
        arguments.watch,
    )
    print(json.dumps(asdict(asyncio.run(load))))


if __name__ == "__main__":
    main()
