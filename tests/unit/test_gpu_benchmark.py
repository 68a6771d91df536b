"""The GPU benchmark on a CPU: it runs, each part apart, and says so where there is no GPU."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_limits import DeviceLimits
from benchmarks.gpu_model import ModelCase
from benchmarks.gpu_parts import Bench

TINY = ["--device", "cpu", "--shape", "tiny"]
CPU_PARTS = ("decode", "prefill", "attention", "serve")


def parts(*names: str) -> list[str]:
    return [word for name in names for word in ("--part", name)]


def test_all_parts_fill_their_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([*TINY, *parts(*CPU_PARTS), "--results", str(tmp_path)]) == 0
    tables = {path.stem: json.loads(path.read_text())["rows"] for path in tmp_path.glob("*.json")}
    assert set(tables) == {"gpu-limits", "gpu-decode", "gpu-prefill", "gpu-attention", "gpu-transformers"}
    assert [(row["batch"], row["context"]) for row in tables["gpu-decode"]] == [(1, 16), (1, 32), (2, 16), (2, 32)]
    assert all(row["tokens/s"]["median"] > 0 and row["limit"] > 0 for row in tables["gpu-decode"])
    assert tables["gpu-transformers"][0]["kvrelay tokens/s"] > 0
    assert tables["gpu-transformers"][0]["ratio"] is None
    assert "| tiny | 2 | 32 |" in capsys.readouterr().out


def test_a_part_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(bench: Bench) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Bench, "decode", fail)
    assert gpu.main([*TINY, *parts("decode", "prefill"), "--results", str(tmp_path)]) == 1
    assert {path.stem for path in tmp_path.glob("*.json")} == {"gpu-limits", "gpu-prefill"}
    assert "decode failed" in caplog.text


def test_no_part_begins_after_the_time_limit(tmp_path: Path) -> None:
    assert gpu.main([*TINY, "--seconds", "-1", "--results", str(tmp_path)]) == 1
    assert {path.stem for path in tmp_path.glob("*.json")} == {"gpu-limits"}


def test_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().err


def test_the_limits_are_those_of_the_model_card() -> None:
    """An 8B model streams 15 GB of weights and keeps 128 KiB of keys and values a token."""
    case = ModelCase("llama-3.1-8b", torch.device("cuda"), 4096, 256)
    assert 2 * case.num_streamed_weights == pytest.approx(15.0e9, rel=0.01)
    assert case.kv_bytes_per_token == 128 << 10
    limits = DeviceLimits(bytes_per_second=4.3e12, flops=790e12)
    assert 1 / limits.decode_seconds(case, 1, 1024) == pytest.approx(284, rel=0.01)
    assert 256 / limits.decode_seconds(case, 256, 1024) == pytest.approx(19915, rel=0.02)
    assert 2048 / limits.prefill_seconds(case, 2048) == pytest.approx(54000, rel=0.05)
    small = ModelCase("qwen3-0.6b", torch.device("cuda"), 4096, 256)
    assert small.kv_bytes_per_token == 112 << 10
