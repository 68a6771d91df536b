"""What continuous batching gains, offline, in one process and on the same kernels.

    python -m benchmarks.engine [--distributions exponential peers ...] [--batches 8 32] [--update-docs]

For each distribution of output lengths the same requests are computed by continuous, static and unbatched scheduling
(`OfflineEngine.run` says what these are), at each batch size, in turn and `--repeats` times; unbatched takes the first
quarter of them. All must produce the same tokens. On the workload of the peers' table, transformers' `generate` and its
continuous batching run in between. Everything is greedy, in float32, and forced to the same output lengths.

Tables: engine-ideal (by arithmetic alone), engine-equal, engine-best, engine-runs, engine-transformers.
"""

import argparse
import heapq
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import results
from benchmarks.checkpoints import SHAPES, make
from benchmarks.offline import MODES, OfflineEngine, Run
from benchmarks.peer_engines import Generate, load_transformers_continuous, load_transformers_static
from benchmarks.results import Row, measure
from benchmarks.workloads import DISTRIBUTIONS, Workload, output_tokens, workload
from kvrelay.settings import EngineSettings

__all__ = ["ideal_steps", "main"]

IDEAL_REQUESTS = 4096
IDEAL_BATCHES = (8, 32, 128)


@dataclass(frozen=True, slots=True, order=True)
class Case:
    """A way to schedule."""

    mode: str
    batch: int


Runs = Mapping[Case, Sequence[Run]]


def ideal_steps(lengths: Sequence[int], batch: int, mode: str) -> int:
    """Steps that a workload takes if every running sequence gets a token in each.

    Args:
        lengths: output tokens of each request, in order of arrival.
        mode: "continuous" or "static".
    """
    if mode == "static":
        return sum(max(lengths[start : start + batch]) for start in range(0, len(lengths), batch))
    ends = [0] * batch
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


def ideal_table() -> list[Row]:
    """What continuous batching gains where a step takes equally long whatever its rows, as on a GPU of free memory."""
    rows: list[Row] = []
    for distribution in DISTRIBUTIONS:
        lengths = [output for _, output in workload(distribution, IDEAL_REQUESTS)]
        gains = {
            f"batch {batch}": ideal_steps(lengths, batch, "static") / ideal_steps(lengths, batch, "continuous")
            for batch in IDEAL_BATCHES
        }
        rows.append({"output lengths": distribution, **gains})
    return rows


