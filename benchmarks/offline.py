"""kvrelay's engine in this process, without gateway and wire: the one place where benchmarks touch its insides."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.workloads import Workload
from kvrelay.engine.block_pool import BlockPool
from kvrelay.engine.engine import Engine
from kvrelay.engine.events import Failed, Sampled
from kvrelay.engine.limits import Limits
from kvrelay.engine.runner import ModelRunner
from kvrelay.engine.scheduler import Scheduler
from kvrelay.engine.sequence import Role, Sequence
from kvrelay.request import Request, Sampling
from kvrelay.settings import EngineSettings

__all__ = ["MODES", "OfflineEngine", "Run", "new_scheduler", "new_sequence"]

MODES = ("continuous", "static", "padded", "unbatched")


@dataclass(frozen=True, slots=True)
class Run:
    """A workload that was computed.

    Attributes:
        tokens: of each request, in order of arrival; as many as it asked for.
        seconds: from the first step to the end of the last.
        steps: times the model was run.
        rows: tokens that went through the model, prompts included.
    """

    tokens: list[list[int]]
    seconds: float
    steps: int
    rows: int

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds

    @property
    def rows_per_step(self) -> float:
        return self.rows / self.steps


class OfflineEngine:
    """A loaded checkpoint; every run begins with an empty scheduler and an empty KV pool.

    Args:
        folder: the checkpoint.
        settings: of the engine; model, threads and prefix caching are set here.
        threads: CPU threads.
    """

    def __init__(self, folder: Path, settings: EngineSettings | None = None, threads: int = 2) -> None:
        settings = settings or EngineSettings(dtype="float32")
        self.settings = replace(settings, model=str(folder), threads=threads, prefix_caching=False)
        self.runner = ModelRunner.load(folder, self.settings)

    def run(self, requests: Workload, mode: str = "continuous", batch: int = 0) -> Run:
        """Computes a workload, greedily and to the output lengths it asks for.

        Args:
            mode: "continuous" lets a waiting request in as soon as a running one is done; "static" only when all of a
                batch are done, though those that are done cost nothing more; "padded" is static and computes all of a
                batch to its longest, as a plain loop over one tensor does; "unbatched" is one request at a time.
            batch: requests that run at once; 0 means as many as the settings say.

        Raises:
            ValueError: no such mode.
            RuntimeError: the engine failed a request.
        """
        batch = 1 if mode == "unbatched" else batch or self.settings.max_num_sequences
        return _combine([self._run(group, batch) for group in _groups(requests, mode, batch)], requests)

    def warm_up(self) -> None:
        """Runs a little of everything, so that no measurement pays for what happens only at first."""
        self.run([([3 + index] * 40, 4) for index in range(8)])

    def _run(self, requests: Workload, batch: int) -> Run:
        scheduler = new_scheduler(self.runner, replace(self.settings, max_num_sequences=batch))
        engine = Engine(scheduler, self.runner)
        for index, (prompt, output) in enumerate(requests):
            scheduler.add(new_sequence(str(index), prompt, output))
        tokens: list[list[int]] = [[] for _ in requests]
        steps = rows = 0
        started = time.perf_counter()
        while scheduler.load().running or scheduler.load().waiting:
            step = engine.step()
            steps, rows = steps + 1, rows + step.num_tokens
            for event in step.events:
                if isinstance(event, Sampled):
                    tokens[int(event.request_id)].append(event.token.token_id)
                elif isinstance(event, Failed):
                    raise RuntimeError(f"request {event.request_id} failed: {event.error}")
        return Run(tokens, time.perf_counter() - started, steps, rows)


def new_scheduler(runner: ModelRunner, settings: EngineSettings) -> Scheduler:
    """A scheduler over the whole of the runner's pool."""
    limits = Limits(
        max_num_sequences=settings.max_num_sequences,
        max_batched_tokens=settings.max_batched_tokens,
        context_length=runner.context_length,
        block_size=settings.block_size,
        prefix_caching=settings.prefix_caching,
    )
    return Scheduler(BlockPool(runner.num_blocks), limits)


def new_sequence(
    request_id: str, prompt: Iterable[int], output: int, role: Role = Role.WHOLE, deadline: float | None = None
) -> Sequence:
    """A greedy request that ends after `output` tokens and for no other reason."""
    return Sequence(Request(request_id, tuple(prompt), Sampling(max_tokens=output)), role, deadline=deadline)


def _groups(requests: Workload, mode: str, batch: int) -> list[Workload]:
    """What is handed to the engine together; a group waits for the one before."""
    if mode in ("continuous", "unbatched"):
        return [requests]
    groups = [requests[start : start + batch] for start in range(0, len(requests), batch)]
    if mode == "static":
        return groups
    if mode == "padded":
        return [[(prompt, max(output for _, output in group)) for prompt, _ in group] for group in groups]
    raise ValueError(f"{mode}: not one of {', '.join(MODES)}")


def _combine(runs: list[Run], requests: Workload) -> Run:
    produced = [tokens for run in runs for tokens in run.tokens]
    wanted = [tokens[:output] for tokens, (_, output) in zip(produced, requests, strict=True)]
    seconds, steps, rows = (sum(values) for values in zip(*((r.seconds, r.steps, r.rows) for r in runs), strict=True))
    return Run(wanted, seconds, int(steps), int(rows))
