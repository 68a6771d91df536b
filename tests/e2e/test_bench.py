"""`kvrelay bench` against a real cluster: what it counts, never how fast it was."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvrelay import Client
from kvrelay.bench.arrivals import RandomArrivals
from kvrelay.bench.workload import Job, Purpose, generator
from tests.e2e.cluster import Cluster
from tests.e2e.processes import clean_environment, kvrelay
from tests.patience import eventually


@pytest.fixture
def target(cluster: Cluster) -> Iterator[str]:
    yield cluster.target
    cluster.wait_whole()


def bench(target: str, *flags: object) -> dict[str, Any]:
    """The object that the command prints, alone, on stdout."""
    done = kvrelay("bench", "--target", target, "--json", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def counts(report: dict[str, Any]) -> tuple[int, int, int, int]:
    summary = report["summary"]
    return summary["completed"], summary["failed"], summary["input_tokens"], summary["output_tokens"]


def test_a_closed_loop(target: str, tmp_path: Path) -> None:
    files = ("--output", tmp_path / "report.json", "--html", tmp_path / "report.html")
    lengths = ("--input-tokens", "fixed:20", "--output-tokens", "fixed:6", "--shared-prefix-tokens", 32)
    limits = ("--slo-ttft", 1000, "--slo-tpot", 1000)
    load = ("--requests", 12, "--concurrency", 4, "--warmup", 2)
    report = bench(target, *load, *lengths, *limits, *files)
    assert counts(report) == (12, 0, 12 * 52, 12 * 6)
    summary = report["summary"]
    assert (summary["errors"], summary["short"], report["notes"]) == ({}, 0, [])
    assert (summary["ttft"]["count"], summary["itl"]["count"], summary["e2e"]["count"]) == (12, 12 * 5, 12)
    assert summary["goodput"]["share"] == 1.0
    assert summary["cached_tokens"] >= 32
    assert summary["client_cpu_seconds"] > 0
    assert sum(stage["share"] for stage in summary["stages"].values()) == pytest.approx(1)
    with Client(target) as client:
        (model,) = client.list_models()
    assert (report["cluster"]["model"], report["cluster"]["vocab_size"]) == (model.id, model.vocab_size)

    written = json.loads((tmp_path / "report.json").read_text())
    requests = written.pop("requests")
    assert written == report
    assert [request["outcome"] for request in requests] == ["completed"] * 12
    assert len({request["request_id"] for request in requests}) == 12
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_poisson_arrivals_over_a_duration(target: str) -> None:
    lengths = ("--input-tokens", "uniform:4,30", "--output-tokens", "exponential:4,max=8")
    report = bench(target, "--rate", 20, "--duration", 1.0, *lengths, "--warmup", 0, "--seed", 3)
    jobs = (Job(index, [], 1, None, False) for index in range(1000))
    schedule = RandomArrivals(20.0).schedule(jobs, generator(3, Purpose.ARRIVALS))
    expected = sum(moment < 1.0 for moment, _ in schedule)
    completed, failed, _, _ = counts(report)
    assert (completed, failed) == (expected, 0)
    assert report["summary"]["window"] == 1.0
    assert report["configuration"]["arrivals"] == "Poisson, 20 requests/s"


def test_a_mooncake_trace(target: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    hash_ids = ([0, 1], [0, 1], [0, 2])
    trace.write_text(
        "".join(
            json.dumps({"timestamp": 3000 * n, "input_length": 600, "output_length": n + 2, "hash_ids": ids}) + "\n"
            for n, ids in enumerate(hash_ids)
        )
    )
    report = bench(target, "--trace", trace, "--trace-format", "mooncake", "--speed", 10, "--temperature", 1)
    assert counts(report) == (3, 0, 1800, 2 + 3 + 4)
    # All of the first prompt but its last block, then what the third shares with it.
    assert report["summary"]["cached_tokens"] == 592 + 512
    # A second benchmark begins without what the first has left.
    again = bench(target, "--trace", trace, "--trace-format", "mooncake", "--speed", 10, "--warmup", 0)
    assert again["summary"]["cached_tokens"] == 592 + 512


def test_requests_that_are_refused(target: str) -> None:
    """More at once than the cluster's queue has room for."""
    lengths = ("--input-tokens", 8, "--output-tokens", 200)
    report = bench(target, "--rate", 10000, "--requests", 40, *lengths, "--warmup", 0)
    completed, failed, _, output_tokens = counts(report)
    assert completed + failed == 40
    assert completed >= 16
    assert failed > 0
    assert report["summary"]["errors"] == {"RESOURCE_EXHAUSTED": failed}
    assert output_tokens == completed * 200


def test_a_trace_longer_than_the_context(cluster: Cluster, target: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_tokens": 100000, "output_tokens": 3}\n')
    report = bench(target, "--trace", trace, "--warmup", 0)
    context = report["cluster"]["context_length"]
    assert counts(report) == (1, 0, context - 3, 3)
    assert report["notes"] == [
        f"1 of 1 requests were longer than the model's context of {context:,} tokens, and were cut to it."
    ]


def test_for_people(target: str) -> None:
    done = kvrelay("bench", "--target", target, "--requests", 3, "--output-tokens", 4, "--warmup", 0)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].endswith(f"at {target} (1 prefill + 1 decode); closed loop, 16 concurrent")
    assert any(line.startswith("requests") and "3 completed" in line for line in lines)
    assert any(line.startswith("TTFT") for line in lines)


def test_ctrl_c_ends_with_a_report(cluster: Cluster, target: str) -> None:
    flags = ["--requests", "1000", "--concurrency", "2", "--warmup", "0", "--output-tokens", "4000", "--json"]
    command = [sys.executable, "-m", "kvrelay", "bench", "--target", target, *flags]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment()
    ) as process:
        eventually(lambda: cluster.status().queue.running == 2, 30, "the load runs")
        process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (130, "")
    report = json.loads(output)
    assert report["summary"]["interrupted"] == 2
    assert "interrupted" in report["notes"][0]


def test_no_cluster() -> None:
    done = kvrelay("bench", "--target", "127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "kvrelay: UNAVAILABLE: nothing answers at 127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_flags_are_said_before_anything_is_sent() -> None:
    done = kvrelay("bench", "--target", "127.0.0.1:1", "--input-tokens", "gauss:5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("kvrelay: --input-tokens: 'gauss:5': 'gauss' is no distribution; valid are fixed:N")
