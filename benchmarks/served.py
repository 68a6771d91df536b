"""Served against offline: what is left of the engine's speed when its work goes through a whole cluster.

    python -m benchmarks.served [--requests 384] [--rounds 3] [--model FOLDER] [--update-docs]

Both do the same work, the mixed lengths of `benchmarks.workloads.peers_workload`, on the same cores and in turns:

- offline: one process, one engine that computes prompts and completions, `--threads` threads, all requests at once;
- served: `kvrelay up` with one prefill and one decode worker, and a client process that keeps `--streams` streams
  busy; Redis, gateway, workers and client share the cores.

At most `--streams` sequences run at a time in either. Each round has prompts of its own, so that no prefix is cached.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.checkpoints import make
from benchmarks.offline import OfflineEngine
from benchmarks.processes import REPOSITORY, cluster, cpu_seconds
from benchmarks.results import Row, add_flags, measure, publish
from benchmarks.stream_load import Observed, percentile, run_streams
from benchmarks.workloads import Workload, output_tokens, peers_workload
from kvrelay import AsyncClient
from kvrelay.request import ClusterStatus
from kvrelay.settings import EngineSettings

__all__ = ["Outcome", "main", "run_offline", "run_served"]

WARM_UP_REQUESTS = 16
CAPTION = (
    "One workload offline, and served by one prefill and one decode worker with client, gateway and Redis on the same "
    "cores. A token's CPU is that of all processes of the way."
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One way, once.

    Attributes:
        cpu_seconds: while it worked, by process.
        first_token_p50: seconds.
        response_p50: seconds between two responses of a stream.
    """

    tokens: int
    seconds: float
    cpu_seconds: dict[str, float]
    first_token_p50: float = 0.0
    response_p50: float = 0.0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def cpu_per_token(self) -> float:
        return sum(self.cpu_seconds.values()) / self.tokens


def run_offline(model: Path, work: Workload, streams: int, threads: int) -> Outcome:
    """The work in this process."""
    engine = OfflineEngine(model, EngineSettings(dtype="float32", max_num_sequences=streams), threads)
    engine.run(peers_workload(WARM_UP_REQUESTS, seed=1000))
    before = cpu_seconds(os.getpid())
    run = engine.run(work)
    return Outcome(output_tokens(work), run.seconds, {"offline": cpu_seconds(os.getpid()) - before})


async def run_served(target: str, work: Workload, streams: int) -> Outcome:
    """The work through a cluster, with the clients in this process."""
    seen = Observed()
    async with AsyncClient(target) as client:
        warm_up = peers_workload(WARM_UP_REQUESTS, seed=1000 + os.getpid())
        await run_streams(client, warm_up, streams, Observed())
        processes = _processes(await client.status())
        before = {name: cpu_seconds(pid) for name, pid in processes.items()}
        started = time.perf_counter()
        await run_streams(client, work, streams, seen)
        seconds = time.perf_counter() - started
    return Outcome(
        tokens=seen.tokens,
        seconds=seconds,
        cpu_seconds={name: cpu_seconds(pid) - before[name] for name, pid in processes.items()},
        first_token_p50=percentile(seen.first_token_times, 50),
        response_p50=percentile(seen.inter_token_times, 50),
    )


def _processes(status: ClusterStatus) -> dict[str, int]:
    workers = {worker.role.value: worker.pid for worker in status.workers}
    return {**workers, "gateway": status.gateways[0].pid, "client": os.getpid()}


def _in_a_process(way: str, target: str, arguments: argparse.Namespace, seed: int) -> Outcome:
    command = [sys.executable, "-m", "benchmarks.served", "--way", way, "--target", target, "--seed", str(seed)]
    for name in ("model", "requests", "streams", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "GRPC_VERBOSITY": "NONE"}
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=REPOSITORY, env=environment, check=True)
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))


def _rows(offline: Sequence[Outcome], served: Sequence[Outcome]) -> list[Row]:
    ratios = [after.rate / before.rate for before, after in zip(offline, served, strict=True)]
    ways: list[Row] = []
    for way, outcomes in (("offline", offline), ("served", served)):
        row: Row = {
            "way": way,
            "output tokens/s": measure(outcome.rate for outcome in outcomes),
            "CPU per token, ms": measure(1e3 * outcome.cpu_per_token for outcome in outcomes),
            "CPU": _shares(outcomes),
        }
        ways.append(row)
    seen: Row = {
        "of the offline rate": measure(ratios),
        "time to first token p50, ms": measure(1e3 * outcome.first_token_p50 for outcome in served),
        "between responses p50, ms": measure(1e3 * outcome.response_p50 for outcome in served),
    }
    return [ways[0], {**ways[1], **seen}]


def _shares(outcomes: Sequence[Outcome]) -> str:
    seconds = {name: sum(outcome.cpu_seconds[name] for outcome in outcomes) for name in outcomes[0].cpu_seconds}
    total = sum(seconds.values())
    return ", ".join(f"{name} {100 * value / total:.0f}%" for name, value in seconds.items())


def _run_rounds(arguments: argparse.Namespace) -> None:
    offline, served = [], []
    with tempfile.TemporaryDirectory(prefix="kvrelay-benchmark-") as name:
        folder = Path(name)
        arguments.model = arguments.model or make(folder / "small", "small")
        settings: dict[str, object] = {"model": arguments.model, "dtype": "float32", "disaggregation": "always"}
        settings |= {"max_num_sequences": arguments.streams, "threads": arguments.worker_threads}
        with cluster(folder, arguments.port, **settings) as target:
            for seed in range(arguments.seed, arguments.seed + arguments.rounds):
                offline.append(_in_a_process("offline", target, arguments, seed))
                served.append(_in_a_process("served", target, arguments, seed))
    publish("served", _rows(offline, served), arguments, caption=CAPTION)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint folder; the shape small is made if left out")
    parser.add_argument("--requests", type=int, default=384)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the offline engine")
    parser.add_argument("--worker-threads", type=int, default=0, help="of each worker; 0 as `kvrelay up` chooses")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=50952)
    parser.add_argument("--way", choices=("both", "offline", "served"), default="both", help="one, once, as JSON")
    parser.add_argument("--target", default="", help="of --way served")
    add_flags(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.requests = 1, 48
    if arguments.way == "both":
        _run_rounds(arguments)
        return
    work = peers_workload(arguments.requests, arguments.seed)
    if arguments.way == "offline":
        outcome = run_offline(arguments.model, work, arguments.streams, arguments.threads)
    else:
        outcome = asyncio.run(run_served(arguments.target, work, arguments.streams))
    print(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main()
