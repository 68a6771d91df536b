"""What a benchmark found: one JSON file for each table, with the machine, the command and the versions it came from.

A benchmark makes its rows, calls `publish`, and is done:

    rows = [{"mode": "continuous", "batch": 32, "tokens/s": measure(rates)}, ...]
    publish("engine", rows, arguments, caption="What was measured, in a sentence.")

`benchmarks.tables` puts the tables into the documents.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

__all__ = ["FOLDER", "Cell", "Measure", "Result", "Row", "add_flags", "load", "measure", "publish", "save"]

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("kvrelay", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure that was measured several times."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        least, most = _number(self.least), _number(self.most)
        return _number(self.median) + (f" ({least}–{most})" if least != most else "")


Cell = str | int | float | Measure | None
Row = Mapping[str, Cell]


@dataclass(frozen=True, slots=True)
class Result:
    """One table, and where it comes from.

    Attributes:
        rows: from column to cell; the first row's order is the table's.
        machine: processor, cores, memory, and the device if that is not the processor.
        versions: of Python and the packages that were measured.
    """

    name: str
    command: str
    rows: Sequence[Row]
    caption: str = ""
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    machine: Mapping[str, str] = field(default_factory=lambda: machine())
    versions: Mapping[str, str] = field(default_factory=lambda: versions(PACKAGES))

    def markdown(self) -> str:
        """The table, the caption and the source, as they stand in the documents."""
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        lines = [columns, ["---"] * len(columns)]
        lines += [[_text(row.get(column)) for column in columns] for row in self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        where = ", ".join(self.machine.values())
        which = ", ".join(f"{package} {version}" for package, version in self.versions.items())
        spread = any(isinstance(cell, Measure) for row in self.rows for cell in row.values())
        notes = [self.caption, "Medians, with least and most in brackets." if spread else ""]
        source = f"`{self.command}` on {self.date}; {where}; {which}."
        return f"{table}\n\n{' '.join(filter(None, [*notes, source]))}\n"


def measure(values: Iterable[float]) -> Measure:
    """The median and the spread of repeated measurements.

    Raises:
        ValueError: there is none.
    """
    values = list(values)
    if not values:
        raise ValueError("nothing was measured")
    return Measure(statistics.median(values), min(values), max(values))


def machine(device: str = "") -> dict[str, str]:
    """What this machine is; `device` names the GPU if one was measured."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    facts = {"processor": _processor(), "cores": f"{cores} cores", "memory": f"{memory:.0f} GiB"}
    return {**facts, "device": device} if device else facts


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of those packages that are installed here."""
    found = {"Python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def save(result: Result, folder: Path = FOLDER) -> Path:
    """Writes the result to `folder/NAME.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.name}.json"
    path.write_text(json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def load(path: Path) -> Result:
    """Reads what `save` wrote."""
    values = json.loads(path.read_text(encoding="utf-8"))
    rows = [{column: _cell(cell) for column, cell in row.items()} for row in values.pop("rows")]
    return Result(rows=rows, **values)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say where a result goes."""
    parser.add_argument("--results", type=Path, default=FOLDER, metavar="FOLDER", help="where the JSON files go")
    parser.add_argument("--update-docs", action="store_true", help="put the tables into the documents, too")
    parser.add_argument("--quick", action="store_true", help="see that it runs: small, once, and nothing is written")


def publish(
    name: str,
    rows: Sequence[Row],
    arguments: argparse.Namespace,
    *,
    caption: str = "",
    device: str = "",
    packages: Mapping[str, str] | None = None,
) -> Result:
    """Prints a table; writes it as JSON, and into the documents, as the flags of `add_flags` say.

    Args:
        name: of the JSON file, and of the section of the documents.
        caption: what was measured, in whole sentences.
        device: the GPU, if one was measured.
        packages: versions, where they are not those of this process.
    """
    result = Result(name, _command(), rows, caption, machine=machine(device), versions=packages or versions(PACKAGES))
    print(result.markdown(), flush=True)
    if not arguments.quick:
        print(f"written to {save(result, arguments.results)}", file=sys.stderr)
        if arguments.update_docs:
            from benchmarks.tables import update_documents

            update_documents(arguments.results)
    return result


def _command() -> str:
    """As one would type it: how this process was started, without the flags that only say where results go."""
    module = sys.modules["__main__"].__spec__
    words = ["python", "-m", module.name] if module else ["python", sys.argv[0]]
    return shlex.join([*words, *(word for word in sys.argv[1:] if word != "--update-docs")])


def _cell(cell: object) -> Cell:
    if isinstance(cell, dict):
        return Measure(**cell)
    return cell if isinstance(cell, (str, int, float)) else None


def _text(cell: Cell) -> str:
    if cell is None:
        return "–"
    return _number(cell) if isinstance(cell, (int, float)) else str(cell)


def _number(value: float) -> str:
    """Three significant digits; whole numbers in full."""
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{float(f'{value:.3g}'):g}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    facts = dict(line.split("\t: ", 1) for line in (line.replace("\t\t", "\t") for line in lines) if "\t: " in line)
    flags = facts.get("flags", "").split()
    width = next((label for flag, label in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "")
    name = facts.get("model name", platform.machine())
    return f"{name} ({width})" if width else name
