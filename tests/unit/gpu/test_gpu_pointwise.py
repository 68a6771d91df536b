"""Norm and activation against the reference."""

import pytest
import torch

from kvrelay.engine.kernels.gpu.activation import gated_silu
from kvrelay.engine.kernels.gpu.norm import add_rms_norm
from kvrelay.engine.kernels.reference import ReferenceKernels

REFERENCE = ReferenceKernels()
DTYPES = [torch.float32, torch.bfloat16]
# Triton's interpreter cuts bfloat16 off where a GPU rounds: one unit in the last place.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-7}


def random(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * 1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 17, 96, 512, 2560, 5120, 20000])
@pytest.mark.parametrize("with_delta", [True, False])
def test_norm(width: int, dtype: torch.dtype, with_delta: bool, device: torch.device) -> None:
    hidden = random(3, width, dtype=dtype, device=device)
    delta = random(3, width, dtype=dtype, device=device, scale=0.3).flip(0).contiguous() if with_delta else None
    weight = random(width, dtype=dtype, device=device)
    summed = hidden if delta is None else hidden + delta
    normed = add_rms_norm(hidden, delta, weight, 1e-5)
    assert_near(hidden, summed)
    # Of the sum as it was stored, so that its rounding does not count twice.
    assert_near(normed, REFERENCE.add_rms_norm(hidden.clone(), None, weight, 1e-5))
    assert normed.dtype == dtype


def test_norm_of_a_large_hidden_state_with_a_large_epsilon(device: torch.device) -> None:
    hidden = random(2, 640, dtype=torch.bfloat16, device=device, scale=3e4)
    for epsilon in (1e-6, 1e9):
        expected = REFERENCE.add_rms_norm(hidden, None, hidden[0], epsilon)
        assert_near(add_rms_norm(hidden, None, hidden[0], epsilon), expected)


def test_norm_of_zeros_is_zero(device: torch.device) -> None:
    hidden = torch.zeros(2, 48, device=device)
    assert not add_rms_norm(hidden, hidden.clone(), torch.ones(48, device=device), 1e-6).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 128, 1024, 1500, 3072])
def test_activation(width: int, dtype: torch.dtype, device: torch.device) -> None:
    gate_up = random(3, 2 * width, dtype=dtype, device=device, scale=4.0)
    expected = REFERENCE.gated_silu(gate_up.float()).to(dtype)
    assert_near(gated_silu(gate_up), expected)


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_activation_of_extremes(device: torch.device) -> None:
    gate = torch.tensor([[-1e30, -200.0, -0.0, 0.0, 200.0, 1e30]], device=device)
    assert_near(gated_silu(torch.cat((gate, torch.full_like(gate, 2.0)), 1)), gate.clamp(min=0) * 2)


@pytest.mark.parametrize("length", [0, 1])
def test_few_rows(length: int, device: torch.device) -> None:
    hidden = torch.ones(length, 8, device=device)
    weight = torch.ones(8, device=device)
    assert add_rms_norm(hidden, None, weight, 0.0).tolist() == [[1.0] * 8] * length
    assert gated_silu(torch.ones(length, 8, device=device)).shape == (length, 4)
