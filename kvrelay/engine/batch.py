"""Which tokens a step computes, and where in the KV cache they lie, as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from kvrelay.engine.kv_cache import KvCache
from kvrelay.engine.sequence import Chunk
from kvrelay.engine.staging import upload

__all__ = ["Batch", "StepInput", "make_batch", "make_input"]


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: T tokens of B chunks. Made once a step, shared by all layers; all tensors are on the model's device.

    Attributes:
        positions: `[T]`, int64, of each token in its sequence.
        rows: `[T]`, int64: where in `KvCache.keys[layer]` each token's key goes; -1 for padding, which goes nowhere.
        query_starts: `[B + 1]`, int32: the tokens of chunk b are those from `query_starts[b]` to `query_starts[b + 1]`.
        context_lengths: `[B]`, int32: tokens of the sequence up to the chunk's end, those of the chunk included; 0 for
            padding.
        block_tables: `[B, W]`, int32: the sequences' blocks, 0 where there is none.
        num_decodes: so many chunks at the beginning have one token each.
        max_context_length: the largest of `context_lengths`, or more.
    """

    positions: torch.Tensor
    rows: torch.Tensor
    query_starts: torch.Tensor
    context_lengths: torch.Tensor
    block_tables: torch.Tensor
    num_decodes: int
    max_context_length: int

    @property
    def num_chunks(self) -> int:
        return self.context_lengths.shape[0]


@dataclass(frozen=True, slots=True)
class StepInput:
    """A step as a model wants it. R chunks sample.

    Attributes:
        token_ids: `[T]`, int64; 0 for those that only the device knows.
        unknown: `[U]`, int64: which of them only the device knows.
        unknown_slots: `[U]`, int64: the slots of their sequences.
        sampling_rows: `[R]`, int64: the tokens after which one is sampled.
        sampling_slots: `[R]`, int64: the slots of their sequences.
    """

    batch: Batch
    token_ids: torch.Tensor
    unknown: torch.Tensor
    unknown_slots: torch.Tensor
    sampling_rows: torch.Tensor
    sampling_slots: torch.Tensor


def make_batch(chunks: Sequence[Chunk], cache: KvCache) -> Batch:
    """Describes where a step's tokens lie.

    Args:
        chunks: in the order of their tokens in the batch. The block tables of their sequences cover them.
    """
    return make_input(chunks, cache).batch


def make_input(chunks: Sequence[Chunk], cache: KvCache) -> StepInput:
    """As `make_batch`, with the tokens."""
    block_size = cache.layout.block_size
    starts = _numbers([chunk.start for chunk in chunks])
    lengths = _numbers([chunk.length for chunk in chunks])
    ends = starts + lengths
    tables = _tables(chunks, -(-ends // block_size))
    query_starts = numpy.zeros(len(chunks) + 1, dtype=numpy.int64)
    numpy.cumsum(lengths, out=query_starts[1:])
    owners = numpy.repeat(numpy.arange(len(chunks)), lengths)  # [T], each token's chunk
    positions = numpy.arange(len(owners)) + (starts - query_starts[:-1])[owners]
    rows = tables[owners, positions // block_size] * numpy.int64(cache.block_stride) + positions % block_size
    sampling = numpy.array([chunk.samples for chunk in chunks], dtype=bool)
    slots = _numbers([chunk.sequence.slot for chunk in chunks])
    sent = upload(
        [
            positions,
            rows,
            query_starts.astype(numpy.int32),
            ends.astype(numpy.int32),
            tables,
            *_tokens(chunks),
            query_starts[1:][sampling] - 1,
            slots[sampling],
        ],
        cache.device,
    )
    longer = numpy.flatnonzero(lengths > 1)
    positions_sent, rows_sent, query_starts_sent, ends_sent, tables_sent, *tokens = sent
    batch = Batch(
        positions=positions_sent,
        rows=rows_sent,
        query_starts=query_starts_sent,
        context_lengths=ends_sent,
        block_tables=tables_sent,
        num_decodes=int(longer[0]) if len(longer) else len(chunks),
        max_context_length=int(ends.max()),
    )
    return StepInput(batch, *tokens)


def _tokens(chunks: Sequence[Chunk]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The ids `[T]`, and of those that are still to come the indices and slots `[U]`."""
    token_ids: list[int] = []
    unknown, slots = [], []
    for chunk in chunks:
        sequence = chunk.sequence
        token_ids += sequence.token_ids[chunk.start : chunk.end]
        if chunk.end > len(sequence.token_ids):
            unknown.append(len(token_ids))
            slots.append(sequence.slot)
            token_ids.append(0)
    return _numbers(token_ids), _numbers(unknown), _numbers(slots)


def _numbers(values: list[int]) -> NDArray[numpy.int64]:
    return numpy.array(values, dtype=numpy.int64)


def _tables(
    chunks: Sequence[Chunk], counts: numpy.ndarray[tuple[int], numpy.dtype[numpy.int64]]
) -> numpy.ndarray[tuple[int, int], numpy.dtype[numpy.int32]]:
    """`[B, W]`: the first `counts[b]` blocks of each chunk's sequence."""
    width = int(counts.max())
    used = chain.from_iterable(
        chunk.sequence.block_table[:count] for chunk, count in zip(chunks, counts.tolist(), strict=True)
    )
    tables = numpy.zeros((len(chunks), width), dtype=numpy.int32)
    tables[numpy.arange(width) < counts[:, None]] = numpy.fromiter(used, dtype=numpy.int32, count=int(counts.sum()))
    return tables
