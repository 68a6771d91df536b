"""The flags of `kvrelay bench`: what they mean, and what they say when they make no sense."""

from pathlib import Path

import pytest

from kvrelay.bench.arrivals import ClosedLoop, RandomArrivals, TraceArrivals
from kvrelay.bench.measure import GoodputLimits
from kvrelay.bench.settings import parse
from kvrelay.bench.workload import Synthetic
from kvrelay.cli import main
from kvrelay.errors import ConfigurationError


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0, "input_tokens": 5, "output_tokens": 2}\n' * 3)
    return str(path)


def test_defaults() -> None:
    settings = parse({})
    assert settings.arrivals == ClosedLoop(16)
    assert (settings.num_requests, settings.duration, settings.num_warmup) == (100, None, 8)
    assert isinstance(settings.source, Synthetic)
    assert settings.limits == GoodputLimits()


def test_arrivals(trace: str) -> None:
    assert parse({"concurrency": "3"}).arrivals == ClosedLoop(3)
    assert parse({"rate": "2.5"}).arrivals == RandomArrivals(2.5)
    assert parse({"rate": "2.5", "burstiness": "0.5"}).arrivals == RandomArrivals(2.5, 0.5)
    assert parse({"trace": trace}).arrivals == TraceArrivals(1.0)
    assert parse({"trace": trace, "speed": "3"}).arrivals == TraceArrivals(3.0)
    assert parse({"trace": trace, "rate": "4"}).arrivals == RandomArrivals(4.0)
    assert parse({"trace": trace, "concurrency": "4"}).arrivals == ClosedLoop(4)


def test_how_many_requests(trace: str) -> None:
    assert parse({"requests": "7"}).num_requests == 7
    assert parse({"duration": "7"}).num_requests is None
    assert parse({"trace": trace}).num_requests == 3
    assert parse({"trace": trace, "requests": "2"}).num_requests == 2


def test_the_configuration_says_what_was_asked_for(trace: str) -> None:
    settings = parse({"input_tokens": "uniform:1,9", "slo_ttft": "0.5", "slo_gap": "0.2"})
    assert settings.limits == GoodputLimits(ttft=0.5, gap=0.2)
    configuration = settings.configuration
    assert configuration["arrivals"] == "closed loop, 16 concurrent"
    assert configuration["input_tokens"] == "uniform:1,9"
    assert (configuration["slo_ttft"], configuration["slo_tpot"], configuration["slo_gap"]) == (0.5, None, 0.2)
    configuration = parse({"trace": trace, "speed": "2"}).configuration
    assert configuration["trace"] == trace
    assert "input_tokens" not in configuration


WRONG = {
    "no number": ({"requests": "many"}, "--requests: 'many' is not a whole number from 1"),
    "a fraction": ({"concurrency": "1.5"}, "--concurrency: '1.5' is not a whole number from 1"),
    "none": ({"requests": "0"}, "--requests: 0 is too small; the least is 1"),
    "too many": ({"concurrency": "1000000"}, "--concurrency: 1000000 is too large; the most is 100,000"),
    "no rate": ({"rate": "0"}, "--rate: 0 is too small"),
    "a rate that is none": ({"rate": "nan"}, "--rate: 'nan' is not a number from"),
    "an endless duration": ({"duration": "inf"}, "--duration: inf is too large"),
    "a negative temperature": ({"temperature": "-1"}, "--temperature: -1 is too small; the least is 0"),
    "a seed too large": ({"seed": str(2**64)}, "--seed: 18446744073709551616 is too large"),
    "a wrong distribution": ({"output_tokens": "gauss:1"}, "--output-tokens: 'gauss:1': 'gauss' is no distribution"),
    "no trace": ({"trace": "/no/such/file"}, "--trace: /no/such/file: no such file"),
    "a format of no trace": ({"trace_format": "mooncake"}, "--trace-format: means nothing without --trace"),
    "a speed of no trace": ({"speed": "2"}, "--speed: means nothing without --trace"),
    "a burst of no rate": ({"burstiness": "2"}, "--burstiness: means nothing without --rate"),
    "two limits": ({"requests": "1", "duration": "1"}, "--requests: not together with --duration"),
    "two paces": ({"concurrency": "1", "rate": "1"}, "--concurrency: not together with --rate"),
    "no folder": (
        {"html": "/no/such/folder/a.html"},
        "--html: /no/such/folder/a.html: cannot be written: No such file",
    ),
    "a folder": ({"output": "/tmp"}, "--output: /tmp: cannot be written: Is a directory"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_flags(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        parse(arguments)
    assert str(raised.value).startswith(message)


WRONG_WITH_TRACE = {
    "lengths": ({"input_tokens": "5"}, "--input-tokens: not together with --trace"),
    "a prefix": ({"shared_prefix_tokens": "5"}, "--shared-prefix-tokens: not together with --trace"),
    "two paces": ({"speed": "5", "rate": "1"}, "--speed: not together with --rate"),
    "an unknown format": ({"trace_format": "csv"}, "--trace-format: 'csv' is not a choice; valid are jsonl, mooncake"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG_WITH_TRACE.values(), ids=WRONG_WITH_TRACE)
def test_wrong_flags_beside_a_trace(arguments: dict[str, str], message: str, trace: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        parse({"trace": trace, **arguments})
    assert str(raised.value).startswith(message)


def test_a_trace_that_is_malformed(trace: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        parse({"trace": trace, "trace_format": "mooncake"})
    assert str(raised.value) == f"--trace: {trace}:1: input_length: missing"


def test_a_trace_without_timestamps(trace: str) -> None:
    Path(trace).write_text('{"input_tokens": 5, "output_tokens": 2}\n')
    with pytest.raises(ConfigurationError, match="no timestamp; give --rate or --concurrency"):
        parse({"trace": trace})
    assert parse({"trace": trace, "concurrency": "1"}).num_requests == 1


def test_wrong_flags_end_with_2_and_nothing_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--rate", "fast"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kvrelay: --rate: 'fast' is not a number")
    assert main(["bench", "--rat", "3"]) == 2
    assert "--rat: unknown flag; did you mean --rate?" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "--help"])
    assert "--slo-ttft S" in capsys.readouterr().out
