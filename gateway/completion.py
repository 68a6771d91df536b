"""One request's tokens on their way from the workers to the client: put in order, made text, written to the log."""

import asyncio
from array import array
from collections.abc import Sequence

from gateway.detokenizer import CompletionText
from gateway.response_log import ResponseLog
from kvrelay import wire
from kvrelay.request import Token
from kvrelay.v1 import worker_pb2

__all__ = ["Completion"]


class Completion:
    """Takes tokens by their position in the completion.

    The first token comes from the prefill worker and the others from the decode worker, by another way, so one may
    overtake another; and a sequence that is recomputed says again what it said before.

    Attributes:
        token_ids: written so far.
    """

    def __init__(self, text: CompletionText, log: ResponseLog) -> None:
        self._text = text
        self._log = log
        self._early: dict[int, Token] = {}
        self._changed = asyncio.Event()
        self._stop = asyncio.Event()
        self.token_ids = array("I")

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stop.is_set()

    def add(self, first_index: int, tokens: Sequence[Token]) -> None:
        """Tokens from `first_index` on. What comes after a stop string is dropped."""
        if first_index != self.num_tokens or self._early:
            tokens = self._in_order(first_index, tokens)
        if tokens and not self.stopped:
            self._write(tokens)

    def take(self, tokens: worker_pb2.SequenceTokens) -> None:
        """As `add`, for what a decode worker's frame brings."""
        self.add(tokens.first_index, wire.tokens_from_proto(tokens))

    async def wait_for(self, num_tokens: int) -> None:
        """Until so many tokens are here, or a stop string is."""
        while self.num_tokens < num_tokens and not self.stopped:
            self._changed.clear()
            await self._changed.wait()

    async def wait_for_stop(self) -> None:
        """Until a stop string is here."""
        await self._stop.wait()

    def forget_early(self) -> None:
        """Nothing comes any more to fill the gap before the tokens that came too early."""
        self._early.clear()

    def finish_text(self) -> None:
        """No token follows: what was held back is written."""
        if not self.stopped:
            self._log.append(self._text.flush(), ())

    def _in_order(self, first_index: int, tokens: Sequence[Token]) -> Sequence[Token]:
        """What follows the tokens written so far, of these and of those that came too early; keeps the rest."""
        for index, token in enumerate(tokens, first_index):
            if index >= self.num_tokens:
                self._early[index] = token
        ready: list[Token] = []
        while (index := self.num_tokens + len(ready)) in self._early:
            ready.append(self._early.pop(index))
        return ready

    def _write(self, tokens: Sequence[Token]) -> None:
        delta = self._text.push([token.token_id for token in tokens])
        used = tokens[: delta.num_tokens_used]
        self.token_ids.extend(token.token_id for token in used)
        if delta.stopped:
            self._stop.set()
        self._log.append(delta.text, used)
        self._changed.set()
