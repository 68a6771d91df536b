"""From logits to tokens, for the whole batch at once.

Temperature, top-k, top-p and min-p are applied in the order and with the meaning that transformers gives them. The
token is then found by inverting the cumulative distribution in the order of token ids, with one random number that
depends on seed and position only (`kvrelay.engine.philox`). Because ids and not ranks are counted, a rounding
difference between two workers hardly ever changes the token.
"""

from collections.abc import Sequence

import numpy
import torch

from kvrelay.engine.philox import uniforms
from kvrelay.engine.staging import upload
from kvrelay.request import Sampling, Token, TokenLogprobs

__all__ = ["draw", "pack", "sample", "unpack"]

_LEAST_TEMPERATURE = 1e-5  # below it, and at 0, the likeliest token is taken


def sample(logits: torch.Tensor, requests: Sequence[Sampling], positions: Sequence[int]) -> list[Token]:
    """Draws the next token of each row, and brings all that is asked for to the host; see `draw`."""
    return unpack(pack(logits, requests, draw(logits, requests, positions)), requests)


def draw(logits: torch.Tensor, requests: Sequence[Sampling], positions: Sequence[int]) -> torch.Tensor:
    """Draws the next token of each row.

    A row depends on itself alone. Logits that are not numbers end nothing: in a greedy row they may be chosen, in
    other rows NaN and -inf count as the least finite number and inf as the greatest.

    Args:
        logits: `[R, vocabulary]`, float32.
        requests: how each row is sampled.
        positions: of the tokens that are drawn, in their sequences; the prompt counts.

    Returns:
        `[R]`, int64.
    """
    token_ids = logits.argmax(dim=-1)  # [R]
    random_rows = [row for row, request in enumerate(requests) if request.temperature >= _LEAST_TEMPERATURE]
    if random_rows:
        chosen = [requests[row] for row in random_rows]
        numbers = uniforms([request.seed for request in chosen], [positions[row] for row in random_rows])
        probabilities = _probabilities(_finite(logits[random_rows]), chosen)
        token_ids[random_rows] = _invert(probabilities, torch.from_numpy(numbers).to(logits.device))
    return token_ids


def pack(logits: torch.Tensor, requests: Sequence[Sampling], token_ids: torch.Tensor) -> torch.Tensor:
    """Token ids `[R]`, and the log-probabilities that are asked for, in one tensor: one copy brings it to the host."""
    rows = _reporting(requests)
    if not rows:
        return token_ids
    num_top = max(requests[row].logprobs or 0 for row in rows)
    (indices,) = upload([numpy.array(rows)], logits.device)
    logprobs = _finite(logits[indices]).log_softmax(dim=-1)
    chosen = logprobs.gather(1, token_ids[indices][:, None])
    top = logprobs.topk(min(num_top, logprobs.shape[1]), dim=-1)
    # Both kinds of number are exact in float64.
    details = torch.cat((chosen.double(), top.values.double(), top.indices.double()), dim=1)  # [rows, 1 + 2 * top]
    return torch.cat((token_ids.double(), details.flatten()))


def unpack(packed: torch.Tensor, requests: Sequence[Sampling]) -> list[Token]:
    """The tokens of what `pack` made."""
    values = packed.tolist()
    tokens = [Token(int(token_id)) for token_id in values[: len(requests)]]
    rows = _reporting(requests)
    width = (len(values) - len(requests)) // len(rows) if rows else 0
    for index, row in enumerate(rows):
        start = len(requests) + index * width
        count = min(requests[row].logprobs or 0, width // 2)
        logprobs = values[start + 1 : start + 1 + count]
        ids = map(int, values[start + 1 + width // 2 : start + 1 + width // 2 + count])
        entry = TokenLogprobs(tokens[row].token_id, values[start], tuple(zip(ids, logprobs, strict=True)))
        tokens[row] = Token(tokens[row].token_id, entry)
    return tokens


def _reporting(requests: Sequence[Sampling]) -> list[int]:
    return [row for row, request in enumerate(requests) if request.logprobs is not None]


def _probabilities(logits: torch.Tensor, requests: Sequence[Sampling]) -> torch.Tensor:
    """Unnormalised probabilities, 0 where a request excludes the token."""
    scores = logits - logits.amax(dim=-1, keepdim=True)
    scores /= _column([request.temperature for request in requests], scores)
    limited = [row for row, request in enumerate(requests) if 0 < request.top_k < scores.shape[1]]
    if limited:
        scores[limited] = _keep_top_k(scores[limited], [requests[row].top_k for row in limited])
    limited = [row for row, request in enumerate(requests) if request.top_p < 1]
    if limited:
        scores[limited] = _keep_top_p(scores[limited], [requests[row].top_p for row in limited])
    probabilities = scores.softmax(dim=-1)
    if any(request.min_p > 0 for request in requests):
        least = probabilities.amax(dim=-1, keepdim=True) * _column([request.min_p for request in requests], scores)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    return probabilities


def _keep_top_k(scores: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Keeps the k best of each row, and what equals the last of them."""
    best = scores.topk(max(counts), dim=-1).values
    last = best.gather(1, torch.tensor(counts, device=scores.device)[:, None] - 1)
    return scores.masked_fill(scores < last, float("-inf"))


def _keep_top_p(scores: torch.Tensor, masses: Sequence[float]) -> torch.Tensor:
    """Keeps the fewest best whose probabilities add up to the mass or more, and one at least."""
    ordered, token_ids = scores.sort(dim=-1, stable=True)
    cumulative = ordered.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    excluded = cumulative <= 1 - _column(masses, cumulative)
    excluded[:, -1] = False
    return scores.masked_fill(torch.empty_like(excluded).scatter_(1, token_ids, excluded), float("-inf"))


def _invert(probabilities: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The first token of each row at which the cumulative distribution exceeds the row's number in [0, 1)."""
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    targets = numbers[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, targets, right=True).squeeze(1)
    return found.clamp_(max=probabilities.shape[1] - 1)


def _finite(logits: torch.Tensor) -> torch.Tensor:
    return logits.nan_to_num(nan=torch.finfo(logits.dtype).min)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
