"""The load generator, against a real server that answers as it is told."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from kvrelay import AsyncClient, ResourceExhausted
from kvrelay.bench.load import LoadGenerator, Outcome, Record, RequestOptions
from kvrelay.bench.runner import measure_load
from kvrelay.bench.settings import parse
from kvrelay.bench.workload import Job, Workload
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1 import inference_pb2_grpc
from tests.patience import SOON

pytest_plugins = ["tests.contract.client_kit"]

OPTIONS = RequestOptions(model="m", id_prefix="bench-x", temperature=0.5, seed=40, timeout=5.0)


class Servicer(inference_pb2_grpc.InferenceServiceServicer):
    """Answers with two responses, the second of all tokens but one; holds requests back while `gate` is closed."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_running = 0
        self.most_running = 0
        self.changed = asyncio.Condition()
        self.refuses: Callable[[int], bool] = lambda number: False
        self.finish_reason = pb.FINISH_REASON_LENGTH

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        number, wanted = len(self.requests), request.sampling.max_tokens
        await self._count(+1)
        try:
            if self.refuses(number):
                raise ResourceExhausted("the queue is full")
            yield pb.GenerateResponse(request_id=request.request_id, seq=1, token_ids=[1])
            await self.gate.wait()
            usage = pb.Usage(prompt_tokens=len(request.token_ids.ids), completion_tokens=wanted)
            yield pb.GenerateResponse(
                request_id=request.request_id,
                seq=2,
                token_ids=[2] * (wanted - 1),
                finish_reason=self.finish_reason,
                usage=usage,
                timings=pb.Timings(prefill=0.5, total=2),
            )
        finally:
            await self._count(-1)

    async def reaches(self, condition: Callable[[], bool]) -> None:
        async with self.changed, asyncio.timeout(SOON):
            await self.changed.wait_for(condition)

    async def _count(self, change: int) -> None:
        async with self.changed:
            self.num_running += change
            self.most_running = max(self.most_running, self.num_running)
            self.changed.notify_all()


@pytest.fixture
async def servicer() -> Servicer:
    return Servicer()  # type: ignore[abstract]  # what is left out is unimplemented


