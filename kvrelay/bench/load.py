"""The load generator. It shares cores with the cluster that it measures, so it only notes; others compute."""

import asyncio
import enum
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kvrelay.bench.workload import Job
from kvrelay.client import AsyncClient
from kvrelay.errors import KvrelayError
from kvrelay.request import Chunk, FinishReason, Timings, Usage

__all__ = ["LoadGenerator", "Outcome", "Record", "RequestOptions"]

# A stream whose request was refused waits before the next, as a client would, instead of asking in a busy loop.
SECONDS_AFTER_ERROR = 0.1


class Outcome(enum.StrEnum):
    """What became of a request. INTERRUPTED: the benchmark ended before it did."""

    COMPLETED = "completed"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


@dataclass(slots=True)
class Record:
    """One request as the client saw it. Times are seconds after the start of the load.

    Attributes:
        output_tokens: as asked for.
        due: when it should have been sent; only a load generator that is too busy makes `sent` much later.
        response_times: of each response that brought tokens.
        response_tokens: how many each of them brought.
        ended: when the last response or the error came; None while it runs.
        error: name of the gRPC status code.
    """

    index: int
    request_id: str
    input_tokens: int
    output_tokens: int
    was_cut: bool
    due: float
    sent: float
    response_times: "array[float]" = field(default_factory=lambda: array("d"))
    response_tokens: "array[int]" = field(default_factory=lambda: array("L"))
    outcome: Outcome = Outcome.INTERRUPTED
    ended: float | None = None
    error: str | None = None
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)

    @property
    def num_received(self) -> int:
        """Output tokens that have come."""
        return sum(self.response_tokens)

    def note(self, chunk: Chunk, now: float) -> None:
        """Adds a response."""
        if chunk.token_ids:
            self.response_times.append(now)
            self.response_tokens.append(len(chunk.token_ids))
        if chunk.finish_reason is FinishReason.ABORT:
            self.fail(chunk.finish_reason.name, now)
        elif chunk.finish_reason is not None:
            self.outcome, self.ended = Outcome.COMPLETED, now
            self.usage, self.timings = chunk.usage or self.usage, chunk.timings or self.timings

    def fail(self, error: str, now: float) -> None:
        """Ends it with an error."""
        self.outcome, self.ended, self.error = Outcome.FAILED, now, error


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What all requests of a benchmark share.

    Attributes:
        id_prefix: different for each benchmark, since a request id runs once. It is the cache salt too, lest a
            benchmark finds the prompts of the one before it in the prefix caches.
        seed: the first request's; each next one has the next number.
        timeout: seconds for a request.
    """

    model: str
    id_prefix: str
    temperature: float
    seed: int
    timeout: float


class LoadGenerator:
    """Sends requests over one connection and notes when their tokens come.

    The clock starts with the making of it. Cancelling a run leaves the records of what has come until then.

    Args:
        on_ended: told of each request that has completed or failed.

    Attributes:
        records: one for each request that was sent.
        ran_out: there were no more jobs before the time was over.
    """

    def __init__(
        self, client: AsyncClient, options: RequestOptions, on_ended: Callable[[Record], None] = lambda record: None
    ) -> None:
        self.records: list[Record] = []
        self.ran_out = False
        self._client = client
        self._options = options
        self._on_ended = on_ended
        self._start = time.perf_counter()

    @property
    def now(self) -> float:
        """Seconds after the start."""
        return time.perf_counter() - self._start

    async def run_closed_loop(self, jobs: Iterator[Job], concurrency: int, duration: float | None) -> None:
        """Keeps this many requests running, until the jobs or the time are used up, and then to their ends."""

        async def one_after_another() -> None:
            for job in jobs:
                if duration is not None and self.now >= duration:
                    break
                record = await self._send(job, self.now)
                if record.outcome is Outcome.FAILED:
                    await asyncio.sleep(SECONDS_AFTER_ERROR)
            else:
                self.ran_out = True

        async with asyncio.TaskGroup() as streams:
            for _ in range(concurrency):
                streams.create_task(one_after_another())

    async def run_schedule(self, schedule: Iterator[tuple[float, Job]], duration: float | None) -> None:
        """Sends each job at its moment, whatever became of those before; returns when all have ended."""
        async with asyncio.TaskGroup() as streams:
            for due, job in schedule:
                if duration is not None and due >= duration:
                    break
                # Also when it is late: the responses of others are to be read in the meantime.
                await asyncio.sleep(max(0.0, due - self.now))
                streams.create_task(self._send(job, due))
            else:
                self.ran_out = True

    async def _send(self, job: Job, due: float) -> Record:
        record = Record(
            index=job.index,
            request_id=f"{self._options.id_prefix}-{job.index}",
            input_tokens=len(job.token_ids),
            output_tokens=job.output_tokens,
            was_cut=job.was_cut,
            due=due,
            sent=self.now,
        )
        self.records.append(record)
        try:
            await self._receive(job, record)
        except KvrelayError as error:
            record.fail(error.code, self.now)
        if record.outcome is Outcome.INTERRUPTED:
            record.fail("INCOMPLETE", self.now)  # the stream ended without a finish reason
        self._on_ended(record)
        return record

    async def _receive(self, job: Job, record: Record) -> None:
        options = self._options
        stream = self._client.generate(
            token_ids=job.token_ids,
            max_tokens=job.output_tokens,
            ignore_eos=True,
            model=options.model,
            request_id=record.request_id,
            cache_salt=options.id_prefix,
            temperature=options.temperature,
            seed=(options.seed + job.index) % 2**64,
            timeout=options.timeout,
        )
        async with stream:
            async for chunk in stream:
                record.note(chunk, self.now)
