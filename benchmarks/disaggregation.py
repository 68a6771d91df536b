"""What the handover is worth: prompts and completions on the same workers, on separate ones, or as costs decide.

    python -m benchmarks.disaggregation [--rounds 3] [--seconds 8] [--traffic short long prefixes] [--update-docs]

Every way has two workers of one thread each, which stand for two devices:

- colocated: both compute prompts and completions, prompts in chunks beside streams (`--disaggregation never`);
- whole prompts: the same without chunks, so that streams wait for whole prompts, as servers did before chunked prefill;
- disaggregated: one prefill and one decode worker (`always`);
- auto: the same workers, and each request goes the way that costs less (`auto`).

`kvrelay bench` sends the load and measures. Arrivals are Poisson, and the same for all ways of a round; the ways take
turns within each round, each with a new cluster.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import CONTEXT_LENGTH, make
from benchmarks.processes import REPOSITORY, cluster
from benchmarks.results import Row, add_flags, measure, publish
from kvrelay.bench.traces import HASH_BLOCK_TOKENS

__all__ = ["TRAFFIC", "WAYS", "Traffic", "main", "write_trace"]

WAYS: Mapping[str, Mapping[str, object]] = {
    "colocated": {"disaggregation": "never"},
    "whole prompts": {"disaggregation": "never", "itl_limit": 0, "max_batched_tokens": CONTEXT_LENGTH},
    "disaggregated": {"disaggregation": "always"},
    "auto": {"disaggregation": "auto"},
}
SHORT_TOKENS, LONG_TOKENS, OUTPUT_TOKENS = 32, 1500, 64
LONG_EVERY = 6
NUM_PREFIXES, PREFIX_BLOCKS = 4, 2
WARM_UP_REQUESTS = 12
LIMITS = {"--slo-ttft": 2.0, "--slo-gap": 0.2}

Request = dict[str, Any]  # of a trace in Mooncake's format


def _request(input_tokens: int, hash_ids: Sequence[int] = ()) -> Request:
    return {
        "timestamp": 0,
        "input_length": input_tokens,
        "output_length": OUTPUT_TOKENS,
        "hash_ids": list(hash_ids),
    }


def _short(rng: random.Random, index: int) -> Request:
    return _request(SHORT_TOKENS)


def _long(rng: random.Random, index: int) -> Request:
    return _request(LONG_TOKENS if index % LONG_EVERY == LONG_EVERY - 1 else SHORT_TOKENS)


def _prefixes(rng: random.Random, index: int) -> Request:
    first = PREFIX_BLOCKS * rng.randrange(NUM_PREFIXES)
    return _request(PREFIX_BLOCKS * HASH_BLOCK_TOKENS + SHORT_TOKENS, range(first, first + PREFIX_BLOCKS))


@dataclass(frozen=True, slots=True)
class Traffic:
    """What is asked.

    Attributes:
        rate: requests per second, well below what every way can serve.
        request: the request of an index.
    """

    rate: float
    about: str
    request: Callable[[random.Random, int], Request]


TRAFFIC: Mapping[str, Traffic] = {
    "short": Traffic(6.0, f"prompts of {SHORT_TOKENS} tokens", _short),
    "long": Traffic(3.0, f"the same, and one in {LONG_EVERY} of {LONG_TOKENS:,}", _long),
    "prefixes": Traffic(
        3.0,
        f"one of {NUM_PREFIXES} prefixes of {PREFIX_BLOCKS * HASH_BLOCK_TOKENS:,} tokens and {SHORT_TOKENS} of its own",
        _prefixes,
    ),
}


def write_trace(path: Path, traffic: Traffic, count: int, seed: int) -> Path:
    """Writes so many requests in Mooncake's format; answers the path."""
    rng = random.Random(seed)
    lines = [json.dumps(traffic.request(rng, index)) + "\n" for index in range(count)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def run_load(target: str, trace: Path, rate: float, seed: int) -> Mapping[str, Any]:
    """The summary of `kvrelay bench`.

    Raises:
        RuntimeError: a request failed.
    """
    flags = {"--target": target, "--trace": trace, "--trace-format": "mooncake", "--rate": rate, "--seed": seed}
    flags |= {"--warmup": WARM_UP_REQUESTS, **LIMITS}
    command = [
        sys.executable,
        "-m",
        "kvrelay",
        "bench",
        "--json",
        *(str(word) for pair in flags.items() for word in pair),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=REPOSITORY, check=True)
    summary: Mapping[str, Any] = json.loads(done.stdout)["summary"]
    if summary["failed"]:
        raise RuntimeError(f"{summary['failed']} requests failed: {summary['errors']}")
    return summary


def _row(traffic: str, way: str, summaries: Iterable[Mapping[str, Any]]) -> Row:
    summaries = list(summaries)

    def milliseconds(distribution: str, statistic: str) -> Any:
        return measure(1e3 * summary[distribution][statistic] for summary in summaries)

    return {
        "traffic": traffic,
        "way": way,
        "time to first token p50, ms": milliseconds("ttft", "p50"),
        "first token p99, ms": milliseconds("ttft", "p99"),
        "between tokens p50, ms": milliseconds("itl", "p50"),
        "p99, ms": milliseconds("itl", "p99"),
        "longest, ms": milliseconds("itl", "maximum"),
        "goodput, % of requests": measure(100 * summary["goodput"]["share"] for summary in summaries),
    }


def run_rounds(arguments: argparse.Namespace, folder: Path) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Summaries of all rounds by traffic and way."""
    model = arguments.model or make(folder / "small", "small")
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {
        (traffic, way): [] for traffic in arguments.traffic for way in arguments.ways
    }
    for seed in range(arguments.seed, arguments.seed + arguments.rounds):
        for way in arguments.ways:
            place = folder / f"{seed}-{way.replace(' ', '-')}"
            place.mkdir()
            with cluster(place, arguments.port, model=model, threads=1, dtype="float32", **WAYS[way]) as target:
                for name in arguments.traffic:
                    traffic = TRAFFIC[name]
                    count = max(1, round(traffic.rate * arguments.seconds))
                    trace = write_trace(place / f"{name}.jsonl", traffic, count, seed)
                    found[name, way].append(run_load(target, trace, traffic.rate, seed))
                    print(f"round {seed}: {name}, {way}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint folder; the shape small is made if left out")
    parser.add_argument("--traffic", nargs="+", choices=TRAFFIC, default=list(TRAFFIC))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seconds", type=float, default=8.0, help="in which the requests of one load arrive")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=50954)
    add_flags(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.seconds = 1, 4.0
    with tempfile.TemporaryDirectory(prefix="kvrelay-benchmark-") as name:
        found = run_rounds(arguments, Path(name))
    rows = [_row(traffic, way, summaries) for (traffic, way), summaries in found.items()]
    asked = "; ".join(f"{name}: {TRAFFIC[name].about}, {TRAFFIC[name].rate:g} requests/s" for name in arguments.traffic)
    limits = f"the first token within {LIMITS['--slo-ttft']:g} s and no later gap over {LIMITS['--slo-gap']:g} s"
    caption = (
        f"Two workers of one thread each, the small shape in float32, Poisson arrivals, {OUTPUT_TOKENS} output tokens. "
        f"{asked[0].upper()}{asked[1:]}. Goodput counts requests with {limits}."
    )
    publish("disaggregation", rows, arguments, caption=caption)


if __name__ == "__main__":
    main()
