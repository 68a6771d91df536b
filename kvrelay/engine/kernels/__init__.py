"""What a model computes besides matrix products, and the implementations to choose from."""

import logging

import torch

from kvrelay.engine.kernels.interface import Kernels
from kvrelay.engine.kernels.reference import ReferenceKernels

__all__ = ["choose_kernels"]

log = logging.getLogger(__name__)

_MAX_GPU_HEAD_DIM = 256


def choose_kernels(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernels:
    """The fastest kernels for a device and a model's type and head size."""
    if device.type == "cpu":
        return _cpu_kernels(dtype, head_dim)
    return _gpu_kernels(head_dim)


def _cpu_kernels(dtype: torch.dtype, head_dim: int) -> Kernels:
    from kvrelay.engine.kernels.native.kernels import NativeKernels
    from kvrelay.engine.kernels.native.library import load_library

    library = load_library() if NativeKernels.fits(dtype, head_dim) else None
    return ReferenceKernels() if library is None else NativeKernels(library)


def _gpu_kernels(head_dim: int) -> Kernels:
    if head_dim > _MAX_GPU_HEAD_DIM:
        log.warning("slow kernels, because heads of %d elements are beyond %d", head_dim, _MAX_GPU_HEAD_DIM)
        return ReferenceKernels()
    try:
        from kvrelay.engine.kernels.gpu.kernels import GpuKernels
    except ImportError as error:
        log.warning("slow kernels, because Triton cannot be used: %s", error)
        return ReferenceKernels()
    return GpuKernels()
