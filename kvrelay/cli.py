"""The command line, and the composition root: the only file that knows all services."""

import argparse
import asyncio
import contextlib
import difflib
import os
import sys
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import fields
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvrelay import commands, config, failpoints, telemetry
from kvrelay.control.cluster_key import load_cluster_key
from kvrelay.engine.checkpoint import check_checkpoint, resolve_checkpoint
from kvrelay.errors import ConfigurationError, KvrelayError
from kvrelay.lifetime import StopRequest, start_logging
from kvrelay.request import WorkerRole
from kvrelay.settings import ClusterSettings, EngineSettings, Settings

if TYPE_CHECKING:
    from kvrelay.worker import Part, Resources

__all__ = ["main"]

Run = Callable[[argparse.Namespace], int]

FAILED, BAD_CONFIGURATION, INTERRUPTED = 1, 2, 130
_WORKER_GROUPS = ("cluster", "worker", "engine", "transfer")
# What a command does not look at is no flag of it. A file or the environment may name it all the same, for others.
_COUNTS = {"prefill", "decode"}
_OF_ONE_WORKER = {"worker_id", "worker_port", "advertise_port", "local_rank", "local_size"}
_OF_DECODE = {"itl_limit", "transport", "require_transport", "checksum"}
_NOT_OF_GATEWAY = {field.name for field in fields(EngineSettings)} - {"model", "served_model_name", "context_length"}
_NOT_OF_GATEWAY |= {"worker_port", "advertise_port", "stuck_seconds"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; answers its exit code: 0, 1 failed, 2 bad configuration, 130 interrupted."""
    parsed, unknown = _parser().parse_known_args(arguments)
    if unknown:
        return _complain(_unknown(unknown[0], vars(parsed).keys() - {"run", "prompt"}), BAD_CONFIGURATION)
    try:
        result: int = parsed.run(parsed)
    except ConfigurationError as error:
        return _complain(str(error), BAD_CONFIGURATION)
    except KvrelayError as error:
        return _complain(f"{error.code}: {error.message}", FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has enough; nothing may be written to it at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    return result


def _complain(text: str, exit_code: int) -> int:
    print(f"kvrelay: {text}", file=sys.stderr)
    return exit_code


def _unknown(argument: str, names: Iterable[str]) -> str:
    if not argument.startswith("-"):
        return f"{argument!r}: one argument too many; a text with spaces is quoted"
    flag = argument.partition("=")[0]
    nearest = difflib.get_close_matches(flag, ["--" + name.replace("_", "-") for name in names], n=1)
    return f"{flag}: unknown flag; " + (f"did you mean {nearest[0]}?" if nearest else "--help shows the valid ones")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvrelay", description="A gRPC service for language models.")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, help: str, run: Run, groups: Iterable[str], leave_out: Iterable[str]) -> None:
        command = subparsers.add_parser(name, help=help, description=help, allow_abbrev=False)
        config.add_flags(command, groups, leave_out=leave_out)
        command.set_defaults(run=run)

    everything = (group.name for group in fields(Settings))
    add("up", "start a cluster on this machine: Redis, a gateway and workers", _up, everything, _OF_ONE_WORKER)
    of_gateway = ("cluster", "gateway", "worker", "engine")
    add("gateway", "run one gateway", _gateway, of_gateway, _COUNTS | _NOT_OF_GATEWAY)
    add("prefill", "run one prefill worker", _prefill, _WORKER_GROUPS, _COUNTS | _OF_DECODE)
    add("decode", "run one decode worker", _decode, _WORKER_GROUPS, _COUNTS)
    commands.add_to(subparsers)
    return parser


def _up(arguments: argparse.Namespace) -> int:
    from kvrelay.supervisor import Supervisor, run_directory

    settings = _settings(arguments)
    check_checkpoint(resolve_checkpoint(settings.engine.model))

    async def run(run_dir: Path) -> int:
        stopping = StopRequest()
        await Supervisor(settings, run_dir, _report).run(stopping)
        return INTERRUPTED if stopping.interrupted else 0

    with run_directory(settings.cluster.run_dir) as run_dir:
        return asyncio.run(run(run_dir))


def _report(line: str) -> None:
    # Nobody may read it any more, which is no reason for a cluster to end.
    with contextlib.suppress(BrokenPipeError):
        print(f"kvrelay: {line}", flush=True)


def _gateway(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    from gateway.process import run_gateway

    return _serve("gateway", settings, run_gateway(settings, _cluster_key(settings)))


def _prefill(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    _prepare_torch()
    from prefill_worker.service import PrefillWorker

    return _work(WorkerRole.PREFILL, settings, PrefillWorker)


def _decode(arguments: argparse.Namespace) -> int:
    settings = _settings(arguments)
    _prepare_torch()
    from decode_worker.service import DecodeWorker

    return _work(WorkerRole.DECODE, settings, DecodeWorker)


def _prepare_torch() -> None:
    """Before torch is imported, which only workers do."""
    # Threads that spin while they wait for work would take the cores from the other processes of the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _work(role: WorkerRole, settings: Settings, build: "Callable[[Resources], Part]") -> int:
    from kvrelay.worker import run_worker

    return _serve(role.value, settings, run_worker(role, settings, _cluster_key(settings), build))


def _settings(arguments: argparse.Namespace) -> Settings:
    settings = config.load(vars(arguments))
    failpoints.arm(os.environ.get(failpoints.VARIABLE, ""))
    start_logging(settings.cluster.log_level)
    _check_host(settings.cluster)
    return settings


def _check_host(cluster: ClusterSettings) -> None:
    if not cluster.insecure_bind and not _is_loopback(cluster.host):
        raise ConfigurationError(
            f"--host {cluster.host}: other machines could reach it, and nothing authenticates them; "
            "keep 127.0.0.1, or say --insecure-bind where the network itself keeps others out"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _cluster_key(settings: Settings) -> bytes:
    cluster = settings.cluster
    if not cluster.redis:
        raise ConfigurationError("--redis: a single process needs the URL of the cluster's Redis; `up` brings its own")
    if not cluster.key_file and not cluster.run_dir:
        raise ConfigurationError("--key-file: the processes of a cluster share a key; name its file")
    return load_cluster_key(Path(cluster.key_file or Path(cluster.run_dir, "cluster.key")))


def _serve(service: str, settings: Settings, running: Coroutine[Any, Any, int]) -> int:
    telemetry.configure(f"kvrelay-{service}", settings.worker.id_of(service))
    try:
        return asyncio.run(running)
    finally:
        telemetry.shutdown()
