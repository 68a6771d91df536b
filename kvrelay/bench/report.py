"""A benchmark's report as one value, and as JSON."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kvrelay.bench.load import Outcome, Record
from kvrelay.bench.measure import GoodputLimits, Run, Summary, summarise
from kvrelay.request import ClusterStatus, Model, WorkerRole

__all__ = ["FORMAT_VERSION", "Report", "make_report", "to_json"]

# Grows when a reader of the JSON would misunderstand; new fields alone do not count.
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that the three forms of a report tell.

    Attributes:
        date: of the load's start, ISO 8601 in UTC.
        notes: sentences that a reader of the numbers should know.
    """

    date: str
    machine: Mapping[str, Any]
    cluster: Mapping[str, Any]
    configuration: Mapping[str, Any]
    summary: Summary
    notes: Sequence[str]
    run: Run


def make_report(
    run: Run,
    limits: GoodputLimits,
    configuration: Mapping[str, Any],
    cluster: Mapping[str, Any],
    date: datetime,
    notes: Sequence[str] = (),
) -> Report:
    """Sums up a run.

    Args:
        cluster: as `describe` has it.
        notes: what is to be said beyond what the numbers tell.
    """
    summary = summarise(run, limits)
    told = [*notes, *_notes(summary, cluster)]
    return Report(date.isoformat(timespec="seconds"), _machine(), cluster, configuration, summary, told, run)


def describe(target: str, model: Model, status: ClusterStatus) -> dict[str, Any]:
    """The cluster as the reports name it."""
    workers = [worker.role for worker in status.workers]
    return {
        "target": target,
        "model": model.id,
        "architecture": model.architecture,
        "context_length": model.context_length,
        "vocab_size": model.vocab_size,
        "prefill_workers": workers.count(WorkerRole.PREFILL),
        "decode_workers": workers.count(WorkerRole.DECODE),
    }


def to_json(report: Report, *, with_records: bool) -> str:
    """One JSON object. Times are in seconds."""
    fields: dict[str, Any] = {
        "format": "kvrelay-bench",
        "format_version": FORMAT_VERSION,
        "kvrelay_version": version("kvrelay"),
        "date": report.date,
        "machine": report.machine,
        "cluster": report.cluster,
        "configuration": report.configuration,
        "summary": asdict(report.summary),
        "notes": report.notes,
    }
    if with_records:
        fields["requests"] = [_record(record) for record in report.run.records]
    return json.dumps(fields, allow_nan=False)


def _record(record: Record) -> dict[str, Any]:
    return {
        "index": record.index,
        "request_id": record.request_id,
        "outcome": record.outcome.value,
        "error": record.error,
        "input_tokens": record.input_tokens,
        "cached_tokens": record.usage.cached_tokens,
        "output_tokens": record.num_received,
        "due": record.due,
        "sent": record.sent,
        "first_token": record.response_times[0] if record.response_times else None,
        "ended": record.ended,
        "timings": asdict(record.timings) if record.outcome is Outcome.COMPLETED else None,
    }


def _notes(summary: Summary, cluster: Mapping[str, Any]) -> list[str]:
    notes = []
    if summary.interrupted:
        notes.append(f"{summary.interrupted} requests were still running when the benchmark was interrupted.")
    if summary.cut:
        notes.append(
            f"{summary.cut} of {summary.completed + summary.failed + summary.interrupted} requests were longer than "
            f"the model's context of {cluster['context_length']:,} tokens, and were cut to it."
        )
    if summary.short:
        notes.append(f"{summary.short} completed requests brought another number of tokens than they were asked for.")
    if summary.send_delay and summary.send_delay.p99 > 0.05:
        notes.append(
            f"The load generator was late: 1% of the requests were sent {summary.send_delay.p99:.2f} s and more after "
            "they were due. This machine is too busy to send at this pace."
        )
    return notes


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
