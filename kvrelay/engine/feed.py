"""What a decode step does around the model, on the device: its input from the state, and its tokens into the state."""

import logging
from typing import Protocol

import torch

from kvrelay.engine.batch_state import Rows

__all__ = ["Feed", "TorchFeed", "choose_feed"]

log = logging.getLogger(__name__)


class Feed(Protocol):
    """One implementation of the two halves; both can be captured in a CUDA graph."""

    def begin(
        self, rows: Rows, last_tokens: torch.Tensor, block_size: int, block_stride: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The token ids `[B]`, int64, and where their keys go, as `Batch.rows`.

        Args:
            rows: of the state; B of them.
            last_tokens: by slot.
            block_stride: as that of `KvCache`.
        """

    def end(
        self, rows: Rows, last_tokens: torch.Tensor, tokens: torch.Tensor, kept: torch.Tensor, turn: torch.Tensor
    ) -> None:
        """Feeds the tokens `[B]` to the next step, keeps them in row `turn` `[1]` of `kept`, and moves the rows on."""


class TorchFeed:
    """Implements Feed in plain torch."""

    def begin(
        self, rows: Rows, last_tokens: torch.Tensor, block_size: int, block_stride: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = rows.block_tables.gather(1, rows.positions[:, None] // block_size).squeeze(1)  # [B]
        cache_rows = blocks.long() * block_stride + rows.positions % block_size
        return last_tokens.index_select(0, rows.slots), cache_rows.where(rows.context_lengths > 0, -1)

    def end(
        self, rows: Rows, last_tokens: torch.Tensor, tokens: torch.Tensor, kept: torch.Tensor, turn: torch.Tensor
    ) -> None:
        last_tokens.index_copy_(0, rows.slots, tokens)
        kept[:, : len(tokens)].index_copy_(0, turn, tokens[None])
        in_use = rows.context_lengths > 0
        rows.positions.add_(in_use)
        rows.context_lengths.add_(in_use)


def choose_feed(device: torch.device) -> Feed:
    """The fastest implementation for a device."""
    if device.type == "cuda":
        try:
            from kvrelay.engine.kernels.gpu.feed import GpuFeed
        except ImportError as error:
            log.warning("a dozen launches more a step, because Triton cannot be used: %s", error)
        else:
            return GpuFeed()
    return TorchFeed()
