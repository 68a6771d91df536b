"""The step that CUDA graphs capture, without CUDA: batches are padded to a bucket, and padding does nothing."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvrelay.engine import decoder as decoder_module
from kvrelay.engine import runner as runner_module
from kvrelay.engine.batch import Batch
from kvrelay.engine.decoder import Decoder
from kvrelay.engine.kernels.reference import ReferenceKernels
from kvrelay.engine.kv_cache import KvCache
from tests.checkpoints import greedy_oracle, make_checkpoint
from tests.unit.engine_kit import Kit

BUCKET = 6
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14, 15, 16], [17]]


class PaddingKernels(ReferenceKernels):
    """Reference kernels that pass over padding, as those for the GPU do."""

    num_padded = 0

    def store(self, key: torch.Tensor, value: torch.Tensor, cache: KvCache, layer: int, batch: Batch) -> None:
        used = batch.rows >= 0
        PaddingKernels.num_padded += int((~used).sum())
        super().store(key[used], value[used], cache, layer, replace(batch, rows=batch.rows[used]))

    def attend(
        self,
        query: torch.Tensor,
        cache: KvCache,
        layer: int,
        batch: Batch,
        scale: float,
        softcap: float | None = None,
    ) -> torch.Tensor:
        padded = batch.context_lengths == 0
        shown = replace(batch, context_lengths=batch.context_lengths.clamp(min=1))
        attended = super().attend(query, cache, layer, shown, scale, softcap)
        if batch.num_decodes == batch.num_chunks:
            attended[padded] = float("nan")  # nothing of a row that nobody has may reach another
        return attended


@pytest.fixture
def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kit]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(runner_module, "choose_kernels", lambda *_: PaddingKernels())
    yield Kit(make_checkpoint(tmp_path / "model"), overlap="always", max_num_sequences=BUCKET)
    torch.set_num_threads(threads)


def decoder_of(kit: Kit) -> Decoder:
    decoder = kit.runner._decoder
    assert decoder is not None
    return decoder


def test_padding_changes_nothing(kit: Kit, tmp_path: Path) -> None:
    decoder, buckets = decoder_of(kit), []

    def compute(num_rows: int) -> None:
        buckets.append(num_rows)
        decoder._step.compute(BUCKET)

    decoder._compute = compute
    untouched = kit.runner.cache.tensor[-1].clone()
    PaddingKernels.num_padded = 0
    for index, prompt in enumerate(PROMPTS):
        kit.add(str(index), prompt, max_tokens=4 + 4 * index)
    kit.drain()
    for index, prompt in enumerate(PROMPTS):
        assert kit.token_ids(str(index)) == greedy_oracle(tmp_path / "model", prompt, 4 + 4 * index)
    assert set(buckets) == {1, 2, 3, 4}
    assert PaddingKernels.num_padded > 0
    assert torch.equal(kit.runner.cache.tensor[-1], untouched)
    rows = decoder._state.rows
    assert not rows.context_lengths[4:].any()
    assert not rows.positions[4:].any()


def test_the_tokens_of_a_step_outlive_the_next(kit: Kit) -> None:
    """They are copied to the host while the next step is computed."""
    decoder = decoder_of(kit)
    outputs = [decoder._step.finish(1)]
    first = outputs[0].data_ptr()
    outputs += [decoder._step.finish(1), decoder._step.finish(1)]
    assert outputs[1].data_ptr() != first == outputs[2].data_ptr()


def test_a_model_that_cannot_be_captured_decodes_without_graphs(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decoder_module, "CudaGraphs", fail)
    with caplog.at_level(logging.WARNING):
        decoder_of(kit).capture(kit.runner.cache.device)
    assert "without CUDA graphs" in caplog.text
    assert "not permitted" in caplog.text
    kit.add("a", PROMPTS[0], max_tokens=9)
    kit.drain()
    assert kit.token_ids("a") == greedy_oracle(tmp_path / "model", PROMPTS[0], 9)


def test_a_step_that_cannot_be_computed_at_all_is_noticed_at_once(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise RuntimeError("no kernel image is available")

    decoder = decoder_of(kit)
    monkeypatch.setattr(decoder._step, "compute", fail)
    with pytest.raises(RuntimeError, match="no kernel image"):
        decoder.capture(kit.runner.cache.device)
