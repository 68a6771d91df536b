"""The running batch as it stays on the device from step to step; only what changes goes there.

A decoding sequence has a row. All numbers of all rows lie in one flat tensor of words, with a mirror on the host that
tells what the device holds after all that was launched. What differs from the mirror is sent as pairs of index and
word, in one copy. A step advances positions on the device, and `advance` does so in the mirror.
"""

from collections.abc import Sequence as Items
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray

from kvrelay.engine.sequence import Chunk, Sequence
from kvrelay.engine.staging import upload

__all__ = ["BatchState", "Rows"]

# Fields of one number a row. Those of two words come first, so that all are aligned.
_FIELDS = {
    "positions": "int64",
    "slots": "int64",
    "seeds": "int64",
    "context_lengths": "int32",
    "top_k": "int32",
    "temperature": "float32",
    "top_p": "float32",
    "min_p": "float32",
}
_WORD = 4


@dataclass(frozen=True, slots=True)
class Rows:
    """The first B rows of the state; views, so that who writes into them changes the state.

    Attributes:
        positions: `[B]`, int64: of the token that is computed next, in its sequence.
        slots: `[B]`, int64: where in `last_tokens` that token is.
        seeds: `[B]`, int64: the 64 bits of the requests' seeds.
        context_lengths: `[B]`, int32: tokens up to that one, itself included; 0 in a row that nobody has.
        top_k, temperature, top_p, min_p: `[B]`: how the row is sampled, as in `kvrelay.request.Sampling`.
        block_tables: `[B, W]`, int32: the sequences' blocks.
    """

    positions: Any
    slots: Any
    seeds: Any
    context_lengths: Any
    top_k: Any
    temperature: Any
    top_p: Any
    min_p: Any
    block_tables: Any


@dataclass(slots=True)
class _Row:
    """What the device has in a row in use; of the table the first `num_blocks` entries."""

    sequence: Sequence
    table: list[int]
    num_blocks: int = 0


