"""What the gateway itself costs: streamed tokens per second of its CPU, at 64 streams and several step rates.

    python -m benchmarks.gateway [--rates 20 50 100 0] [--seconds 5] [--update-docs]

A real gateway with a real Redis, real clients in another process, and workers that compute nothing
(`benchmarks.scripted_workers`): one frame per step, with one token for each stream. Rate 0 makes steps as fast as the
gateway takes them. All that the gateway does in the window counts, also the beginning and the end of requests.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.processes import REPOSITORY, spawn, wait_until_served
from benchmarks.results import Row, add_flags, publish
from benchmarks.stream_load import Load
from kvrelay.control.private_redis import PrivateRedis

__all__ = ["main"]

MODEL = "scripted"
READY_SECONDS = 30.0


@contextlib.contextmanager
def running_gateway(folder: Path, port: int) -> Iterator[tuple[PrivateRedis, int]]:
    """Redis and the gateway's process id."""
    redis = PrivateRedis(folder / "redis")
    redis.start()
    try:
        flags = {
            "--port": port,
            "--redis": redis.url,
            "--key-file": folder / "key",
            "--model": "demo",
            "--served-model-name": MODEL,
            "--disaggregation": "always",
        }
        arguments = ["gateway", *(str(word) for pair in flags.items() for word in pair)]
        with spawn("kvrelay", arguments, folder / "gateway.log") as process:
            yield redis, process.pid
    finally:
        redis.stop()


def measure(folder: Path, port: int, redis: PrivateRedis, pid: int, rate: float, arguments: argparse.Namespace) -> Load:
    """One row: new workers of this rate, and a load of `arguments.streams` streams."""
    flags = ["--redis", redis.url, "--key-file", folder / "key", "--model", MODEL, "--steps-per-second", rate]
    with spawn("benchmarks.scripted_workers", flags, folder / "workers.log"):
        target = f"127.0.0.1:{port}"
        wait_until_served(target, READY_SECONDS)
        command = [sys.executable, "-m", "benchmarks.stream_load", "--target", target, "--watch", str(pid)]
        for name in ("streams", "output_tokens", "warm_up", "seconds"):
            command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
        done = subprocess.run(command, stdout=subprocess.PIPE, cwd=REPOSITORY, check=True)
    return Load(**json.loads(done.stdout))


def _row(rate: float, load: Load) -> Row:
    return {
        "steps/s": f"{rate:g}" if rate else "as fast as taken",
        "tokens/s": load.tokens / load.seconds,
        "tokens per response": load.tokens / load.responses,
        "gateway: tokens per CPU second": load.tokens / load.server_cpu_seconds,
        "client: tokens per CPU second": load.tokens / load.client_cpu_seconds,
        "time to first token p50, ms": 1e3 * load.first_token_p50,
        "p99, ms": 1e3 * load.first_token_p99,
        "between responses p50, ms": 1e3 * load.inter_token_p50,
        "gateway, MiB": load.server_memory / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[20.0, 50.0, 100.0, 0.0], help="steps per second")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=256, help="of each request")
    parser.add_argument("--warm-up", type=float, default=2.0, help="seconds")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--port", type=int, default=50951)
    add_flags(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rates, arguments.seconds = [50.0], 2.0
    with tempfile.TemporaryDirectory(prefix="kvrelay-benchmark-") as name:
        folder = Path(name)
        with running_gateway(folder, arguments.port) as (redis, pid):
            rows = [
                _row(rate, measure(folder, arguments.port, redis, pid, rate, arguments)) for rate in arguments.rates
            ]
    publish("gateway", rows, arguments, caption=f"{arguments.streams} streams; workers that compute nothing.")


if __name__ == "__main__":
    main()
