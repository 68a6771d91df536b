"""The commands that talk to a running cluster, and `doctor`."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from kvrelay.bench import command as bench
from kvrelay.client import Client
from kvrelay.client.connection_errors import readable_connection_errors
from kvrelay.errors import KvrelayError
from kvrelay.request import Chunk, ClusterStatus, HeldBlocks, Timings
from kvrelay.restart import restart_workers

__all__ = ["add_to"]

Run = Callable[[argparse.Namespace], int]


def add_to(subparsers: Any) -> None:
    """Adds the commands to the command line's parser."""
    generate = _add(subparsers, "generate", "complete a prompt", _generate)
    generate.add_argument("prompt", metavar="PROMPT")
    generate.add_argument("--timings", action="store_true", help="say on stderr where the time went")
    _add_sampling(generate)
    chat = _add(subparsers, "chat", "talk with the model; end with Ctrl-D", _chat)
    _add_sampling(chat)
    _add(subparsers, "status", "workers, gateways and the queue", _status)
    blocks = _add(subparsers, "blocks", "every KV block that is held, by whom and why", _blocks)
    blocks.epilog = (
        "OWNER is who has to end it: the gateway whose request it is or, once a decode worker has pulled from a lease, "
        "that worker. A lease whose call is over ends by itself. No owner: the blocks are about to be free."
    )
    restart = _add(subparsers, "restart", "restart the workers of a cluster on this machine", _restart)
    restart.add_argument("--rolling", action="store_true", help="one after the other, so that no request is lost")
    restart.add_argument("--patience", type=float, default=120.0, metavar="SECONDS", help="for one worker")
    bench.add_to(subparsers)
    doctor = _add(subparsers, "doctor", "check this machine, and a cluster if one is running", _doctor)
    doctor.add_argument("--model", default="demo", help="checkpoint to check (default: %(default)s)")


def _add(subparsers: Any, name: str, help: str, run: Run) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = subparsers.add_parser(name, help=help, description=help, allow_abbrev=False)
    command.add_argument("--target", metavar="HOST:PORT", help="gateway (KVRELAY_TARGET, else localhost:50051)")
    command.add_argument("--json", action="store_true", help="one JSON object a line")
    command.set_defaults(run=run)
    return command


def _add_sampling(command: argparse.ArgumentParser) -> None:
    for flag, kind in (
        ("--max-tokens", int),
        ("--temperature", float),
        ("--top-p", float),
        ("--top-k", int),
        ("--min-p", float),
        ("--seed", int),
        ("--logprobs", int),
    ):
        command.add_argument(flag, type=kind, metavar="N")
    command.add_argument("--stop", action="append", metavar="TEXT", help="may be given more than once")
    command.add_argument("--ignore-eos", action="store_true", default=None)
    command.add_argument("--timeout", type=float, metavar="SECONDS")


_OPTIONS = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "logprobs",
    "stop",
    "ignore_eos",
    "timeout",
)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    values = vars(arguments)
    return {name: values[name] for name in _OPTIONS if values[name] is not None}


def _generate(arguments: argparse.Namespace) -> int:
    with _connected(arguments) as client:
        _stream(client, arguments, prompt=arguments.prompt)
    return 0


@contextlib.contextmanager
def _connected(arguments: argparse.Namespace, timeout: float | None = None) -> Iterator[Client]:
    """A client, and a word for the user when the connection fails."""
    with Client(arguments.target, timeout=timeout) as client, readable_connection_errors(client.target):
        yield client


def _stream(client: Client, arguments: argparse.Namespace, **prompt: Any) -> str:
    """Prints a completion while it comes; answers with its text."""
    text = ""
    with client.generate(**prompt, **_options(arguments)) as stream:
        for chunk in stream:
            text += chunk.text
            print(_as_json(chunk) if arguments.json else chunk.text, end="\n" if arguments.json else "", flush=True)
            if chunk.timings is not None and getattr(arguments, "timings", False):
                _print_timings(chunk, chunk.timings)
    if not arguments.json:
        print()
    return text