@pytest.fixture
async def client(target: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(target) as client:
        yield client


def jobs(count: int, output_tokens: int = 4) -> Iterator[Job]:
    return (Job(index, [5, 6, 7], output_tokens, None, False) for index in range(count))


def measured(client: AsyncClient, **flags: str) -> "tuple[LoadGenerator, Any]":
    """A load generator, and the coroutine that runs what the flags say."""
    settings = parse({"input_tokens": "fixed:3", "output_tokens": "fixed:4", **flags})
    load = LoadGenerator(client, OPTIONS)
    return load, measure_load(load, Workload(settings.source, 100, 64, 0), settings)


async def test_a_closed_loop_keeps_its_number_running(client: AsyncClient, servicer: Servicer) -> None:
    ended: list[Record] = []
    load = LoadGenerator(client, OPTIONS, ended.append)
    await load.run_closed_loop(jobs(12), 3, None)
    assert servicer.most_running <= 3
    assert sorted(record.index for record in load.records) == list(range(12))
    assert {record.outcome for record in load.records} == {Outcome.COMPLETED}
    assert sorted(ended, key=lambda record: record.index) == load.records
    assert load.ran_out


async def test_a_closed_loop_starts_all_its_streams(client: AsyncClient, servicer: Servicer) -> None:
    servicer.gate.clear()
    load = LoadGenerator(client, OPTIONS)
    running = asyncio.create_task(load.run_closed_loop(jobs(9), 4, None))
    await servicer.reaches(lambda: servicer.num_running == 4)
    servicer.gate.set()
    await running
    assert servicer.most_running == 4


async def test_what_a_request_says(client: AsyncClient, servicer: Servicer) -> None:
    await LoadGenerator(client, OPTIONS).run_closed_loop(jobs(2), 1, None)
    first, second = servicer.requests
    assert (first.request_id, second.request_id) == ("bench-x-0", "bench-x-1")
    assert list(first.token_ids.ids) == [5, 6, 7]
    assert (first.model, first.cache_salt) == ("m", "bench-x")
    sampling = first.sampling
    assert (sampling.max_tokens, sampling.ignore_eos, sampling.temperature) == (4, True, 0.5)
    assert (sampling.seed, second.sampling.seed) == (40, 41)


async def test_what_a_record_says(client: AsyncClient) -> None:
    load = LoadGenerator(client, OPTIONS)
    await load.run_closed_loop(jobs(1), 1, None)
    (record,) = load.records
    assert list(record.response_tokens) == [1, 3]
    assert 0 <= record.due <= record.sent <= record.response_times[0] <= record.response_times[1]
    assert record.ended == record.response_times[1]
    assert (record.input_tokens, record.output_tokens, record.usage.completion_tokens) == (3, 4, 4)
    assert record.timings.total == 2


async def test_scheduled_requests_do_not_wait_for_one_another(client: AsyncClient, servicer: Servicer) -> None:
    servicer.gate.clear()
    load = LoadGenerator(client, OPTIONS)
    running = asyncio.create_task(load.run_schedule(zip((0.0, 0.01, 0.02, 9.0), jobs(4), strict=True), 1.0))
    await servicer.reaches(lambda: servicer.num_running == 3)
    servicer.gate.set()
    await running
    assert [record.due for record in load.records] == [0.0, 0.01, 0.02]
    assert all(record.sent >= record.due for record in load.records)
    assert not load.ran_out


async def test_errors_are_counted_and_the_load_goes_on(client: AsyncClient, servicer: Servicer) -> None:
    servicer.refuses = lambda number: number % 2 == 1
    load = LoadGenerator(client, OPTIONS)
    await load.run_closed_loop(jobs(4), 1, None)
    assert [record.error for record in load.records] == ["RESOURCE_EXHAUSTED", None, "RESOURCE_EXHAUSTED", None]
    assert all(record.ended is not None for record in load.records)


async def test_a_request_that_takes_too_long_has_failed(client: AsyncClient, servicer: Servicer) -> None:
    servicer.gate.clear()
    load = LoadGenerator(client, RequestOptions("m", "bench-x", 0.0, 0, timeout=0.2))
    await load.run_closed_loop(jobs(1), 1, None)
    (record,) = load.records
    assert (record.outcome, record.error, record.num_received) == (Outcome.FAILED, "DEADLINE_EXCEEDED", 1)


@pytest.mark.parametrize(
    ("finish_reason", "error"),
    [(pb.FINISH_REASON_ABORT, "ABORT"), (pb.FINISH_REASON_UNSPECIFIED, "INCOMPLETE")],
)
async def test_a_request_without_a_good_end_has_failed(
    client: AsyncClient, servicer: Servicer, finish_reason: Any, error: str
) -> None:
    servicer.finish_reason = finish_reason
    load = LoadGenerator(client, OPTIONS)
    await load.run_closed_loop(jobs(1), 1, None)
    assert (load.records[0].outcome, load.records[0].error) == (Outcome.FAILED, error)


async def test_the_window_ends_with_the_last_response(client: AsyncClient) -> None:
    load, measuring = measured(client, requests="6", concurrency="2")
    run, was_interrupted = await measuring
    assert not was_interrupted
    assert run.window == max(record.ended or 0 for record in load.records)
    assert len(run.records) == 6
    assert run.client_cpu_seconds > 0


async def test_the_window_ends_with_the_duration(client: AsyncClient) -> None:
    load, measuring = measured(client, duration="0.3", concurrency="2")
    run, _ = await measuring
    assert run.window == 0.3
    assert load.records
    assert not load.ran_out


async def test_an_interrupt_leaves_what_there_is(client: AsyncClient, servicer: Servicer) -> None:
    load, measuring = measured(client, requests="100000", rate="200")
    running = asyncio.create_task(measuring)
    await servicer.reaches(lambda: any(record.outcome is Outcome.COMPLETED for record in load.records))
    servicer.gate.clear()
    seen = len(servicer.requests)
    await servicer.reaches(lambda: len(servicer.requests) > seen)
    os.kill(os.getpid(), signal.SIGINT)
    run, was_interrupted = await running
    assert was_interrupted
    outcomes = [record.outcome for record in run.records]
    assert outcomes.count(Outcome.COMPLETED) >= 1
    assert outcomes.count(Outcome.INTERRUPTED) >= 1
    assert outcomes.count(Outcome.FAILED) == 0
    assert all(record.ended is None for record in run.records if record.outcome is Outcome.INTERRUPTED)
    assert run.window >= max(record.ended or 0 for record in run.records)
    await servicer.reaches(lambda: servicer.num_running == 0)
