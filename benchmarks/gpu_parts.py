"""The parts of the GPU benchmark: each measures one thing of one shape, and makes the rows of a table."""

import contextlib
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_limits import DeviceLimits, seconds_of
from benchmarks.gpu_model import BLOCK_SIZE, ModelCase, new_sequence, tf
from benchmarks.results import Row, measure
from kvrelay.engine.attention import PagedAttention
from kvrelay.engine.batch import make_batch
from kvrelay.engine.engine import Engine
from kvrelay.engine.runner import ModelRunner
from kvrelay.engine.sequence import Chunk, Role

__all__ = ["FULL", "SMALL", "Bench", "Sizes", "serve_by_transformers"]

log = logging.getLogger("benchmarks.gpu")

PREFILL_TOKENS = 8192  # computed in one step


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured.

    Attributes:
        steps: decode steps of one measurement.
        prompts: of the prefill: how many, and their length.
        requests: of the comparison: how many, prompt length, completion length.
    """

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    steps: int
    repetitions: int
    prompts: tuple[int, int]
    requests: tuple[int, int, int]

    @property
    def context_length(self) -> int:
        return 2 * max(*self.contexts, self.prompts[1], sum(self.requests[1:]))


FULL = Sizes((1, 32, 128, 256), (512, 1024, 2048), 64, 3, (16, 2048), (256, 512, 128))
SMALL = Sizes((1, 2), (16, 32), 8, 1, (2, 32), (2, 8, 4))


class Bench:
    """One shape on one device; each part makes the rows of a table."""

    def __init__(self, case: ModelCase, limits: DeviceLimits, sizes: Sizes) -> None:
        self.case = case
        self.limits = limits
        self.sizes = sizes
        num_tokens = case.max_num_sequences * (max(sizes.contexts) + 2 * sizes.steps + BLOCK_SIZE)
        overlap = "auto" if case.device.type == "cuda" else "always"
        self.runner: ModelRunner = case.runner(num_tokens, overlap=overlap)

    def decode(self) -> list[Row]:
        rows: list[Row] = []
        for batch, context in itertools.product(self.sizes.batches, self.sizes.contexts):
            if batch * (context + self.sizes.steps + BLOCK_SIZE) > self.runner.num_blocks * BLOCK_SIZE:
                log.warning("%s: batch %d at context %d does not fit the memory", self.case.name, batch, context)
                continue
            runs = [self._decode(batch, context) for _ in range(self.sizes.repetitions)]
            limit = batch / self.limits.decode_seconds(self.case, batch, context)
            rates = measure(rate for rate, _ in runs)
            rows.append(
                {
                    "shape": self.case.name,
                    "batch": batch,
                    "context": context,
                    "tokens/s": rates,
                    "limit": limit,
                    "% of the limit": _percent(rates.median / limit),
                    "% idle": _percent(min(idle for _, idle in runs)) if self.case.device.type == "cuda" else None,
                }
            )
        return rows

    def _decode(self, batch: int, context: int) -> tuple[float, float]:
        """Tokens a second, and the share of the time between the device's steps. Contexts are right on average."""
        warm_up = self.sizes.steps // 4
        num_steps = warm_up + self.sizes.steps
        engine = self.case.engine(self.runner, PREFILL_TOKENS)
        sequences = [
            new_sequence(str(number), context - num_steps // 2, num_steps + 4, Role.DECODE) for number in range(batch)
        ]
        for sequence in sequences:
            engine.scheduler.add(sequence)
        engine.step()
        for sequence in sequences:
            engine.scheduler.adopt(sequence.request_id, 5)
        for _ in range(warm_up):
            engine.step()
        gaps = _Gaps(self.runner) if self.case.device.type == "cuda" else None
        started = time.perf_counter()
        num_tokens = sum(engine.step().num_tokens for _ in range(self.sizes.steps))
        # With overlap the last step is in flight, and so was the one before the first.
        seconds = time.perf_counter() - started
        idle = gaps.share() if gaps is not None else 0.0
        for sequence in sequences:
            engine.scheduler.abort(sequence.request_id)
        _drain(engine)
        return num_tokens / seconds, idle

    def prefill(self) -> list[Row]:
        count, length = self.sizes.prompts
        rates = []
        for repetition in range(self.sizes.repetitions + 1):
            engine = self.case.engine(self.runner, PREFILL_TOKENS)
            for number in range(count):
                engine.scheduler.add(new_sequence(str(number), length, 1))
            started = time.perf_counter()
            _drain(engine)
            if repetition or self.sizes.repetitions == 1:  # the first warms up
                rates.append(count * length / (time.perf_counter() - started))
        found = measure(rates)
        limit = length / self.limits.prefill_seconds(self.case, length)
        return [
            {
                "shape": self.case.name,
                "prompt": length,
                "tokens/s": found,
                "limit": limit,
                "% of the limit": _percent(found.median / limit),
            }
        ]

    @torch.inference_mode()
    def attention(self) -> list[Row]:
        """The decode kernel alone, over all layers in turn, so that no cache holds what it reads."""
        rows: list[Row] = []
        shape, device = self.case.shape(), self.case.device
        for batch, context in itertools.product(self.sizes.batches, self.sizes.contexts):
            sequences = [new_sequence(str(number), context, 1) for number in range(batch)]
            blocks = torch.randperm(self.runner.num_blocks).tolist()
            width = -(-context // BLOCK_SIZE)
            if batch * width > len(blocks):
                continue
            for number, sequence in enumerate(sequences):
                sequence.block_table = blocks[number * width : (number + 1) * width]
            step = make_batch([Chunk(sequence, context - 1, 1) for sequence in sequences], self.runner.cache)
            attention = PagedAttention(self.runner.cache, step, self.runner.kernels)
            query = torch.randn(batch, shape.num_heads, shape.head_dim, dtype=self.case.dtype, device=device)
            layers = itertools.cycle(range(shape.num_layers))
            seconds = seconds_of(
                lambda q=query, a=attention, n=layers: a.kernels.attend(  # type: ignore[misc]
                    q, a.cache, next(n), a.batch, shape.head_dim**-0.5
                ),
                device,
            )
            rate = batch * context * self.case.kv_bytes_per_token / shape.num_layers / seconds
            rows.append(
                {
                    "shape": self.case.name,
                    "batch": batch,
                    "context": context,
                    "µs": 1e6 * seconds,
                    "GB/s": rate / 1e9,
                    "% of a copy": _percent(rate / self.limits.bytes_per_second),
                }
            )
        return rows

    def serve(self) -> float:
        """Tokens a second of the requests that transformers gets, too: all at once, prefill included."""
        count, length, output = self.sizes.requests
        best = 0.0
        for _ in range(2):
            engine = self.case.engine(self.runner, PREFILL_TOKENS)
            for number in range(count):
                engine.scheduler.add(new_sequence(str(number), length, output))
            started = time.perf_counter()
            _drain(engine)
            best = max(best, count * output / (time.perf_counter() - started))
        return best


class _Gaps:
    """Watches the device between the end of a decode step and the begin of the next."""

    def __init__(self, runner: ModelRunner) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._runner = runner
        runner.watch_decoding(self._around)

    def _around(self, launch: Callable[[], None]) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        launch()
        end.record()
        self._events.append((begin, end))

    def share(self) -> float:
        self._runner.watch_decoding(None)
        torch.cuda.synchronize()
        idle = sum(before[1].elapsed_time(after[0]) for before, after in itertools.pairwise(self._events))
        return float(idle / self._events[0][0].elapsed_time(self._events[-1][1]))


def serve_by_transformers(case: ModelCase, sizes: Sizes) -> float:
    """As `Bench.serve`, by transformers' continuous batching; the second of two runs."""
    count, length, output = sizes.requests
    with torch.device(case.device):
        model = tf.AutoModelForCausalLM.from_config(case.config(), dtype=case.dtype).eval()
    prompts = [list(new_sequence(str(number), length, 1).token_ids) for number in range(count)]
    config = tf.GenerationConfig(max_new_tokens=output, do_sample=False, eos_token_id=None, pad_token_id=0)
    rate = 0.0
    try:
        for _ in range(2):
            started = time.perf_counter()
            outputs: Any = model.generate_batch(inputs=prompts, generation_config=config, persistent_manager=True)
            num_tokens: int = sum(len(output.generated_tokens) for output in outputs.values())
            rate = num_tokens / (time.perf_counter() - started)
    finally:
        with contextlib.suppress(AttributeError):  # older releases keep no manager
            model.destroy_cached_continuous_batching_manager()
    return rate


def _drain(engine: Engine) -> None:
    while not engine.step().idle:
        pass


def _percent(share: float) -> float:
    return round(100 * share, 1)
