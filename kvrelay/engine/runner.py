"""Computes what the scheduler decides: chunks of sequences in, sampled tokens out."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from kvrelay.engine.attention import PagedAttention
from kvrelay.engine.batch import StepInput, make_input
from kvrelay.engine.batch_state import BatchState
from kvrelay.engine.checkpoint import check_checkpoint, model_digest
from kvrelay.engine.decode_step import DecodeStep
from kvrelay.engine.decoder import Decoder, LaunchedStep
from kvrelay.engine.device import choose_device
from kvrelay.engine.feed import choose_feed
from kvrelay.engine.kernels import choose_kernels
from kvrelay.engine.kernels.interface import Kernels
from kvrelay.engine.kernels.reference import ReferenceKernels
from kvrelay.engine.kv_cache import KvCache, join_shared_pool, num_blocks_for
from kvrelay.engine.kv_layout import KvLayout
from kvrelay.engine.models.registry import inspect_model, load_model
from kvrelay.engine.models.spec import Model, ModelSpec
from kvrelay.engine.row_sampler import choose_sampler
from kvrelay.engine.sampler import pack
from kvrelay.engine.sequence import Chunk
from kvrelay.engine.sequence import Sequence as EngineSequence
from kvrelay.engine.staging import HostCopier
from kvrelay.errors import ConfigurationError
from kvrelay.request import Request, Sampling, Token
from kvrelay.settings import EngineSettings

__all__ = ["ModelRunner"]


class ModelRunner:
    """A model, its KV cache and a sampler on one device. Implements `kvrelay.engine.engine.Runner`.

    Attributes:
        overlaps: whether a step may be launched before the tokens of the one before it are known.
        spec: what the checkpoint says.
        layout: of the KV blocks.
        cache: the KV blocks.
        kernels: what the model computes with.
        context_length: tokens that a sequence may have, by model, pool and settings.
    """

    def __init__(
        self,
        model: Model,
        spec: ModelSpec,
        cache: KvCache,
        kernels: Kernels,
        context_length: int,
        settings: EngineSettings,
    ) -> None:
        self._model = model
        self.kernels = kernels
        # The device that is current is the thread's own, and the engine has its thread.
        self._on_device: AbstractContextManager[object] = nullcontext()
        if cache.device.type == "cuda":
            self._on_device = torch.cuda.device(cache.device)
        self._sampler = choose_sampler(cache.device)
        self._copier = HostCopier(cache.device)
        self.spec = spec
        self.cache = cache
        self.context_length = context_length
        on_gpu = cache.device.type == "cuda"
        self.overlaps = settings.overlap == "always" or (settings.overlap == "auto" and on_gpu)
        self._decoder = self._make_decoder(settings.max_num_sequences) if on_gpu or self.overlaps else None
        if on_gpu:
            self._warm_up(settings)

    @property
    def layout(self) -> KvLayout:
        return self.cache.layout

    @property
    def num_blocks(self) -> int:
        return self.cache.num_blocks

    @classmethod
    def load(cls, path: Path, settings: EngineSettings) -> "ModelRunner":
        """Loads a checkpoint and allocates the KV cache. What cannot work is refused before the weights are read.

        Args:
            path: the checkpoint's folder.

        Raises:
            ConfigurationError: the checkpoint or a setting cannot work on this machine.
        """
        if settings.threads:
            torch.set_num_threads(settings.threads)
        torch.set_float32_matmul_precision("highest")  # on CUDA: no TF32
        check_checkpoint(path)
        device = choose_device(settings)
        spec = inspect_model(path)
        _check_context_length(settings, spec)
        dtype = _dtype(settings.dtype, device, spec)
        _check_quantization(settings, device, dtype)
        layout = KvLayout(
            model_digest=model_digest(path, settings.quantization),
            dtype=dtype,
            block_size=settings.block_size,
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
        )
        shared = join_shared_pool(settings, layout, device)
        model = load_model(path, spec, device, getattr(torch, dtype), settings.quantization)
        cache = KvCache(layout, num_blocks_for(settings, layout, device), device, shared)
        kernels = choose_kernels(device, getattr(torch, dtype), spec.head_dim)
        return cls(model, spec, cache, kernels, _context_length(settings, spec, cache), settings)

    def launch(self, chunks: Sequence[Chunk]) -> LaunchedStep:
        """Computes the chunks' KV cache in place; samples one token for each chunk that is its sequence's last."""
        with torch.inference_mode(), self._on_device:
            if self._decoder is not None and self._decoder.takes(chunks):
                return self._decoder.launch(chunks)
            return self._launch_any(chunks)

    def _launch_any(self, chunks: Sequence[Chunk]) -> LaunchedStep:
        step = make_input(chunks, self.cache)
        if self._decoder is not None:
            self._decoder.feed(step)
        logits = self._forward(step)
        sampling = [chunk for chunk in chunks if chunk.samples]
        requests = [chunk.sequence.request.sampling for chunk in sampling]
        tokens = self._sampler.draw(logits, requests, [chunk.end for chunk in sampling])
        if self._decoder is not None:
            self._decoder.keep(step, tokens)
        copy = self._copier.start(pack(logits, requests, tokens))
        return LaunchedStep(copy, requests, range(len(sampling)))

    def run(self, chunks: Sequence[Chunk]) -> list[Token]:
        """As `launch`, and waits."""
        return self.launch(chunks).tokens()

    @torch.inference_mode()
    def compute(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """As `run` without the sampling: the logits `[R, vocabulary]` of the chunks that sample."""
        return self._forward(make_input(chunks, self.cache))

    def watch_decoding(self, around: Callable[[Callable[[], None]], None] | None) -> None:
        """From now on `around` is called with the launch of each decode step, and has to call it; for measurements."""
        if self._decoder is not None:
            self._decoder.around = around

    def _forward(self, step: StepInput) -> torch.Tensor:
        attention = PagedAttention(self.cache, step.batch, self.kernels)
        return self._model.forward(step.token_ids, step.batch.positions, step.sampling_rows, attention)

    def _make_decoder(self, max_rows: int) -> Decoder:
        state = BatchState(max_rows, self.layout.blocks_for(self.context_length), self.cache.device)
        step = DecodeStep(
            self._model,
            self.cache,
            self.kernels,
            state,
            self._sampler.draw_rows,
            choose_feed(self.cache.device),
            self.spec.vocab_size,
            self.context_length,
        )
        return Decoder(state, step, self._copier, max_rows)

    def _warm_up(self, settings: EngineSettings) -> None:
        """Compiles all kernels before the first request comes. The KV cache that it writes has no name."""
        length = min(self.context_length, 2 * self.layout.block_size + 1)
        sequence = EngineSequence(Request("warm-up", (0,) * length, Sampling(1)), slot=settings.max_num_sequences)
        sequence.block_table = list(range(self.layout.blocks_for(length)))
        self.run([Chunk(sequence, 0, length)])
        # The reference kernels know no padding, and ask the device how long the contexts are.
        if self._decoder is not None and settings.cuda_graphs and not isinstance(self.kernels, ReferenceKernels):
            with self._on_device:
                self._decoder.capture(self.cache.device)


def _dtype(name: str, device: torch.device, spec: ModelSpec) -> str:
    if name != "auto":
        return name
    return "float32" if device.type == "cpu" else spec.dtype


def _check_context_length(settings: EngineSettings, spec: ModelSpec) -> None:
    if settings.context_length > spec.context_length:
        raise ConfigurationError(
            f"context_length: {settings.context_length} is more than {spec.context_length}: {spec.context_limit}"
        )


def _context_length(settings: EngineSettings, spec: ModelSpec, cache: KvCache) -> int:
    capacity = cache.num_blocks * cache.layout.block_size
    if settings.context_length > capacity:
        raise ConfigurationError(
            f"context_length: {settings.context_length} is more than the KV pool holds, which is {capacity} tokens"
        )
    return min(settings.context_length or spec.context_length, capacity)


def _check_quantization(settings: EngineSettings, device: torch.device, dtype: str) -> None:
    if settings.quantization != "none" and (device.type != "cpu" or dtype != "float32"):
        raise ConfigurationError(
            f"quantization: {settings.quantization} works on a CPU in float32, not on {device} in {dtype}"
        )
