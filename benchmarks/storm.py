"""What a storm of aborts leaves behind: goodput second by second, before, during and after nine in ten clients leave.

    python -m benchmarks.storm [--rate 4] [--rounds 3] [--update-docs]

A steady load below saturation runs all the time through one prefill and one decode worker. In the storm nine times as
many clients come besides, each of which cancels at a random moment: in the queue, in prefill, in the handover or while
it streams. Goodput counts the tokens of those requests of the steady load that keep to the limits, when they come. In
the end nothing may run, wait or be held, or the command fails.
"""

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.checkpoints import make
from benchmarks.processes import cluster
from benchmarks.results import Row, add_flags, measure, publish
from kvrelay import AsyncClient
from kvrelay.bench.arrivals import RandomArrivals
from kvrelay.bench.lengths import LengthDistribution
from kvrelay.bench.load import LoadGenerator, Outcome, Record, RequestOptions
from kvrelay.bench.measure import Floats, GoodputLimits
from kvrelay.bench.workload import Job, Purpose, Synthetic, Workload, generator
from kvrelay.request import Model

__all__ = ["Phases", "main", "tokens_per_second"]

LEAVERS_PER_CLIENT = 9
LONGEST_PATIENCE = 1.0
EVENLY = 1000.0  # burstiness; a Poisson process would make the seconds differ by itself
PROMPT_TOKENS, OUTPUT_TOKENS = 64, 64
LIMITS = GoodputLimits(ttft=1.0, tpot=0.05)
TIMEOUT = 120.0
WHOLE_SECONDS = 10.0
ENOUGH, ENOUGH_WITHIN = 0.9, 5


@dataclass(frozen=True, slots=True)
class Phases:
    """Whole seconds of each."""

    warm_up: int
    before: int
    storm: int
    after: int

    @property
    def storm_begins(self) -> int:
        return self.warm_up + self.before

    @property
    def storm_ends(self) -> int:
        return self.storm_begins + self.storm

    @property
    def total(self) -> int:
        return self.storm_ends + self.after


@dataclass(frozen=True, slots=True)
class Round:
    """One storm.

    Attributes:
        goodput: of the steady load, tokens in each second.
        leavers: those who cancelled, or were done before.
    """

    goodput: Floats
    leavers: Sequence[Record]


def tokens_per_second(records: Sequence[Record], limits: GoodputLimits, seconds: int) -> Floats:
    """Tokens of the requests that kept the limits, by the second in which they came.

    Returns:
        [seconds]
    """
    good = [record for record in records if limits.kept_by(record)]
    times = np.concatenate([np.empty(0), *(record.response_times for record in good)])
    tokens = np.concatenate([np.empty(0), *(record.response_tokens for record in good)])
    counts, _ = np.histogram(times, np.arange(seconds + 1), weights=tokens)
    return counts


async def run_round(target: str, rate: float, phases: Phases, seed: int) -> Round:
    """The steady load, and the storm in the middle of it.

    Raises:
        RuntimeError: something is left running, waiting or held.
    """
    async with AsyncClient(target) as client:
        (model,) = await client.list_models()
        steady, storm = (_load(client, model, seed) for _ in range(2))
        arrivals = RandomArrivals(rate, EVENLY).schedule(_jobs(model, seed), generator(seed, Purpose.ARRIVALS))
        async with asyncio.TaskGroup() as both:
            both.create_task(steady.run_schedule(arrivals, phases.total))
            both.create_task(_storm(storm, model, LEAVERS_PER_CLIENT * rate, phases, seed))
        await _wait_whole(client)
    return Round(tokens_per_second(steady.records, LIMITS, phases.total), storm.records)


def _load(client: AsyncClient, model: Model, seed: int) -> LoadGenerator:
    options = RequestOptions(model.id, f"storm-{uuid.uuid4().hex[:12]}", temperature=0.0, seed=seed, timeout=TIMEOUT)
    return LoadGenerator(client, options)


def _jobs(model: Model, seed: int) -> Iterator[Job]:
    prompt, output = (LengthDistribution.parse("", str(tokens)) for tokens in (PROMPT_TOKENS, OUTPUT_TOKENS))
    return Workload(Synthetic(prompt, output), model.vocab_size, model.context_length, seed).jobs()


