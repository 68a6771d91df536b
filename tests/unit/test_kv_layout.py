import dataclasses
from typing import Any

import pytest

from kvrelay.engine.kv_layout import KvLayout

LAYOUT = KvLayout(b"model", "bfloat16", block_size=16, num_layers=28, num_kv_heads=8, head_dim=128)


def test_sizes() -> None:
    assert LAYOUT.block_shape == (28, 2, 16, 8, 128)
    assert LAYOUT.token_bytes == 112 * 1024  # Qwen3-0.6B
    assert LAYOUT.block_bytes == 16 * LAYOUT.token_bytes
    assert dataclasses.replace(LAYOUT, dtype="float32").token_bytes == 2 * LAYOUT.token_bytes
    assert dataclasses.replace(LAYOUT, dtype="float16").token_bytes == LAYOUT.token_bytes


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_blocks_for(num_tokens: int, num_blocks: int) -> None:
    assert LAYOUT.blocks_for(num_tokens) == num_blocks


def test_equal_layouts_have_equal_fingerprints() -> None:
    assert LAYOUT.digest == dataclasses.replace(LAYOUT).digest
    assert len(LAYOUT.digest) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"model_digest": b"other"},
        {"dtype": "float16"},
        {"block_size": 32},
        {"num_layers": 27},
        {"num_kv_heads": 4},
        {"head_dim": 64},
    ],
    ids=str,
)
def test_layouts_that_differ_have_fingerprints_that_differ(change: dict[str, Any]) -> None:
    other = dataclasses.replace(LAYOUT, **change)
    assert other != LAYOUT
    assert other.digest != LAYOUT.digest
