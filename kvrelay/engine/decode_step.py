"""One decode step from static buffers to static buffers, so that a CUDA graph can replay it."""

from collections.abc import Callable

import torch

from kvrelay.engine.attention import PagedAttention
from kvrelay.engine.batch import Batch
from kvrelay.engine.batch_state import BatchState, Rows
from kvrelay.engine.feed import Feed
from kvrelay.engine.kernels.interface import Kernels
from kvrelay.engine.kv_cache import KvCache
from kvrelay.engine.models.spec import Model

__all__ = ["DecodeStep", "DrawRows"]

DrawRows = Callable[[torch.Tensor, Rows], torch.Tensor]
"""Draws a token for each row of the logits `[B, vocabulary]`: `[B]`, int64."""

_NUM_TURNS = 2  # 0 and 1, in turns


class DecodeStep:
    """Computes, samples, feeds the tokens to the next step, and advances the state: all on the device.

    Attributes:
        logits: `[max_rows, vocabulary]`, float32: of the last step.
        tokens: `[2, max_rows]`, int64: of the last two steps in turns, so that one can be copied to the host while
            the next step is computed.
    """

    def __init__(
        self,
        model: Model,
        cache: KvCache,
        kernels: Kernels,
        state: BatchState,
        draw_rows: DrawRows,
        feed: Feed,
        vocab_size: int,
        context_length: int,
    ) -> None:
        self._model = model
        self._cache = cache
        self._kernels = kernels
        self._state = state
        self._draw_rows = draw_rows
        self._feed = feed
        self._context_length = context_length
        max_rows, device = len(state.rows.positions), cache.device
        self.logits = torch.zeros(max_rows, vocab_size, dtype=torch.float32, device=device)
        self.tokens = torch.zeros(_NUM_TURNS, max_rows, dtype=torch.int64, device=device)
        self._turn = torch.zeros(1, dtype=torch.int64, device=device)
        self._query_starts = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._all_rows = torch.arange(max_rows, dtype=torch.int64, device=device)
        self._num_steps = 0

    @torch.inference_mode()
    def compute(self, num_rows: int) -> None:
        """The step itself, which may be captured. Rows of the state that nobody has do nothing.

        Args:
            num_rows: rows that are computed; all that are in use, or more.
        """
        rows, last_tokens = self._state.view(num_rows), self._state.last_tokens
        block_size, block_stride = self._cache.layout.block_size, self._cache.block_stride
        token_ids, cache_rows = self._feed.begin(rows, last_tokens, block_size, block_stride)
        attention = PagedAttention(self._cache, self._batch(rows, cache_rows), self._kernels)
        logits = self.logits[:num_rows]
        logits.copy_(self._model.forward(token_ids, rows.positions, self._all_rows[:num_rows], attention))
        self._feed.end(rows, last_tokens, self._draw_rows(logits, rows), self.tokens, self._turn)
        self._turn.bitwise_xor_(1)

    def finish(self, num_rows: int) -> torch.Tensor:
        """To be called after each `compute` or replay of it: its tokens `[num_rows]`, good until the next but one."""
        tokens = self.tokens[self._num_steps % _NUM_TURNS, :num_rows]
        self._num_steps += 1
        self._state.advance()
        return tokens

    def reset(self) -> None:
        """Forgets steps that were computed for no other reason than to compile or capture them."""
        self._turn.zero_()
        self._num_steps = 0

    def _batch(self, rows: Rows, cache_rows: torch.Tensor) -> Batch:
        num_rows = len(rows.positions)
        return Batch(
            positions=rows.positions,
            rows=cache_rows,
            query_starts=self._query_starts[: num_rows + 1],
            context_lengths=rows.context_lengths,
            block_tables=rows.block_tables,
            num_decodes=num_rows,
            max_context_length=self._context_length,
        )
