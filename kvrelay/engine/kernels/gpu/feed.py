"""What a decode step does around the model, each half in one launch; see `kvrelay.engine.feed`."""

import torch
import triton
import triton.language as tl

from kvrelay.engine.batch_state import Rows

__all__ = ["GpuFeed"]

_ROWS = 128  # of one program


class GpuFeed:
    """Implements `kvrelay.engine.feed.Feed`."""

    def begin(
        self, rows: Rows, last_tokens: torch.Tensor, block_size: int, block_stride: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows = rows.positions.shape[0]
        token_ids, cache_rows = torch.empty_like(rows.positions), torch.empty_like(rows.positions)
        _begin[(triton.cdiv(num_rows, _ROWS),)](
            rows.positions,
            rows.slots,
            rows.context_lengths,
            rows.block_tables,
            last_tokens,
            token_ids,
            cache_rows,
            rows.block_tables.stride(0),
            block_stride,
            num_rows,
            BLOCK_SIZE=block_size,
            ROWS=_ROWS,
        )
        return token_ids, cache_rows

    def end(
        self, rows: Rows, last_tokens: torch.Tensor, tokens: torch.Tensor, kept: torch.Tensor, turn: torch.Tensor
    ) -> None:
        num_rows = tokens.shape[0]
        _end[(triton.cdiv(num_rows, _ROWS),)](
            rows.positions,
            rows.slots,
            rows.context_lengths,
            last_tokens,
            tokens,
            kept,
            turn,
            kept.stride(0),
            num_rows,
            ROWS=_ROWS,
        )


@triton.jit(do_not_specialize=["table_stride", "num_rows"])
def _begin(
    positions,
    slots,
    context_lengths,
    block_tables,
    last_tokens,
    token_ids,
    cache_rows,
    table_stride,
    block_stride,
    num_rows,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = rows < num_rows
    position = tl.load(positions + rows, mask=present, other=0)
    in_use = tl.load(context_lengths + rows, mask=present, other=0) > 0
    entries = rows.to(tl.int64) * table_stride + position // BLOCK_SIZE
    block = tl.load(block_tables + entries, mask=in_use, other=0).to(tl.int64)
    tl.store(cache_rows + rows, tl.where(in_use, block * block_stride + position % BLOCK_SIZE, -1), mask=present)
    slot = tl.load(slots + rows, mask=present, other=0)
    tl.store(token_ids + rows, tl.load(last_tokens + slot, mask=present, other=0), mask=present)


@triton.jit(do_not_specialize=["kept_stride", "num_rows"])
def _end(
    positions,
    slots,
    context_lengths,
    last_tokens,
    tokens,
    kept,
    turn,
    kept_stride,
    num_rows,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = rows < num_rows
    token = tl.load(tokens + rows, mask=present, other=0)
    tl.store(kept + tl.load(turn) * kept_stride + rows, token, mask=present)
    context = tl.load(context_lengths + rows, mask=present, other=0)
    in_use = context > 0
    tl.store(last_tokens + tl.load(slots + rows, mask=present, other=0), token, mask=in_use)
    tl.store(context_lengths + rows, context + 1, mask=in_use)
    tl.store(positions + rows, tl.load(positions + rows, mask=in_use, other=0) + 1, mask=in_use)