async def _storm(load: LoadGenerator, model: Model, rate: float, phases: Phases, seed: int) -> None:
    patience = random.Random(seed)
    schedule = RandomArrivals(rate).schedule(_jobs(model, seed), generator(seed, Purpose.ARRIVALS))
    async with asyncio.TaskGroup() as clients:
        for due, job in schedule:
            if due >= phases.storm:
                break
            leaves_after = patience.uniform(0.0, LONGEST_PATIENCE)
            clients.create_task(_leave_early(load, phases.storm_begins + due, job, leaves_after))


async def _leave_early(load: LoadGenerator, due: float, job: Job, patience: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(due - load.now + patience):
            await load.run_schedule(iter([(due, job)]), None)


async def _wait_whole(client: AsyncClient) -> None:
    deadline = time.monotonic() + WHOLE_SECONDS
    while True:
        status, held = await client.status(), await client.held_blocks()
        missing = [worker.id for worker in status.workers if worker.blocks_free != worker.blocks_total]
        if not (held or missing or status.queue.running or status.queue.waiting):
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"after {WHOLE_SECONDS:g} s: {status.queue}; held: {held}; not whole: {missing}")
        await asyncio.sleep(0.1)


def _rows(rounds: Sequence[Round], phases: Phases) -> list[Row]:
    seconds = {
        "before": slice(phases.warm_up, phases.storm_begins),
        "in the storm": slice(phases.storm_begins, phases.storm_ends),
        **{
            f"second {n + 1} after it": slice(phases.storm_ends + n, phases.storm_ends + n + 1)
            for n in range(phases.after)
        },
    }
    return [
        {
            "when": when,
            "goodput, tokens/s": measure(float(each.goodput[part].mean()) for each in rounds),
            "% of before": measure(100 * float(each.goodput[part].mean()) / _before(each, phases) for each in rounds),
        }
        for when, part in seconds.items()
    ]


def _before(each: Round, phases: Phases) -> float:
    return float(each.goodput[phases.warm_up : phases.storm_begins].mean())


def _caption(rounds: Sequence[Round], phases: Phases, rate: float) -> str:
    leavers = [record for each in rounds for record in each.leavers]
    cancelled = [record for record in leavers if record.outcome is Outcome.INTERRUPTED]
    streaming = sum(bool(record.response_times) for record in cancelled)
    recovered = sum(_seconds_to_recover(each, phases) <= ENOUGH_WITHIN for each in rounds)
    return (
        f"{rate:g} requests/s of {PROMPT_TOKENS} + {OUTPUT_TOKENS} tokens on the small shape, and for {phases.storm} s "
        f"{LEAVERS_PER_CLIENT * rate:g}/s besides, of which {len(cancelled)} cancelled, {streaming} of them while they "
        f"streamed, and {len(leavers) - len(cancelled)} were done before. Goodput counts tokens of requests with TTFT "
        f"within {LIMITS.ttft:g} s and {1e3 * (LIMITS.tpot or 0.0):g} ms per token after it. {ENOUGH:.0%} of it was "
        f"back within {ENOUGH_WITHIN} s in {recovered} of {len(rounds)} rounds, and every pool was whole after each."
    )


def _seconds_to_recover(each: Round, phases: Phases) -> float:
    """Until the end of the first second after the storm that has enough; infinity if none has."""
    enough = each.goodput[phases.storm_ends :] >= ENOUGH * _before(each, phases)
    return float(enough.argmax() + 1) if enough.any() else float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint folder; the shape small is made if left out")
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second of the steady load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=50955)
    add_flags(parser)
    arguments = parser.parse_args()
    phases = Phases(warm_up=4, before=6, storm=6, after=8)
    if arguments.quick:
        arguments.rounds, phases = 1, Phases(warm_up=2, before=2, storm=2, after=3)
    rounds = []
    with tempfile.TemporaryDirectory(prefix="kvrelay-benchmark-") as name:
        folder = Path(name)
        model = arguments.model or make(folder / "small", "small")
        with cluster(folder, arguments.port, model=model, dtype="float32", disaggregation="always") as target:
            for seed in range(arguments.seed, arguments.seed + arguments.rounds):
                rounds.append(asyncio.run(run_round(target, arguments.rate, phases, seed)))
                print(f"round {seed}", file=sys.stderr)
    publish("storm", _rows(rounds, phases), arguments, caption=_caption(rounds, phases, arguments.rate))


if __name__ == "__main__":
    main()
