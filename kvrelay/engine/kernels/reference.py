"""The kernels in plain torch, for every device and type: what the others are measured against."""

import torch
from torch.nn import functional

from kvrelay.engine.batch import Batch
from kvrelay.engine.kernels.interface import HeadNorms, Rotation
from kvrelay.engine.kv_cache import KvCache

__all__ = ["ReferenceKernels"]


class ReferenceKernels:
    """Implements `kvrelay.engine.kernels.interface.Kernels`."""

    def add_rms_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        if delta is not None:
            hidden += delta
        return functional.rms_norm(hidden, weight.shape, weight, epsilon)

    def gated_silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def store(self, key: torch.Tensor, value: torch.Tensor, cache: KvCache, layer: int, batch: Batch) -> None:
        cache.keys[layer].index_copy_(0, batch.rows, key)
        cache.values[layer].index_copy_(0, batch.rows, value)

    def rotate_and_store(
        self,
        heads: torch.Tensor,
        rotation: Rotation,
        norms: HeadNorms | None,
        cache: KvCache,
        layer: int,
        batch: Batch,
    ) -> torch.Tensor:
        num_kv_heads = cache.layout.num_kv_heads
        num_heads = heads.shape[1] - 2 * num_kv_heads
        query, key, value = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        if norms is not None:
            query = functional.rms_norm(query, norms.query.shape, norms.query, norms.epsilon)
            key = functional.rms_norm(key, norms.key.shape, norms.key, norms.epsilon)
        self.store(_rotate(key, rotation), value, cache, layer, batch)
        return _rotate(query, rotation)

    def attend(
        self,
        query: torch.Tensor,
        cache: KvCache,
        layer: int,
        batch: Batch,
        scale: float,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Each chunk gathers the keys and values of its sequence, so nothing is padded."""
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        slots = torch.arange(cache.layout.block_size, device=cache.device)
        starts, ends = batch.query_starts.tolist(), batch.context_lengths.tolist()
        for index, context_length in enumerate(ends):
            tokens = slice(starts[index], starts[index + 1])
            blocks = batch.block_tables[index].long()
            rows = (blocks[:, None] * cache.block_stride + slots).flatten()[:context_length]  # [C]
            output[tokens] = _attend(
                query[tokens],
                cache.keys[layer].index_select(0, rows),
                cache.values[layer].index_select(0, rows),
                _causal_mask(tokens.stop - tokens.start, context_length, cache.device),
                scale,
                softcap,
            )
        return output


def _rotate(heads: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotates `heads` `[T, head, D]`: dimension i together with dimension i + D / 2."""
    cosines, sines = (part[:, None].to(heads.dtype) for part in (rotation.cosines, rotation.sines))
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


def _causal_mask(num_queries: int, context_length: int, device: torch.device) -> torch.Tensor | None:
    if num_queries == 1:
        return None
    allowed = torch.ones(num_queries, context_length, dtype=torch.bool, device=device)  # [Q, C]
    return allowed.tril(diagonal=context_length - num_queries)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of one chunk.

    Args:
        query: `[Q, query_head, D]`.
        key: `[C, kv_head, D]`.
        value: `[C, kv_head, D]`.
        mask: `[Q, C]`, true where attention is allowed; None for a single token.
    """
    if softcap is not None:
        return _attend_softcapped(query, key, value, mask, scale, softcap)
    attended = functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],  # [1, query_head, Q, D]
        key.transpose(0, 1)[None],  # [1, kv_head, C, D]
        value.transpose(0, 1)[None],
        attn_mask=mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended[0].transpose(0, 1)


def _attend_softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    grouped = query.reshape(len(query), key.shape[1], -1, query.shape[2]).permute(1, 2, 0, 3)  # [kv_head, group, Q, D]
    scores = grouped @ key.permute(1, 2, 0)[:, None] * scale  # [kv_head, group, Q, C]
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value.transpose(0, 1)[:, None]).permute(2, 0, 1, 3).flatten(1, 2)
