"""Requests that are given up at random moments, in each of the ways that there are."""

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from kvrelay.client import AsyncStream, GenerateOptions
from kvrelay.errors import DeadlineExceeded, NotFound, Unavailable
from kvrelay.request import FinishReason, WorkerStatus
from tests.faults.catalog import CATALOG, LONG_TOKENS
from tests.faults.rig import GATEWAYS, Rig

__all__ = ["WAYS", "CancelReport", "cancel_many"]

NUM_AT_ONCE = 24
# Long enough to be in a decode worker's batch, where so many run at once.
LONGEST_SECONDS = 0.4
LONGEST_TOKENS = 40
GUARD_SECONDS = 60.0
WAYS = ("leaves", "leaves after tokens", "aborts", "deadline")
DONE = "was done before"
REFUSED = "was refused"  # where a busy machine kept Redis from answering in time


@dataclass(frozen=True)
class CancelReport:
    """What came of it.

    Attributes:
        ends: how many were given up in each way, and how many were done or refused before that.
        before: the workers, before the first request; `after` when the last had ended, and blocks were free again.
    """

    ends: Counter[str]
    seconds: float
    before: Mapping[str, WorkerStatus]
    after: Mapping[str, WorkerStatus]

    @property
    def num_given_up(self) -> int:
        return sum(self.ends[way] for way in WAYS)

    @property
    def violations(self) -> list[str]:
        """What went against the promise; empty if all is well."""
        started_anew = [name for name, worker in self.after.items() if worker.pid != self.before[name].pid]
        return [f"{name} has started anew" for name in started_anew]

    def __str__(self) -> str:
        ways = ", ".join(f"{end} {self.ends[end]}" for end in (*WAYS, DONE, REFUSED))
        workers = [
            f"{name}: {worker.blocks_free} of {worker.blocks_total} blocks free, resident memory "
            f"{self.before[name].memory_bytes >> 20} MiB before and {worker.memory_bytes >> 20} MiB after"
            for name, worker in self.after.items()
        ]
        return "\n".join([f"{self.num_given_up} given up in {self.seconds:.0f} s: {ways}", *workers, *self.violations])


async def cancel_many(rig: Rig, count: int, seed: int) -> CancelReport:
    """Runs requests, a handful at once, until so many have been given up.

    Args:
        seed: says what is asked, of which gateway, and how and when it is given up.

    Raises:
        KvrelayError: a request ended in a way that nobody asked for.
        AssertionError: something is left of them.
    """
    ends, numbers = Counter[str](), itertools.count()
    before, started = await rig.workers(), time.monotonic()

    async def one_after_another() -> None:
        while sum(ends[way] for way in WAYS) < count:
            number = next(numbers)
            ends[await _give_up(rig, f"cancel-{seed}-{number}", Random(f"{seed} {number}"))] += 1

    await asyncio.gather(*(one_after_another() for _ in range(NUM_AT_ONCE)))
    seconds = time.monotonic() - started
    await rig.wait_whole()
    return CancelReport(ends, seconds, before, await rig.workers())


async def _give_up(rig: Rig, request_id: str, random: Random) -> str:
    """In which way it was given up, if it was."""
    client, way = rig.clients[random.choice(GATEWAYS)], random.choice(WAYS)
    seconds, num_tokens = random.uniform(0.0, LONGEST_SECONDS), random.randrange(LONGEST_TOKENS)
    options: GenerateOptions = {
        **random.choice(CATALOG),
        "max_tokens": LONG_TOKENS,
        "cache_salt": request_id,
        "request_id": request_id,
    }
    timeout = max(seconds, 0.001) if way == "deadline" else GUARD_SECONDS
    stream = client.generate(timeout=timeout, **options)
    reading = asyncio.create_task(_read(stream, num_tokens if way == "leaves after tokens" else LONG_TOKENS))
    try:
        if way in ("leaves", "aborts"):
            await asyncio.wait([reading], timeout=seconds)
        if way == "leaves":
            await stream.close()
        if way == "aborts":
            with contextlib.suppress(NotFound):  # it has not come yet, and goes on to its end
                await client.abort(request_id)
        return DONE if await reading else way
    except DeadlineExceeded:
        if way != "deadline":
            raise
        return way
    except Unavailable as error:
        if error.reason != "REDIS_UNAVAILABLE":
            raise
        return REFUSED
    finally:
        reading.cancel()
        await stream.close()


async def _read(stream: AsyncStream, num_tokens: int) -> bool:
    """Up to more than so many tokens; whether it came to its own end."""
    async for chunk in stream:
        if chunk.finish_reason is not None:
            return chunk.finish_reason is not FinishReason.ABORT
        num_tokens -= len(chunk.token_ids)
        if num_tokens < 0:
            break
    return False