def run_modes(engine: OfflineEngine, requests: Workload, cases: Sequence[Case], repeats: int) -> dict[Case, list[Run]]:
    """Every case once in each of the rounds, every second round backwards.

    Raises:
        RuntimeError: two cases differ in a token.
    """
    runs: dict[Case, list[Run]] = defaultdict(list)
    for index in range(repeats):
        for case in cases[::-1] if index % 2 else cases:
            few = requests[: max(1, len(requests) // 4)]
            run = engine.run(few if case.mode == "unbatched" else requests, case.mode, case.batch)
            log(f"  {case.mode}, batch {case.batch}: {run.tokens_per_second:.0f} tokens/s")
            runs[case].append(run)
    check_equal(runs)
    return runs


def check_equal(runs: Runs) -> None:
    """Raises: RuntimeError at the first request whose tokens depend on how it was scheduled."""
    (first, (reference, *_)), *_ = runs.items()
    for case, repeats in runs.items():
        for run in repeats:
            for index, (expected, tokens) in enumerate(zip(reference.tokens, run.tokens, strict=False)):
                if tokens != expected:
                    where = next(i for i, pair in enumerate(zip(tokens, expected, strict=True)) if pair[0] != pair[1])
                    raise RuntimeError(f"request {index} differs in token {where} between {first} and {case}")


def equal_table(distribution: str, runs: Runs) -> list[Row]:
    """Continuous against the others at the same batch size; gains are taken within each round."""
    rows: list[Row] = []
    for batch in sorted({case.batch for case in runs if case.mode == "continuous"}):
        continuous = runs[Case("continuous", batch)]
        row: dict[str, results.Cell] = {"output lengths": distribution, "batch": batch}
        row["continuous, tokens/s"] = rates(continuous)
        for mode in ("static", "padded"):
            if other := runs.get(Case(mode, batch)):
                row[f"{mode}, tokens/s"] = rates(other)
                row[f"gain on {mode}"] = gain(continuous, other)
                row[f"fewer steps than {mode}"] = other[0].steps / continuous[0].steps
        rows.append(row)
    return rows


def best_table(distribution: str, runs: Runs) -> list[Row]:
    """Each mode at the batch size that suits it best."""
    row: dict[str, results.Cell] = {"output lengths": distribution}
    best: dict[str, Case] = {}
    for mode in dict.fromkeys(case.mode for case in runs):
        best[mode] = max((c for c in runs if c.mode == mode), key=lambda case: rates(runs[case]).median)
        row[f"{mode}, tokens/s"] = rates(runs[best[mode]])
        if mode != "unbatched":
            row[f"{mode}, batch"] = best[mode].batch
    for mode, case in best.items():
        if mode != "continuous":
            row[f"gain on {mode}"] = gain(runs[best["continuous"]], runs[case])
    return [row]


def runs_table(distribution: str, runs: Runs) -> list[Row]:
    """Every case, with its steps and how full they were."""
    return [
        {
            "output lengths": distribution,
            "mode": case.mode,
            "batch": case.batch,
            "requests": len(repeats[0].tokens),
            "tokens/s": rates(repeats),
            "steps": repeats[0].steps,
            "rows a step": repeats[0].rows_per_step,
            "ms a step": measure(1e3 * run.seconds / run.steps for run in repeats),
        }
        for case, repeats in runs.items()
    ]


def rates(runs: Sequence[Run]) -> results.Measure:
    """Output tokens per second."""
    return measure(run.tokens_per_second for run in runs)


def gain(runs: Sequence[Run], others: Sequence[Run]) -> results.Measure:
    """How many times as fast `runs` are, round by round."""
    return measure(a.tokens_per_second / b.tokens_per_second for a, b in zip(runs, others, strict=True))


def transformers_table(engine: OfflineEngine, folder: Path, requests: Workload, repeats: int, batch: int) -> list[Row]:
    """kvrelay and transformers in turn, in this process."""
    generates: dict[str, Generate] = {
        "kvrelay, continuous": lambda requests: sum(map(len, engine.run(requests, "continuous").tokens)),
        "transformers, continuous batching": load_transformers_continuous(folder),
        f"transformers, generate, batch {batch}": load_transformers_static(folder, batch),
    }
    found: dict[str, list[float]] = defaultdict(list)
    for index in range(repeats):
        for name in list(generates)[:: -1 if index % 2 else 1]:
            found[name].append(timed(generates[name], requests))
            log(f"  {name}: {found[name][-1]:.0f} tokens/s")
    ours = found["kvrelay, continuous"]
    return [
        {
            "engine": name,
            "tokens/s": measure(found[name]),
            "kvrelay is times as fast": measure(a / b for a, b in zip(ours, found[name], strict=True)),
        }
        for name in generates
    ]


def timed(generate: Callable[[Workload], int], requests: Workload) -> float:
    """Output tokens per second, after a warm-up.

    Raises:
        RuntimeError: it produced fewer or more tokens than it was asked for.
    """
    generate([(prompt[:64], 4) for prompt, _ in requests[:4]])
    started = time.perf_counter()
    produced = generate(requests)
    seconds = time.perf_counter() - started
    if produced != output_tokens(requests):
        raise RuntimeError(f"{produced} tokens, expected {output_tokens(requests)}")
    return produced / seconds


def log(line: str) -> None:
    """Says how far we are."""
    print(line, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path.home() / ".cache" / "kvrelay-benchmarks"
    parser.add_argument("--folder", type=Path, default=default, help="for the checkpoint")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--distributions", nargs="+", choices=DISTRIBUTIONS, default=list(DISTRIBUTIONS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["continuous", "static", "unbatched"])
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--transformers", action=argparse.BooleanOptionalAction, default=True)
    results.add_flags(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shape, arguments.requests, arguments.repeats = "tiny", 16, 1
    if "continuous" not in arguments.modes:
        parser.error("--modes: continuous is what the others are compared with")
    return arguments


def main() -> None:
    arguments = parse()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    folder = make(arguments.folder.expanduser() / arguments.shape, arguments.shape)
    settings = EngineSettings(dtype="float32", max_num_sequences=max(64, *arguments.batches))
    engine = OfflineEngine(folder, settings, arguments.threads)
    engine.warm_up()
    pairs = [(mode, batch) for mode in arguments.modes if mode != "unbatched" for batch in arguments.batches]
    cases = [Case(*pair) for pair in pairs] + [Case("unbatched", 1)] * ("unbatched" in arguments.modes)
    tables: dict[str, list[Row]] = defaultdict(list)
    for distribution in arguments.distributions:
        log(distribution)
        runs = run_modes(engine, workload(distribution, arguments.requests), cases, arguments.repeats)
        tables["engine-equal"] += equal_table(distribution, runs)
        tables["engine-best"] += best_table(distribution, runs)
        tables["engine-runs"] += runs_table(distribution, runs)
    if arguments.transformers:
        log("transformers, on the distribution peers")
        requests = workload("peers", arguments.requests)
        tables["engine-transformers"] = transformers_table(engine, folder, requests, arguments.repeats, batch=8)
    publish(tables, arguments)


def publish(tables: Mapping[str, list[Row]], arguments: argparse.Namespace) -> None:
    """Prints and writes the tables."""
    results.publish("engine-ideal", ideal_table(), arguments, caption=f"{IDEAL_REQUESTS} requests, by arithmetic.")
    caption = f"{arguments.requests} requests on the {arguments.shape} shape, float32, {arguments.threads} threads."
    for name, rows in tables.items():
        results.publish(name, rows, arguments, caption=caption)


if __name__ == "__main__":
    main()
