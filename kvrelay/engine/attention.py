"""Paged attention: the one place where tokens of a batch meet, and where the KV cache is written and read."""

from dataclasses import dataclass

import torch

from kvrelay.engine.batch import Batch
from kvrelay.engine.kernels.interface import HeadNorms, Kernels, Rotation
from kvrelay.engine.kv_cache import KvCache

__all__ = ["PagedAttention"]


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """Attention for one step of the engine: knows which tokens the batch has and where their KV cache lies."""

    cache: KvCache
    batch: Batch
    kernels: Kernels

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Writes the new keys and values into the cache, then attends to each token's sequence up to itself.

        Args:
            layer: index of the layer.
            query: `[T, query_head, head_dim]`; query heads that share a KV head are neighbours.
            key: `[T, kv_head, head_dim]`.
            value: `[T, kv_head, head_dim]`.
            scale: factor on the scores.
            softcap: c bounds the scores by `c * tanh(score / c)`, as Gemma 2 does.

        Returns:
            `[T, query_head, head_dim]`.
        """
        self.kernels.store(key, value, self.cache, layer, self.batch)
        return self.kernels.attend(query, self.cache, layer, self.batch, scale, softcap)

    def rotate_and_attend(
        self, layer: int, heads: torch.Tensor, rotation: Rotation, norms: HeadNorms | None, scale: float
    ) -> torch.Tensor:
        """As `attend`, for heads that a fused projection made and that are still to be rotated.

        Args:
            heads: `[T, query_head + 2 * kv_head, head_dim]`: queries, keys, values. May be overwritten.

        Returns:
            `[T, query_head, head_dim]`.
        """
        query = self.kernels.rotate_and_store(heads, rotation, norms, self.cache, layer, self.batch)
        return self.kernels.attend(query, self.cache, layer, self.batch, scale)
