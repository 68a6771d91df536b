"""Draws tokens where the logits are: from requests, or from rows of the batch state."""

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy
import torch
from numpy.typing import NDArray

from kvrelay.engine import sampler
from kvrelay.engine.batch_state import Rows
from kvrelay.engine.staging import upload
from kvrelay.request import Sampling

__all__ = ["GpuSampler", "RowSampler", "TorchSampler", "choose_sampler"]

log = logging.getLogger(__name__)


class RowSampler(Protocol):
    """Two ways to say how each row is sampled; both draw the same."""

    def draw(self, logits: torch.Tensor, requests: Sequence[Sampling], positions: Sequence[int]) -> torch.Tensor:
        """As `kvrelay.engine.sampler.draw`."""

    def draw_rows(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The next token `[B]`, int64, of each row of the state, from logits `[B, vocabulary]`."""


class TorchSampler:
    """Implements RowSampler for every device. On CUDA it waits for the device, so it cannot be captured there."""

    def draw(self, logits: torch.Tensor, requests: Sequence[Sampling], positions: Sequence[int]) -> torch.Tensor:
        return sampler.draw(logits, requests, positions)

    def draw_rows(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        fields = (rows.temperature, rows.top_p, rows.top_k, rows.min_p, rows.seeds)
        requests = [
            Sampling(0, temperature, top_p, top_k, min_p, seed % 2**64)
            for temperature, top_p, top_k, min_p, seed in zip(*(field.tolist() for field in fields), strict=True)
        ]
        return sampler.draw(logits, requests, rows.context_lengths.tolist())


class GpuSampler:
    """Implements RowSampler by Triton kernels; waits for nothing."""

    def draw(self, logits: torch.Tensor, requests: Sequence[Sampling], positions: Sequence[int]) -> torch.Tensor:
        from kvrelay.engine.kernels.gpu.sampling import SamplingTensors, sample_tokens

        arrays: list[NDArray[Any]] = [
            numpy.array([request.temperature for request in requests], dtype=numpy.float32),
            numpy.array([request.top_k for request in requests], dtype=numpy.int32),
            numpy.array([request.top_p for request in requests], dtype=numpy.float32),
            numpy.array([request.min_p for request in requests], dtype=numpy.float32),
            numpy.array([request.seed for request in requests], dtype=numpy.uint64).view(numpy.int64),
            numpy.array(positions, dtype=numpy.int64),
        ]
        return sample_tokens(logits, SamplingTensors(*upload(arrays, logits.device)))

    def draw_rows(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        from kvrelay.engine.kernels.gpu.sampling import SamplingTensors, sample_tokens

        # The token that is drawn comes after the context.
        sampling = SamplingTensors(
            rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seeds, rows.context_lengths.long()
        )
        return sample_tokens(logits, sampling)


def choose_sampler(device: torch.device) -> RowSampler:
    """The fastest sampler for a device."""
    if device.type != "cuda":
        return TorchSampler()
    try:
        import kvrelay.engine.kernels.gpu.sampling  # noqa: F401
    except ImportError as error:
        log.warning("sampling waits for the GPU, because Triton cannot be used: %s", error)
        return TorchSampler()
    return GpuSampler()
