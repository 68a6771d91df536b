"""`python -m tests.faults`: plays schedules on a cluster of its own and prints what goes against a promise.

`--seed N` plays one schedule, `--soak` goes on from seed to seed, `--cancels N` gives N requests up instead; each also
with `--shared-pool`.
"""

import argparse
import asyncio
import itertools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path

from kvrelay.failpoints import POINTS
from tests.faults.cancels import cancel_many
from tests.faults.play import play, record
from tests.faults.rig import WORKERS, Rig, start_rig
from tests.faults.schedules import schedule


def main() -> int:
    arguments = _parse()
    seeds = _seeds(arguments)
    if arguments.cancels is not None:
        return _run(lambda rig: _cancel(rig, arguments.cancels, next(iter(seeds))), arguments.shared_pool)
    deadline = time.monotonic() + 60 * arguments.minutes if arguments.soak else float("inf")
    return _run(lambda rig: _play_all(rig, seeds, deadline), arguments.shared_pool)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/faults", description="Plays schedules of faults on a real cluster.")
    parser.add_argument("--seed", type=int, nargs="+", help="the schedules to play; others are left out")
    parser.add_argument("--first", type=int, default=0, help="the seed to begin with (default: 0)")
    parser.add_argument("--count", type=int, default=200, help="how many seeds (default: 200)")
    parser.add_argument("--soak", action="store_true", help="go on from seed to seed for --minutes")
    parser.add_argument(
        "--cancels", type=int, metavar="N", help="give N requests up at random moments, by one seed, and play nothing"
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="how long a soak lasts (default: 60)")
    parser.add_argument("--shared-pool", action="store_true", help="all workers have one pool, not each its own")
    arguments = parser.parse_args()
    if arguments.cancels is not None and len(arguments.seed or ()) > 1:
        parser.error("--cancels takes one --seed")
    return arguments


def _seeds(arguments: argparse.Namespace) -> Iterable[int]:
    if arguments.seed is not None:
        return list(arguments.seed)
    if arguments.soak:
        return itertools.count(arguments.first)
    return range(arguments.first, arguments.first + arguments.count)


def _run(act: Callable[[Rig], Coroutine[None, None, int]], shares_pool: bool) -> int:
    """On a cluster of its own; answers the exit code."""

    async def run(folder: Path) -> int:
        async with start_rig(folder, shares_pool=shares_pool) as rig:
            return await act(rig)

    with tempfile.TemporaryDirectory(prefix="kvrelay-faults-") as folder:
        return asyncio.run(run(Path(folder)))


async def _cancel(rig: Rig, count: int, seed: int) -> int:
    report = await cancel_many(rig, count, seed)
    print(report)
    return 1 if report.violations else 0


async def _play_all(rig: Rig, seeds: Iterable[int], deadline: float) -> int:
    played, bad = Counter[int](), []
    references = await record(rig)
    for seed in seeds:
        if time.monotonic() > deadline:
            break
        report = await play(rig, schedule(seed), references, run=f"-{played[seed]}")
        played[seed] += 1
        print(report, flush=True)
        if report.violations:
            bad.append(seed)
    await rig.wait_ready(*WORKERS)
    if left := await rig.what_is_left():
        print(f"left: {left}")
        bad.append(-1)
    if bad:
        print(rig.logs())
    met = rig.met()
    print("failpoints that were met: " + ", ".join(f"{point} {met[point]} times" for point in POINTS))
    print(f"{played.total()} schedules, {len(bad)} against the promises" + (f": {bad}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