class BatchState:
    """Rows are dense: when one ends, the last takes its place.

    Attributes:
        rows: the whole state on the device.
        last_tokens: `[max_rows + 1]`, int64, on the device: the token sampled last, by the sequences' slots. The last
            entry is for rows that nobody has.
    """

    def __init__(self, max_rows: int, table_width: int, device: torch.device) -> None:
        """Allocates the state, with no row in use.

        Args:
            table_width: blocks that a sequence may have.
        """
        self._device = device
        self._max_rows = max_rows
        self._words_of = _layout(max_rows, table_width)
        self._mirror = numpy.zeros(sum(words.size for words in self._words_of.values()), dtype=numpy.int32)
        self._host, self._host_tokens = self._views(self._mirror, numpy.dtype)
        self._host.slots[:] = max_rows
        self._device_words = torch.from_numpy(self._mirror).to(device, copy=True)
        self.rows, self.last_tokens = self._views(self._device_words, lambda name: getattr(torch, name))
        self._row_of: dict[Sequence, int] = {}
        self._in_use: list[_Row] = []
        self._changed: list[NDArray[numpy.int64]] = []

    @property
    def num_rows(self) -> int:
        """Rows in use."""
        return len(self._in_use)

    def view(self, num_rows: int) -> Rows:
        """The first rows on the device."""
        return Rows(**{name: getattr(self.rows, name)[:num_rows] for name in Rows.__slots__})

    def update(self, chunks: Items[Chunk]) -> list[int]:
        """Makes the state on the device that of a step in which each chunk is one token that samples.

        Returns:
            The row of each chunk. Rows in use are those of the chunks and no more.
        """
        self._evict({chunk.sequence for chunk in chunks})
        order = []
        for chunk in chunks:
            sequence = chunk.sequence
            row = self._row_of.get(sequence)
            if row is None or self._in_use[row].table is not sequence.block_table:
                row = self._join(chunk, row)
            elif self._host.positions[row] != chunk.start:  # a step beside this state computed it
                self._place(row, chunk.start)
            self._extend_table(row)
            order.append(row)
        self._send()
        return order

    def advance(self) -> None:
        """A step was launched that moves each row on by a token."""
        self._host.positions[: self.num_rows] += 1
        self._host.context_lengths[: self.num_rows] += 1

    def _views(self, words: Any, dtype: Any) -> tuple[Rows, Any]:
        views = {}
        for name, kind in (_FIELDS | {"block_tables": "int32", "last_tokens": "int64"}).items():
            indices = self._words_of[name]
            view = words[int(indices.flat[0]) : int(indices.flat[-1]) + 1].view(dtype(kind))
            views[name] = view.reshape(indices.shape) if name == "block_tables" else view
        last_tokens = views.pop("last_tokens")
        return Rows(**views), last_tokens

    def _evict(self, present: Set[Sequence]) -> None:
        if self._row_of.keys() <= present:
            return
        for row in reversed(range(self.num_rows)):
            if self._in_use[row].sequence not in present:
                del self._row_of[self._in_use[row].sequence]
                last = self.num_rows - 1
                if row != last:
                    self._move(last, row)
                self._clear(last)

    def _move(self, source: int, target: int) -> None:
        for name in Rows.__slots__:
            field = getattr(self._host, name)
            field[target] = field[source]
        self._in_use[target] = moved = self._in_use[source]
        self._row_of[moved.sequence] = target
        self._change_row(target)
        self._changed.append(self._words_of["block_tables"][target, : moved.num_blocks])

    def _clear(self, row: int) -> None:
        """Of the last row."""
        self._host.context_lengths[row] = 0
        self._host.positions[row] = 0
        self._host.slots[row] = self._max_rows
        self._change_row(row)
        self._in_use.pop()

    def _join(self, chunk: Chunk, row: int | None) -> int:
        """Gives a sequence a row, or writes its row anew because it has other blocks than before."""
        sequence, sampling = chunk.sequence, chunk.sequence.request.sampling
        if row is None:
            row = self._row_of[sequence] = self.num_rows
            self._in_use.append(_Row(sequence, sequence.block_table))
        else:
            self._in_use[row] = _Row(sequence, sequence.block_table)
        host = self._host
        host.slots[row] = sequence.slot
        host.seeds.view(numpy.uint64)[row] = sampling.seed
        host.top_k[row], host.temperature[row] = sampling.top_k, sampling.temperature
        host.top_p[row], host.min_p[row] = sampling.top_p, sampling.min_p
        self._place(row, chunk.start)
        if chunk.end <= len(sequence.token_ids):  # else a step in flight writes it on the device
            self._host_tokens[sequence.slot] = sequence.token_ids[chunk.start]
            self._changed.append(self._words_of["last_tokens"][sequence.slot])
        return row

    def _place(self, row: int, position: int) -> None:
        self._host.positions[row] = position
        self._host.context_lengths[row] = position + 1
        self._change_row(row)

    def _extend_table(self, row: int) -> None:
        used = self._in_use[row]
        known, length = used.num_blocks, len(used.table)
        if length > known:
            self._host.block_tables[row, known:length] = used.table[known:]
            self._changed.append(self._words_of["block_tables"][row, known:length])
            used.num_blocks = length

    def _change_row(self, row: int) -> None:
        self._changed += [self._words_of[name][row] for name in _FIELDS]

    def _send(self) -> None:
        if not self._changed:
            return
        indices = numpy.concatenate(self._changed)
        self._changed.clear()
        sent_indices, sent_words = upload([indices, self._mirror[indices]], self._device)
        self._device_words.index_copy_(0, sent_indices, sent_words)


def _layout(max_rows: int, table_width: int) -> dict[str, NDArray[numpy.int64]]:
    """Where each field's words lie: `[max_rows, words]`."""
    shapes = {name: (max_rows, numpy.dtype(kind).itemsize // _WORD) for name, kind in _FIELDS.items()}
    shapes = {"last_tokens": (max_rows + 1, 2), **shapes, "block_tables": (max_rows, table_width)}
    layout, start = {}, 0
    for name, shape in shapes.items():
        size = shape[0] * shape[1]
        layout[name] = numpy.arange(start, start + size, dtype=numpy.int64).reshape(shape)
        start += size
    return layout
