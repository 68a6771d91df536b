"""The whole decode path of a GPU but for the graphs: all its kernels together, and batches padded to a bucket."""

import bisect
from pathlib import Path

import pytest
import torch

from kvrelay.engine import runner as runner_module
from kvrelay.engine.cuda_graphs import bucket_sizes
from kvrelay.engine.kernels.gpu.feed import GpuFeed
from kvrelay.engine.kernels.gpu.kernels import GpuKernels
from kvrelay.engine.row_sampler import GpuSampler
from tests.checkpoints import greedy_oracle, make_checkpoint
from tests.unit.engine_kit import Kit

MAX_ROWS = 4
PROMPTS = [[5, 6, 7], [8] * 11, [9, 10]]


def test_tokens_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(runner_module, "choose_kernels", lambda *_: GpuKernels())
    monkeypatch.setattr(runner_module, "choose_feed", lambda _: GpuFeed())
    monkeypatch.setattr(runner_module, "choose_sampler", lambda _: GpuSampler())
    path = make_checkpoint(tmp_path / "model", "qwen3", num_hidden_layers=2)
    settings = {"device": device.type, "dtype": "float32", "overlap": "always"}
    kit = Kit(path, **settings, max_num_sequences=MAX_ROWS, max_batched_tokens=13)
    decoder, sizes = kit.runner._decoder, bucket_sizes(MAX_ROWS)
    assert decoder is not None
    step = decoder._step
    decoder._compute = lambda num_rows: step.compute(sizes[bisect.bisect_left(sizes, num_rows)])
    for index, prompt in enumerate(PROMPTS):
        kit.add(str(index), prompt, max_tokens=6)
    kit.drain()
    for index, prompt in enumerate(PROMPTS):
        assert kit.token_ids(str(index)) == greedy_oracle(path, prompt, 6)