def _as_json(chunk: Chunk) -> str:
    fields = asdict(chunk)
    fields["finish_reason"] = chunk.finish_reason.name if chunk.finish_reason else None
    return json.dumps(fields, ensure_ascii=False)


def _print_timings(chunk: Chunk, timings: Timings) -> None:
    usage = chunk.usage
    remarks = {
        "queue": "gateway and workers",
        "prefill": f"{usage.prompt_tokens} tokens, {usage.cached_tokens} cached" if usage else "",
        "transfer": "what overlap with prefill did not hide",
        "decode": f"{usage.completion_tokens} tokens" if usage else "",
        "other": "between them",
        "total": f"first token after {timings.time_to_first_token * 1000:.0f} ms",
    }
    print("\n", file=sys.stderr)
    for name, seconds in (*timings.stages().items(), ("total", timings.total)):
        print(f"  {name:<9}{seconds * 1000:>9.1f} ms  {remarks[name]}", file=sys.stderr)


def _chat(arguments: argparse.Namespace) -> int:
    messages: list[dict[str, str]] = []
    with _connected(arguments) as client:
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                return 0
            messages.append({"role": "user", "content": line})
            try:
                with readable_connection_errors(client.target):
                    answer = _stream(client, arguments, messages=messages)
            except KvrelayError as error:
                print(f"{error.code}: {error.message}", file=sys.stderr)
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})


def _status(arguments: argparse.Namespace) -> int:
    with _connected(arguments, timeout=10.0) as client:
        status = client.status()
    if arguments.json:
        print(json.dumps(asdict(status)))
    else:
        _print_status(status)
    return 0


def _print_status(status: ClusterStatus) -> None:
    header = ("WORKER", "ROLE", "STATE", "RUNNING", "WAITING", "BLOCKS FREE", "HELD", "MEMORY", "PID", "LINKS")
    rows = [
        (
            worker.id,
            worker.role.value,
            worker.state.value,
            str(worker.running),
            str(worker.waiting),
            f"{worker.blocks_free}/{worker.blocks_total}",
            str(worker.blocks_held),
            f"{worker.memory_bytes >> 20} MiB",
            str(worker.pid),
            "; ".join(map(str, worker.links)),
        )
        for worker in status.workers
    ]
    _print_table([header, *rows])
    for gateway in status.gateways:
        print(f"gateway {gateway.id} at {gateway.address}, pid {gateway.pid}")
    queue = status.queue
    print(f"queue: {queue.waiting} waiting, {queue.running} running, room for {queue.capacity}")


def _restart(arguments: argparse.Namespace) -> int:
    def report(line: str) -> None:
        print(json.dumps({"event": line}) if arguments.json else line, flush=True)

    with _connected(arguments, timeout=10.0) as client:
        restart_workers(client, rolling=arguments.rolling, patience=arguments.patience, report=report)
    return 0


def _blocks(arguments: argparse.Namespace) -> int:
    with _connected(arguments, timeout=10.0) as client:
        held = client.held_blocks()
    if arguments.json:
        for entry in held:
            print(json.dumps(asdict(entry)))
        return 0
    rows = [_blocks_row(entry) for entry in held]
    _print_table([("WORKER", "REQUEST", "STATE", "OWNER", "BLOCKS", "AGE", "LEASE ENDS"), *rows])
    print(f"{sum(len(entry.block_ids) for entry in held)} blocks are held")
    return 0


def _blocks_row(entry: HeldBlocks) -> Sequence[str]:
    lease = "with its call" if entry.lease_seconds is None else f"in {entry.lease_seconds:.1f} s"
    count = str(len(entry.block_ids))
    age = f"{entry.age_seconds:.1f} s"
    return (entry.worker_id, entry.request_id, entry.state, entry.owner, count, age, lease)


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _doctor(arguments: argparse.Namespace) -> int:
    from kvrelay.doctor import examine

    findings = examine(arguments.model, arguments.target)
    for finding in findings:
        if arguments.json:
            print(json.dumps(asdict(finding)))
        else:
            print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.subject:<12}{finding.text}")
    return 0 if all(finding.ok for finding in findings) else 1
