"""One benchmark, from the first connection to the last report."""

import asyncio
import signal
import time
import uuid
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from kvrelay.bench.arrivals import ClosedLoop
from kvrelay.bench.load import LoadGenerator, RequestOptions
from kvrelay.bench.measure import Run
from kvrelay.bench.progress import progress_bar
from kvrelay.bench.report import Report, describe, make_report, to_json
from kvrelay.bench.report_html import render_html
from kvrelay.bench.report_text import render_text
from kvrelay.bench.settings import BenchSettings
from kvrelay.bench.workload import Purpose, Workload, generator
from kvrelay.client import AsyncClient
from kvrelay.client.connection_errors import readable_connection_errors
from kvrelay.errors import ConfigurationError, FailedPrecondition
from kvrelay.request import Model

__all__ = ["measure_load", "run_and_report"]

WARMUP_CONCURRENCY = 8
STATUS_TIMEOUT = 10.0
FAILED, INTERRUPTED = 1, 130


def run_and_report(settings: BenchSettings, target: str | None, *, as_json: bool, show_progress: bool) -> int:
    """Measures, and writes the reports that were asked for.

    Returns:
        The exit code: 1 if no request completed, 130 if interrupted, else 0.

    Raises:
        KvrelayError: the cluster cannot be reached.
        ConfigurationError: the trace does not fit the model, or a report cannot be written.
    """
    report, was_interrupted = asyncio.run(_benchmark(settings, target, show_progress))
    print(to_json(report, with_records=False) if as_json else render_text(report), flush=True)
    _write(settings, report)
    if was_interrupted:
        return INTERRUPTED
    return 0 if report.summary.completed else FAILED


def _write(settings: BenchSettings, report: Report) -> None:
    try:
        if settings.output is not None:
            settings.output.write_text(to_json(report, with_records=True) + "\n", encoding="utf-8")
        if settings.html is not None:
            settings.html.write_text(render_html(report), encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{error.filename}: cannot be written: {error.strerror}") from error


async def _benchmark(settings: BenchSettings, target: str | None, show_progress: bool) -> tuple[Report, bool]:
    model, cluster = await _look_at_cluster(target)
    workload = Workload(settings.source, model.vocab_size, model.context_length, settings.seed)
    options = RequestOptions(
        model=model.id,
        id_prefix=f"bench-{uuid.uuid4().hex[:12]}",
        temperature=settings.temperature,
        seed=settings.seed,
        timeout=settings.timeout,
    )
    async with AsyncClient(target) as client:
        notes = await _warm_up(client, workload, options, settings)
        date = datetime.now(UTC)
        with progress_bar(show_progress, settings.num_requests, settings.duration) as progress:
            load = LoadGenerator(client, options, progress.request_ended)
            run, was_interrupted = await measure_load(load, workload, settings)
    return make_report(run, settings.limits, settings.configuration, cluster, date, notes), was_interrupted


async def _look_at_cluster(target: str | None) -> tuple[Model, dict[str, Any]]:
    async with AsyncClient(target, timeout=STATUS_TIMEOUT) as client:
        with readable_connection_errors(client.target):
            models, status = await client.list_models(), await client.status()
        if not models:
            raise FailedPrecondition("the cluster serves no model")
        return models[0], describe(client.target, models[0], status)


async def _warm_up(
    client: AsyncClient, workload: Workload, options: RequestOptions, settings: BenchSettings
) -> list[str]:
    """Answers what is to be noted of it."""
    load = LoadGenerator(client, replace(options, id_prefix=f"{options.id_prefix}-warmup"))
    arrivals = settings.arrivals
    concurrency = arrivals.concurrency if isinstance(arrivals, ClosedLoop) else WARMUP_CONCURRENCY
    await load.run_closed_loop(workload.warmup(settings.num_warmup), min(concurrency, settings.num_warmup), None)
    errors = [record.error for record in load.records if record.error is not None]
    return [f"{len(errors)} warm-up requests failed ({', '.join(sorted(set(errors)))})."] if errors else []


async def measure_load(load: LoadGenerator, workload: Workload, settings: BenchSettings) -> tuple[Run, bool]:
    """Runs the load to its end, or to an interrupt; says whether it was one."""
    cpu_before = time.process_time()
    work = asyncio.create_task(_send_all(load, workload, settings))
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, work.cancel)
    try:
        await asyncio.wait([work])
    finally:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
    was_interrupted = work.cancelled()
    if not was_interrupted:
        work.result()
    window = _window(load, settings.duration, was_interrupted)
    return Run(load.records, window, time.process_time() - cpu_before), was_interrupted


async def _send_all(load: LoadGenerator, workload: Workload, settings: BenchSettings) -> None:
    jobs, arrivals = workload.jobs(settings.num_requests), settings.arrivals
    if isinstance(arrivals, ClosedLoop):
        await load.run_closed_loop(jobs, arrivals.concurrency, settings.duration)
    else:
        random = generator(settings.seed, Purpose.ARRIVALS)
        await load.run_schedule(arrivals.schedule(jobs, random), settings.duration)


def _window(load: LoadGenerator, duration: float | None, was_interrupted: bool) -> float:
    """Ends with the duration, the interrupt or the last response, whichever comes first.

    Requests that start within a duration run to their ends, which would understate throughput if it were counted.
    """
    if was_interrupted:
        end = load.now
    elif load.ran_out or duration is None:
        end = max((record.ended for record in load.records if record.ended is not None), default=0.0)
    else:
        end = duration
    return end if duration is None else min(end, duration)
