"""The flags of `kvrelay bench`: how each is read, and what it says when it cannot be."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrelay.bench.lengths import FORMS, LengthDistribution
from kvrelay.bench.traces import FORMATS
from kvrelay.errors import ConfigurationError

__all__ = ["DEFAULT_REQUESTS", "FLAGS", "Flag"]

DEFAULT_REQUESTS = 100
# As chat traffic is: most are short, a few are long.
DEFAULT_INPUT = "lognormal:150,0.9,min=16,max=512"
DEFAULT_OUTPUT = "lognormal:80,0.9,min=8,max=256"

Parser = Callable[[str, str], Any]


def _whole(least: int, most: int = 2**31 - 1) -> Parser:
    def parse(flag: str, text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ConfigurationError(f"{flag}: {text!r} is not a whole number from {least} to {most}") from None
        _check_range(flag, text, value, least, most)
        return value

    return parse


def _number(least: float, most: float = 1e9) -> Parser:
    def parse(flag: str, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if math.isnan(value):
            raise ConfigurationError(f"{flag}: {text!r} is not a number from {least:g} to {most:g}")
        _check_range(flag, text, value, least, most)
        return value

    return parse


def _check_range(flag: str, text: str, value: float, least: float, most: float) -> None:
    if value < least:
        raise ConfigurationError(f"{flag}: {text} is too small; the least is {least:,g}")
    if value > most:
        raise ConfigurationError(f"{flag}: {text} is too large; the most is {most:,g}")


def _choice(names: Sequence[str]) -> Parser:
    def parse(flag: str, text: str) -> str:
        if text not in names:
            raise ConfigurationError(f"{flag}: {text!r} is not a choice; valid are {', '.join(names)}")
        return text

    return parse


def _new_file(flag: str, text: str) -> Path:
    """Opened before the load, so that no result is lost after it."""
    path = Path(text)
    try:
        path.open("ab").close()
    except OSError as error:
        raise ConfigurationError(f"{flag}: {text}: cannot be written: {error.strerror}") from None
    return path


def _old_file(flag: str, text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise ConfigurationError(f"{flag}: {text}: no such file")
    return path


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag with a value: how it is read, and what it is without being given."""

    name: str
    metavar: str
    help: str
    read: Parser
    default: str | None = None

    @property
    def key(self) -> str:
        """Its name in the parsed arguments."""
        return self.name.removeprefix("--").replace("-", "_")

    def value(self, arguments: Mapping[str, Any]) -> Any:
        """Raises ConfigurationError, naming the flag, its value and what is valid."""
        text = arguments.get(self.key)
        text = self.default if text is None else text
        return None if text is None else self.read(self.name, text)


FLAGS = (
    Flag("--requests", "N", f"requests to send (default {DEFAULT_REQUESTS}, or the whole trace)", _whole(1)),
    Flag("--duration", "S", "seconds in which requests start, in place of --requests", _number(0.1)),
    Flag("--concurrency", "N", "requests that run at once, in a closed loop", _whole(1, 100_000), "16"),
    Flag("--rate", "R", "requests per second, by a Poisson process", _number(1e-6)),
    Flag("--burstiness", "B", "with --rate: under 1 comes in bursts, over 1 evenly", _number(1e-3, 1e3), "1"),
    Flag("--trace", "FILE", "send the requests of a trace, at its own timestamps unless told otherwise", _old_file),
    Flag("--trace-format", "|".join(FORMATS), "format of the trace", _choice(list(FORMATS)), "jsonl"),
    Flag("--speed", "X", "replay the trace's timestamps so many times as fast", _number(1e-6), "1"),
    Flag("--input-tokens", "DIST", f"prompt lengths: {FORMS}", LengthDistribution.parse, DEFAULT_INPUT),
    Flag("--output-tokens", "DIST", "output lengths, likewise", LengthDistribution.parse, DEFAULT_OUTPUT),
    Flag(
        "--shared-prefix-tokens", "N", "tokens that come first in every prompt, beyond its own", _whole(0, 10**6), "0"
    ),
    Flag("--warmup", "N", "requests before those that are measured", _whole(0), "8"),
    Flag("--seed", "S", "the same seed asks the same", _whole(0, 2**63 - 1), "0"),
    Flag("--temperature", "T", "of sampling (0 is greedy)", _number(0, 1e3), "0"),
    Flag("--timeout", "S", "seconds after which a request has failed", _number(0.1), "600"),
    Flag("--slo-ttft", "S", "goodput: the most seconds to the first token", _number(0)),
    Flag("--slo-tpot", "S", "goodput: the most seconds per token after the first", _number(0)),
    Flag("--slo-gap", "S", "goodput: the most seconds between two responses of a request", _number(0)),
    Flag("--output", "FILE.json", "write the report, with a record of each request, as JSON", _new_file),
    Flag("--html", "FILE.html", "write the report as a page with plots", _new_file),
)
