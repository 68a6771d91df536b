"""What a device can do at most, measured; and what follows from it for a decode step and a prefill."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.gpu_model import ModelCase

__all__ = ["DeviceLimits", "measure_limits", "seconds_of"]


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """Measured rates.

    Attributes:
        bytes_per_second: of a copy on the device, read and written bytes together.
        flops: operations a second of a large matrix product in the model's type.
    """

    bytes_per_second: float
    flops: float

    def decode_seconds(self, case: ModelCase, batch: int, context: float) -> float:
        """The least that a decode step takes: the weights once, or their arithmetic, and each sequence's KV cache."""
        weights = case.num_streamed_weights
        reading = weights * case.dtype.itemsize / self.bytes_per_second
        computing = 2 * weights * batch / self.flops
        cache = batch * context * case.kv_bytes_per_token / self.bytes_per_second
        return max(reading, computing) + cache

    def prefill_seconds(self, case: ModelCase, length: int) -> float:
        """The least that a prompt takes by its arithmetic; the head counts for one token."""
        shape = case.shape()
        head = shape.vocab_size * shape.hidden_size
        products = 2 * (case.num_streamed_weights - head) * length + 2 * head
        attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim * length * (length + 1) / 2
        return (products + attention) / self.flops


def measure_limits(device: torch.device, dtype: torch.dtype) -> DeviceLimits:
    """Copies far more than the caches hold, and multiplies random matrices."""
    large = device.type == "cuda"
    num_bytes, size = (2 << 30, 8192) if large else (8 << 20, 256)
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = seconds_of(lambda: target.copy_(source), device)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    multiplying = seconds_of(lambda: left @ right, device)
    return DeviceLimits(2 * num_bytes / copying, 2 * size**3 / multiplying)


def seconds_of(function: Callable[[], object], device: torch.device, least_seconds: float = 0.2) -> float:
    """Seconds of one call among many, launched one after another."""
    for _ in range(3):
        function()
    count = 4
    while True:
        _wait(device)
        started = time.perf_counter()
        for _ in range(count):
            function()
        _wait(device)
        elapsed = time.perf_counter() - started
        if elapsed >= least_seconds or device.type != "cuda":
            return elapsed / count
        count = max(2 * count, int(1.2 * count * least_seconds / elapsed))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
