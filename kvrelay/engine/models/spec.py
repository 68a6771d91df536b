"""What the engine knows of a model before its weights are loaded, and what it asks of it afterwards."""

from dataclasses import dataclass
from typing import Protocol

import torch

from kvrelay.engine.attention import PagedAttention

__all__ = ["Model", "ModelSpec"]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a checkpoint's configuration says.

    Attributes:
        architecture: name of the transformers class.
        context_length: tokens a sequence may have.
        context_limit: a sentence that says what sets the context length.
        sliding_window: tokens that some layer attends to at most; None if all attend to everything. The context
            length is never larger, and up to it a window makes no difference.
        dtype: name of the torch dtype that the checkpoint is meant for.
    """

    architecture: str
    vocab_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    context_limit: str
    sliding_window: int | None
    dtype: str


class Model(Protocol):
    """A decoder-only model with its weights."""

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, attention: PagedAttention
    ) -> torch.Tensor:
        """Computes one step: the KV cache of all tokens, and the logits of some.

        Args:
            token_ids: `[T]`, the tokens of all chunks.
            positions: `[T]`, each token's position in its sequence.
            rows: `[R]`, indices of the tokens whose logits are wanted.
            attention: of this step.

        Returns:
            `[R, vocabulary]`, float32.
        """
