"""Our place in transformers' attention interface: models built for it ask us for each layer's attention."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

__all__ = ["INTERFACE_NAME", "AttentionCall", "answer_attention"]

# No mask function is registered under this name: transformers then makes no masks.
INTERFACE_NAME = "kvrelay"


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What a model asks of attention in one layer.

    Attributes:
        query: `[1, query_head, T, D]`.
        key: `[1, kv_head, T, D]`.
        value: `[1, kv_head, T, D]`.
        mask: None unless the model made one by itself.
        causal: whether a token attends to nothing after it.
        options: what else was passed and is not None, and neither false.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    causal: bool
    options: dict[str, Any]


Answer = Callable[[AttentionCall], torch.Tensor]
_answer: ContextVar[Answer] = ContextVar("attention")


@contextmanager
def answer_attention(answer: Answer) -> Iterator[None]:
    """Inside, `answer` is the attention of models built for the interface; it gives `[1, T, query_head, D]`."""
    token = _answer.set(answer)
    try:
        yield
    finally:
        _answer.reset(token)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    causal = options.pop("is_causal", None)
    call = AttentionCall(
        layer=getattr(module, "layer_idx", -1),
        query=query,
        key=key,
        value=value,
        mask=attention_mask,
        causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
        options={name: option for name, option in options.items() if option is not None and option is not False},
    )
    return _answer.get()(call), None


AttentionInterface.register(INTERFACE_NAME, _attention)
