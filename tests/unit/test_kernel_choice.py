"""Which kernels a device gets."""

import logging
import sys

import pytest
import torch

from kvrelay.engine.kernels import choose_kernels
from kvrelay.engine.kernels.reference import ReferenceKernels

CUDA = torch.device("cuda")


def test_a_gpu_gets_triton_kernels() -> None:
    pytest.importorskip("triton")
    from kvrelay.engine.kernels.gpu.kernels import GpuKernels

    assert isinstance(choose_kernels(CUDA, torch.bfloat16, 128), GpuKernels)


def test_heads_that_triton_kernels_do_not_take(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert isinstance(choose_kernels(CUDA, torch.bfloat16, 320), ReferenceKernels)
    assert "heads of 320 elements" in caplog.text


def test_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "kvrelay.engine.kernels.gpu.kernels", None)
    with caplog.at_level(logging.WARNING):
        assert isinstance(choose_kernels(CUDA, torch.bfloat16, 128), ReferenceKernels)
    assert "Triton" in caplog.text
