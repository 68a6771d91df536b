"""The compiled kernels against the reference, for each level of instructions that this machine has."""

import ctypes
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrelay.engine.kernels import choose_kernels
from kvrelay.engine.kernels.interface import HeadNorms, Rotation
from kvrelay.engine.kernels.native import library as native_library
from kvrelay.engine.kernels.native.kernels import NativeKernels
from kvrelay.engine.kernels.native.library import load_library
from kvrelay.engine.kernels.reference import ReferenceKernels
from tests.unit.kernel_cases import filled_case

REFERENCE = ReferenceKernels()
LAYER = 1
CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 2e-5}
CAPABILITY = torch.backends.cpu.get_cpu_capability()
LEVELS = {"AVX512": ["avx512", "avx2"], "AVX2": ["avx2"]}.get(CAPABILITY, [])
MIXED = [(6, 7), (0, 1), (31, 32), (0, 90), (13, 40), (64, 65)]


@pytest.fixture(params=LEVELS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> NativeKernels:
    library = load_level(request.param, monkeypatch)
    assert library is not None, "scripts/install compiles the kernels, and this machine has the instructions"
    return NativeKernels(library)


def load_level(level: str, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL | None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", level.upper)
    return load_library.__wrapped__()


@pytest.mark.parametrize(
    ("block_size", "num_heads", "num_kv_heads", "head_dim", "softcap"),
    [
        (1, 4, 4, 16, None),
        (5, 4, 2, 64, None),
        (16, 7, 1, 64, 1.5),
        (5, 12, 1, 80, None),
        (16, 4, 2, 128, None),
        (5, 4, 4, 128, 1.5),
        (16, 2, 1, 256, None),
    ],
)
def test_attention(
    kernels: NativeKernels, block_size: int, num_heads: int, num_kv_heads: int, head_dim: int, softcap: float | None
) -> None:
    torch.manual_seed(0)
    cache, batch = filled_case(MIXED, block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim, layer=LAYER)
    query = torch.randn(len(batch.positions), num_heads, head_dim)
    expected = REFERENCE.attend(query, cache, LAYER, batch, head_dim**-0.5, softcap)
    torch.testing.assert_close(kernels.attend(query, cache, LAYER, batch, head_dim**-0.5, softcap), expected, **CLOSE)


def test_attention_of_queries_with_strides(kernels: NativeKernels) -> None:
    cache, batch = filled_case(MIXED, block_size=4, num_kv_heads=2, head_dim=16, layer=LAYER)
    heads = torch.randn(len(batch.positions), 8, 16)
    turned = torch.randn(4, len(batch.positions), 16).transpose(0, 1)
    strange = torch.randn(len(batch.positions), 16, 4).transpose(1, 2)
    for query in (heads[:, :4], turned, strange):
        expected = REFERENCE.attend(query, cache, LAYER, batch, 0.25)
        torch.testing.assert_close(kernels.attend(query, cache, LAYER, batch, 0.25), expected, **CLOSE)


def test_scores_far_apart(kernels: NativeKernels) -> None:
    cache, batch = filled_case([(40, 41), (0, 41)], block_size=4, num_kv_heads=1, head_dim=16, layer=LAYER)
    query = torch.randn(len(batch.positions), 2, 16)
    for scale in (0.0, 1e-6, 300.0, 1e6):
        expected = REFERENCE.attend(query, cache, LAYER, batch, scale)
        torch.testing.assert_close(kernels.attend(query, cache, LAYER, batch, scale), expected, atol=2e-4, rtol=2e-4)


@given(
    ranges=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 50)), min_size=1, max_size=6),
    block_size=st.integers(1, 20),
    group=st.integers(1, 9),
    num_kv_heads=st.integers(1, 3),
    vectors=st.integers(1, 6),
)
@settings(max_examples=30)
def test_attention_of_any_batch(
    ranges: list[tuple[int, int]], block_size: int, group: int, num_kv_heads: int, vectors: int
) -> None:
    library = load_library()
    if library is None:
        assert not LEVELS
        return
    bounds = [(start, start + length) for start, length in ranges]
    head_dim = 16 * vectors
    cache, batch = filled_case(bounds, block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim, layer=LAYER)
    query = torch.randn(len(batch.positions), group * num_kv_heads, head_dim)
    expected = REFERENCE.attend(query, cache, LAYER, batch, head_dim**-0.5)
    actual = NativeKernels(library).attend(query, cache, LAYER, batch, head_dim**-0.5)
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 16), (3, 3, 48), (8, 1, 128)])
def test_rotation_and_store(
    kernels: NativeKernels, num_heads: int, num_kv_heads: int, head_dim: int, normed: bool
) -> None:
    torch.manual_seed(1)
    cache, batch = filled_case(MIXED, block_size=4, num_kv_heads=num_kv_heads, head_dim=head_dim, layer=LAYER)
    num_tokens = len(batch.positions)
    heads = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    angles = torch.randn(num_tokens, head_dim // 2)
    rotation = Rotation(angles.cos(), angles.sin())
    norms = HeadNorms(torch.rand(head_dim) + 0.5, torch.rand(head_dim) + 0.5, 1e-6) if normed else None
    before = cache.tensor.clone()
    query = REFERENCE.rotate_and_store(heads.clone(), rotation, norms, cache, LAYER, batch)
    expected = cache.tensor.clone()
    cache.tensor.copy_(before)
    torch.testing.assert_close(kernels.rotate_and_store(heads, rotation, norms, cache, LAYER, batch), query, **CLOSE)
    torch.testing.assert_close(cache.tensor, expected, equal_nan=True, **CLOSE)
    assert not torch.equal(cache.tensor.nan_to_num(), before.nan_to_num())


def test_store_of_heads_with_strides(kernels: NativeKernels) -> None:
    cache, batch = filled_case(MIXED, block_size=4, num_kv_heads=2, head_dim=32, layer=LAYER)
    key = torch.randn(2, len(batch.positions), 32).transpose(0, 1)
    value = torch.randn(len(batch.positions), 6, 32)[:, 3:5]
    before = cache.tensor.clone()
    REFERENCE.store(key, value, cache, LAYER, batch)
    expected = cache.tensor.clone()
    cache.tensor.copy_(before)
    kernels.store(key, value, cache, LAYER, batch)
    torch.testing.assert_close(cache.tensor, expected, equal_nan=True, atol=0, rtol=0)


@pytest.mark.parametrize("num_rows", [0, 1, 5, 300])
@pytest.mark.parametrize("size", [8, 17, 512])
def test_norm(kernels: NativeKernels, num_rows: int, size: int) -> None:
    hidden, delta, weight = torch.randn(num_rows, size), torch.randn(num_rows, size), torch.randn(size)
    for addend in (None, delta):
        ours, theirs = hidden.clone(), hidden.clone()
        expected = REFERENCE.add_rms_norm(theirs, addend, weight, 1e-5)
        torch.testing.assert_close(kernels.add_rms_norm(ours, addend, weight, 1e-5), expected, **CLOSE)
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


@pytest.mark.parametrize("num_rows", [0, 1, 5, 300])
@pytest.mark.parametrize("size", [8, 16, 17, 344])
def test_gate(kernels: NativeKernels, num_rows: int, size: int) -> None:
    gate_up = torch.randn(num_rows, 2 * size) * 20
    torch.testing.assert_close(kernels.gated_silu(gate_up), REFERENCE.gated_silu(gate_up), **CLOSE)


def test_gate_of_extremes(kernels: NativeKernels) -> None:
    gates = torch.tensor([-1e30, -200.0, -88.0, -0.0, 0.0, 87.5, 200.0, 1e30] * 2)
    gate_up = torch.cat((gates, torch.ones(16)))[None]
    torch.testing.assert_close(kernels.gated_silu(gate_up), REFERENCE.gated_silu(gate_up), atol=1e-30, rtol=1e-5)


def test_what_the_compiled_kernels_cannot_do_is_left_to_torch() -> None:
    cpu = torch.device("cpu")
    assert isinstance(choose_kernels(cpu, torch.float32, 8), ReferenceKernels)
    assert isinstance(choose_kernels(cpu, torch.bfloat16, 64), ReferenceKernels)
    assert isinstance(choose_kernels(cpu, torch.float32, 64), NativeKernels) == bool(LEVELS)


def test_a_machine_without_a_library_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native_library, "__file__", str(tmp_path / "library.py"))
    assert load_level("avx2", monkeypatch) is None
    assert "no compiled kernels" in caplog.text
    (tmp_path / f"avx2{EXTENSION_SUFFIXES[0]}").write_bytes(b"no library")
    assert load_level("avx2", monkeypatch) is None
