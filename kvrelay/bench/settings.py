"""One benchmark's settings: the flags, and what they mean together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrelay.bench.arrivals import Arrivals, ClosedLoop, RandomArrivals, TraceArrivals
from kvrelay.bench.flags import DEFAULT_REQUESTS, FLAGS
from kvrelay.bench.lengths import LengthDistribution
from kvrelay.bench.measure import GoodputLimits
from kvrelay.bench.traces import Shape, read_trace
from kvrelay.bench.workload import Synthetic
from kvrelay.errors import ConfigurationError

__all__ = ["BenchSettings", "parse"]

_NOT_TOGETHER = (
    ("--requests", "--duration"),
    ("--concurrency", "--rate"),
    ("--speed", "--rate"),
    ("--speed", "--concurrency"),
    ("--input-tokens", "--trace"),
    ("--output-tokens", "--trace"),
    ("--shared-prefix-tokens", "--trace"),
)
_NEEDS = (("--burstiness", "--rate"), ("--trace-format", "--trace"), ("--speed", "--trace"))


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """One benchmark.

    Attributes:
        source: what is asked: random lengths, or a trace.
        num_requests: None means as many as the trace has or the duration allows.
        duration: seconds; no request starts later.
        limits: what goodput counts.
        configuration: what was asked for, in the words of the reports.
    """

    arrivals: Arrivals
    source: Synthetic | Sequence[Shape]
    num_requests: int | None
    duration: float | None
    num_warmup: int
    seed: int
    temperature: float
    timeout: float
    limits: GoodputLimits
    output: Path | None
    html: Path | None
    configuration: Mapping[str, Any]


def parse(arguments: Mapping[str, Any]) -> BenchSettings:
    """Reads the flags.

    Args:
        arguments: texts as argparse found them; None where a flag was not given.

    Raises:
        ConfigurationError: naming the flag, its value and what is valid.
    """
    given = {flag.name for flag in FLAGS if arguments.get(flag.key) is not None}
    _check_together(given)
    values = {flag.key: flag.value(arguments) for flag in FLAGS}
    arrivals = _arrivals(values, given)
    source = _trace(values, arrivals) if values["trace"] else _synthetic(values)
    if values["requests"] is None and values["duration"] is None:
        values["requests"] = DEFAULT_REQUESTS if isinstance(source, Synthetic) else len(source)
    return BenchSettings(
        arrivals=arrivals,
        source=source,
        num_requests=values["requests"],
        duration=values["duration"],
        num_warmup=values["warmup"],
        seed=values["seed"],
        temperature=values["temperature"],
        timeout=values["timeout"],
        limits=GoodputLimits(values["slo_ttft"], values["slo_tpot"], values["slo_gap"]),
        output=values["output"],
        html=values["html"],
        configuration=_configuration(values, arrivals),
    )


def _check_together(given: set[str]) -> None:
    for flag, other in _NOT_TOGETHER:
        if flag in given and other in given:
            raise ConfigurationError(f"{flag}: not together with {other}; give one of them")
    for flag, other in _NEEDS:
        if flag in given and other not in given:
            raise ConfigurationError(f"{flag}: means nothing without {other}")


def _arrivals(values: Mapping[str, Any], given: set[str]) -> Arrivals:
    if "--rate" in given:
        return RandomArrivals(values["rate"], values["burstiness"])
    if "--trace" in given and "--concurrency" not in given:
        return TraceArrivals(values["speed"])
    return ClosedLoop(values["concurrency"])


def _synthetic(values: Mapping[str, Any]) -> Synthetic:
    return Synthetic(values["input_tokens"], values["output_tokens"], values["shared_prefix_tokens"])


def _trace(values: Mapping[str, Any], arrivals: Arrivals) -> Sequence[Shape]:
    path = values["trace"]
    try:
        shapes = read_trace(path, values["trace_format"])
    except ConfigurationError as error:
        raise ConfigurationError(f"--trace: {error}") from error
    if isinstance(arrivals, TraceArrivals) and shapes[0].timestamp is None:
        raise ConfigurationError(f"--trace: {path}: a request has no timestamp; give --rate or --concurrency")
    return shapes


def _configuration(values: Mapping[str, Any], arrivals: Arrivals) -> dict[str, Any]:
    asked = ("trace", "trace_format") if values["trace"] else ("input_tokens", "output_tokens", "shared_prefix_tokens")
    others = ("warmup", "seed", "temperature", "timeout", "slo_ttft", "slo_tpot", "slo_gap")
    chosen = {key: values[key] for key in ("requests", "duration", *asked, *others)}
    texts = {key: str(value) for key, value in chosen.items() if isinstance(value, Path | LengthDistribution)}
    return {"arrivals": str(arrivals)} | chosen | texts
