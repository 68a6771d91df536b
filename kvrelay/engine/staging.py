"""Copies between host and device that nobody waits for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

__all__ = ["HostCopier", "HostCopy", "upload"]

_ALIGNMENT = 8  # bytes; the largest element that is sent


def upload(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[torch.Tensor]:
    """The arrays as tensors on the device; on CUDA by one asynchronous copy, ordered with what is launched there.

    On a CPU the tensors share the arrays' memory.
    """
    if device.type != "cuda":
        return [torch.from_numpy(array).to(device) for array in arrays]
    sizes = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]
    # PyTorch keeps pinned memory until the copies from it are done, and then uses it again.
    pinned = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
    host = pinned.numpy()
    starts = numpy.cumsum([0, *sizes[:-1]]).tolist()
    for array, start in zip(arrays, starts, strict=True):
        host[start : start + array.nbytes] = numpy.ascontiguousarray(array).reshape(-1).view(numpy.uint8)
    sent = pinned.to(device, non_blocking=True)
    tensors = []
    for array, start in zip(arrays, starts, strict=True):
        dtype: torch.dtype = getattr(torch, array.dtype.name)
        tensors.append(sent[start : start + array.nbytes].view(dtype).view(array.shape))
    return tensors


@dataclass(frozen=True, slots=True)
class HostCopy:
    """A tensor on its way to the host."""

    tensor: torch.Tensor
    event: torch.cuda.Event | None

    def wait(self) -> torch.Tensor:
        """The copy, in the CPU's memory; waits for nothing else."""
        if self.event is not None:
            self.event.synchronize()
        return self.tensor


class HostCopier:
    """Copies tensors to the host on a stream of its own, beside what the device computes next."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def start(self, tensor: torch.Tensor) -> HostCopy:
        """Copies the tensor when what has been launched so far is done. Do not overwrite it before `wait` returned."""
        if self._stream is None:
            return HostCopy(tensor.clone(), None)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            pinned.copy_(tensor, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        tensor.record_stream(self._stream)
        return HostCopy(pinned, event)
