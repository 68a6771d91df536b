"""The kernels in C++, in float32 on a CPU."""

import ctypes

import torch

from kvrelay.engine.batch import Batch
from kvrelay.engine.kernels.interface import HeadNorms, Rotation
from kvrelay.engine.kernels.native.library import Step
from kvrelay.engine.kv_cache import KvCache
from kvrelay.engine.linear import empty_rows

__all__ = ["NativeKernels"]

_LANES = 16


class NativeKernels:
    """Implements `kvrelay.engine.kernels.interface.Kernels`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._prepared: tuple[Batch, KvCache, Step] | None = None

    @staticmethod
    def fits(dtype: torch.dtype, head_dim: int) -> bool:
        """Whether a model can be computed."""
        return dtype == torch.float32 and head_dim % _LANES == 0

    def add_rms_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        output = empty_rows(*hidden.shape)
        self._library.kvrelay_add_rms_norm(
            hidden.data_ptr(),
            None if delta is None else delta.data_ptr(),
            weight.data_ptr(),
            output.data_ptr(),
            hidden.shape[0],
            hidden.shape[1],
            epsilon,
            torch.get_num_threads(),
        )
        return output

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        num_rows, width = gate_up.shape
        output = empty_rows(num_rows, width // 2)
        self._library.kvrelay_gated_silu(
            gate_up.data_ptr(), output.data_ptr(), num_rows, width // 2, torch.get_num_threads()
        )
        return output

    def store(self, key: torch.Tensor, value: torch.Tensor, cache: KvCache, layer: int, batch: Batch) -> None:
        key, value = _with_rows(key), _with_rows(value)
        self._library.kvrelay_store(
            self._step(batch, cache),
            key.data_ptr(),
            key.stride(0),
            key.stride(1),
            value.data_ptr(),
            value.stride(0),
            value.stride(1),
            cache.keys[layer].data_ptr(),
            cache.values[layer].data_ptr(),
        )

    def rotate_and_store(
        self,
        heads: torch.Tensor,
        rotation: Rotation,
        norms: HeadNorms | None,
        cache: KvCache,
        layer: int,
        batch: Batch,
    ) -> torch.Tensor:
        num_query_heads = heads.shape[1] - 2 * cache.layout.num_kv_heads
        self._library.kvrelay_rotate_and_store(
            self._step(batch, cache),
            heads.data_ptr(),
            num_query_heads,
            rotation.cosines.data_ptr(),
            rotation.sines.data_ptr(),
            None if norms is None else norms.query.data_ptr(),
            None if norms is None else norms.key.data_ptr(),
            0.0 if norms is None else norms.epsilon,
            cache.keys[layer].data_ptr(),
            cache.values[layer].data_ptr(),
        )
        return heads[:, :num_query_heads]

    def attend(
        self,
        query: torch.Tensor,
        cache: KvCache,
        layer: int,
        batch: Batch,
        scale: float,
        softcap: float | None = None,
    ) -> torch.Tensor:
        query = _with_rows(query)
        num_tokens, num_heads, head_dim = query.shape
        output = empty_rows(num_tokens, num_heads * head_dim).view(num_tokens, num_heads, head_dim)
        self._library.kvrelay_attend(
            self._step(batch, cache),
            query.data_ptr(),
            query.stride(0),
            query.stride(1),
            query.shape[1],
            cache.keys[layer].data_ptr(),
            cache.values[layer].data_ptr(),
            output.data_ptr(),
            scale,
            softcap or 0.0,
        )
        return output

    def _step(self, batch: Batch, cache: KvCache) -> Step:
        """As the library wants it; all layers of a step share it."""
        if self._prepared is None or self._prepared[0] is not batch or self._prepared[1] is not cache:
            step = Step(
                rows=batch.rows.data_ptr(),
                query_starts=batch.query_starts.data_ptr(),
                context_lengths=batch.context_lengths.data_ptr(),
                block_tables=batch.block_tables.data_ptr(),
                num_tokens=batch.rows.shape[0],
                num_chunks=batch.num_chunks,
                table_width=batch.block_tables.shape[1],
                block_size=cache.layout.block_size,
                block_stride=cache.block_stride,
                num_kv_heads=cache.layout.num_kv_heads,
                head_dim=cache.layout.head_dim,
                num_threads=torch.get_num_threads(),
            )
            self._prepared = (batch, cache, step)
        return self._prepared[2]


def _with_rows(heads: torch.Tensor) -> torch.Tensor:
    """`[T, head, D]` whose last dimension is contiguous."""
    return heads if heads.stride(2) == 1 else heads.contiguous()
