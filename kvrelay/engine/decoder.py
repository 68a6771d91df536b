"""Steps that only decode, on a batch that stays on the device."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvrelay.engine.batch import StepInput
from kvrelay.engine.batch_state import BatchState
from kvrelay.engine.cuda_graphs import CudaGraphs, bucket_sizes
from kvrelay.engine.decode_step import DecodeStep
from kvrelay.engine.sampler import pack, unpack
from kvrelay.engine.sequence import Chunk
from kvrelay.engine.staging import HostCopier, HostCopy
from kvrelay.request import Sampling, Token

__all__ = ["Decoder", "LaunchedStep"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """Implements `kvrelay.engine.engine.Launched`.

    Attributes:
        copy: of what `kvrelay.engine.sampler.pack` made of the step's rows.
        requests: how each row was sampled.
        order: the row of each chunk that samples.
    """

    copy: HostCopy
    requests: Sequence[Sampling]
    order: Sequence[int]

    def tokens(self) -> list[Token]:
        tokens = unpack(self.copy.wait(), self.requests)
        return [tokens[row] for row in self.order]


class Decoder:
    """Launches decode steps by sending what changed, and feeds tokens from one step to the next on the device.

    Other steps of the same sequences must go through `feed` and `keep`.

    Attributes:
        around: called with the launch of each step, which it has to call; None calls it directly.
    """

    def __init__(self, state: BatchState, step: DecodeStep, copier: HostCopier, max_rows: int) -> None:
        self._state = state
        self._step = step
        self._copier = copier
        self._max_rows = max_rows
        self._compute: Callable[[int], None] = step.compute
        self.around: Callable[[Callable[[], None]], None] | None = None

    def capture(self, device: torch.device) -> None:
        """From now on steps are replayed as CUDA graphs, if the model allows it. To be called before the first step.

        Raises:
            Exception: whatever a step raises that is not captured.
        """
        self._step.compute(1)
        try:
            self._compute = CudaGraphs(self._step.compute, bucket_sizes(self._max_rows), device).run
        except Exception as error:  # a model's code may raise anything when it is captured
            log.warning("decoding without CUDA graphs, because the model cannot be captured: %s", error)
        self._step.reset()

    def takes(self, chunks: Sequence[Chunk]) -> bool:
        """Whether all that the step does is to decode."""
        return len(chunks) <= self._max_rows and all(chunk.length == 1 and chunk.samples for chunk in chunks)

    def launch(self, chunks: Sequence[Chunk]) -> LaunchedStep:
        """Launches a step that `takes` has looked at."""
        order = self._state.update(chunks)
        num_rows = self._state.num_rows
        if self.around is None:
            self._compute(num_rows)
        else:
            self.around(lambda: self._compute(num_rows))
        tokens = self._step.finish(num_rows)
        requests = [Sampling(0)] * num_rows
        for row, chunk in zip(order, chunks, strict=True):
            requests[row] = chunk.sequence.request.sampling
        packed = pack(self._step.logits[:num_rows], requests, tokens)
        return LaunchedStep(self._copier.start(packed), requests, order)

    def feed(self, step: StepInput) -> None:
        """Fills in the tokens that only the device knows."""
        if len(step.unknown):
            step.token_ids.index_copy_(0, step.unknown, self._state.last_tokens.index_select(0, step.unknown_slots))

    def keep(self, step: StepInput, tokens: torch.Tensor) -> None:
        """Makes the tokens `[R]` that a step sampled known to the next."""
        self._state.last_tokens.index_copy_(0, step.sampling_slots, tokens)
