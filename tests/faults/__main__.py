"""`python -m tests.faults`: plays schedules on a cluster of its own and prints what goes against a promise.

`--seed N` plays one schedule, `--soak` goes on from seed to seed.
"""

import argparse
import asyncio
import itertools
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from tests.checkpoints import make_checkpoint
from tests.faults.play import play, record
from tests.faults.rig import SETTINGS, WORKERS, start_rig
from tests.faults.schedules import schedule


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/faults", description="Plays schedules of faults on a real cluster.")
    parser.add_argument("--seed", type=int, nargs="+", help="the schedules to play; others are left out")
    parser.add_argument("--first", type=int, default=0, help="the seed to begin with (default: 0)")
    parser.add_argument("--count", type=int, default=200, help="how many seeds (default: 200)")
    parser.add_argument("--soak", action="store_true", help="go on from seed to seed for --minutes")
    parser.add_argument("--minutes", type=float, default=60.0, help="how long a soak lasts (default: 60)")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        seeds: Iterable[int] = arguments.seed
    else:
        seeds = (
            itertools.count(arguments.first)
            if arguments.soak
            else range(arguments.first, arguments.first + arguments.count)
        )
    deadline = time.monotonic() + 60 * arguments.minutes if arguments.soak else float("inf")
    with tempfile.TemporaryDirectory(prefix="kvrelay-faults-") as folder:
        return asyncio.run(_play_all(Path(folder), seeds, deadline))


async def _play_all(folder: Path, seeds: Iterable[int], deadline: float) -> int:
    model = make_checkpoint(folder / "model", "llama", num_hidden_layers=1)
    num_played, bad = 0, []
    async with start_rig(folder, model, **SETTINGS) as rig:
        references = await record(rig)
        for seed in seeds:
            if time.monotonic() > deadline:
                break
            report = await play(rig, schedule(seed), references)
            num_played += 1
            print(report, flush=True)
            if report.faults:
                bad.append(seed)
        await rig.wait_ready(*WORKERS)
        if left := await rig.what_is_left():
            print(f"left: {left}")
            bad.append(-1)
        if bad:
            print(rig.logs())
    print(f"{num_played} schedules, {len(bad)} against the promises" + (f": {bad}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
