"""The kernels in Triton, for CUDA GPUs."""

import torch

from kvrelay.engine.batch import Batch
from kvrelay.engine.kernels.gpu import activation, norm, rotary
from kvrelay.engine.kernels.gpu.chunk_attention import chunk_attention
from kvrelay.engine.kernels.gpu.decode_attention import decode_attention
from kvrelay.engine.kernels.interface import HeadNorms, Rotation
from kvrelay.engine.kv_cache import KvCache

__all__ = ["GpuKernels"]


class GpuKernels:
    """Implements `kvrelay.engine.kernels.interface.Kernels`, for heads of up to 256 elements.

    Nothing here waits for the device, and a batch of decodes only can be captured in a CUDA graph.
    """

    def add_rms_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        return norm.add_rms_norm(hidden, delta, weight, epsilon)

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        return activation.gated_silu(gate_up)

    def store(self, key: torch.Tensor, value: torch.Tensor, cache: KvCache, layer: int, batch: Batch) -> None:
        rotary.store(key, value, cache, layer, batch)

    def rotate_and_store(
        self,
        heads: torch.Tensor,
        rotation: Rotation,
        norms: HeadNorms | None,
        cache: KvCache,
        layer: int,
        batch: Batch,
    ) -> torch.Tensor:
        return rotary.rotate_and_store(heads, rotation, norms, cache, layer, batch)

    def attend(
        self,
        query: torch.Tensor,
        cache: KvCache,
        layer: int,
        batch: Batch,
        scale: float,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Decodes come first in a batch, chunks of several tokens after them; each kind has its kernel."""
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if batch.num_decodes:
            decode_attention(query, cache, layer, batch, scale, softcap, output)
        if batch.num_decodes < batch.num_chunks:
            chunk_attention(query, cache, layer, batch, scale, softcap, output)
        return output
