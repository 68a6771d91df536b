"""What a model computes besides matrix products: one interface, and what each step hands to it."""

from dataclasses import dataclass
from typing import Protocol

import torch

from kvrelay.engine.batch import Batch
from kvrelay.engine.kv_cache import KvCache

__all__ = ["HeadNorms", "Kernels", "Rotation"]


@dataclass(frozen=True, slots=True)
class Rotation:
    """The rotary embedding of a step's tokens, which all layers share.

    Attributes:
        cosines: `[T, D / 2]`, float32.
        sines: `[T, D / 2]`, float32.
    """

    cosines: torch.Tensor
    sines: torch.Tensor


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Root mean square norms of each query and key head before the rotation, as Qwen3 has.

    Attributes:
        query: `[D]`.
        key: `[D]`.
    """

    query: torch.Tensor
    key: torch.Tensor
    epsilon: float


class Kernels(Protocol):
    """One implementation of the operations below; all implementations compute the same up to rounding.

    T tokens are in the batch, H is the hidden size, D the head dimension. Query heads that share a KV head are
    neighbours.
    """

    def add_rms_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        """Adds `delta` to `hidden` in place, then normalises by the root mean square (Zhang and Sennrich, 2019).

        Args:
            hidden: `[T, H]`, contiguous.
            delta: `[T, H]`, contiguous; None adds nothing.
            weight: `[H]`.

        Returns:
            The normalised rows `[T, H]`; `hidden` stays as it is after the addition.
        """

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up` `[T, I]` of `gate_up` `[T, 2 * I]`, which holds one after the other."""

    def store(self, key: torch.Tensor, value: torch.Tensor, cache: KvCache, layer: int, batch: Batch) -> None:
        """Writes a step's keys and values `[T, kv_head, D]` into the cache."""

    def rotate_and_store(
        self,
        heads: torch.Tensor,
        rotation: Rotation,
        norms: HeadNorms | None,
        cache: KvCache,
        layer: int,
        batch: Batch,
    ) -> torch.Tensor:
        """Normalises (if `norms`) and rotates queries and keys (Su et al., 2021); writes keys and values to the cache.

        Args:
            heads: `[T, query_head + 2 * kv_head, D]`, contiguous: queries, keys, values. May be overwritten.

        Returns:
            The rotated queries `[T, query_head, D]`; the last dimension is contiguous.
        """

    def attend(
        self,
        query: torch.Tensor,
        cache: KvCache,
        layer: int,
        batch: Batch,
        scale: float,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Attends from each token to its sequence up to itself, whose keys and values are in the cache.

        Args:
            query: `[T, query_head, D]`; the last dimension is contiguous.
            scale: factor on the scores.
            softcap: c bounds the scores by `c * tanh(score / c)`, as Gemma 2 does.

        Returns:
            `[T, query_head, D]`, contiguous.
        """
