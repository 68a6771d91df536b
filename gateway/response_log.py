"""The responses of a request: written once, read by its client and by whoever reconnects, kept for a while."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from gateway.pacing import Pacer
from kvrelay.errors import KvrelayError, OutOfRange
from kvrelay.request import Chunk, FinishReason, Timings, Token, Usage

__all__ = ["HistoryEntry", "ResponseHistory", "ResponseLog"]


@dataclass(frozen=True, slots=True)
class _Finish:
    reason: FinishReason
    usage: Usage
    timings: Timings


class ResponseLog:
    """The responses of one request. It has one writer and any number of readers, all on one event loop.

    What is written stays pending until a reader is ready for it and the pacer lets it go; then all that is pending
    becomes one response. So a slow reader gets few large responses and holds up nobody, and every reader gets the same
    ones. The first response and the last go without the pacer.

    Args:
        on_abandoned: called when the last reader leaves before the writer is done.
        pacer: shared by the logs of a gateway; None lets everything go at once.

    Attributes:
        num_readers: those that are reading now.
    """

    def __init__(
        self, request_id: str, on_abandoned: Callable[[], None] | None = None, pacer: Pacer | None = None
    ) -> None:
        self._request_id = request_id
        self._on_abandoned = on_abandoned
        self._pacer = pacer
        self._formed: list[Chunk] = []
        self._pending_text: list[str] = []
        self._pending_tokens: list[Token] = []
        self._finish: _Finish | None = None
        self._error: KvrelayError | None = None
        self._ready = asyncio.Event()  # what is pending may become a response, or the log has ended
        self.num_readers = 0

    @property
    def ended(self) -> bool:
        """Whether the writer is done, well or not."""
        return self._finish is not None or self._error is not None

    @property
    def failed(self) -> bool:
        """Whether it ended with an error."""
        return self._error is not None

    def append(self, text: str, tokens: Sequence[Token]) -> None:
        """Adds text and tokens; either may be empty. Nothing is added after the end."""
        if self.ended or not (text or tokens):
            return
        self._pending_text.append(text)
        self._pending_tokens.extend(tokens)
        if self._ready.is_set():
            return
        if self._pacer is None or not self._formed:
            self._ready.set()
        else:
            self._pacer.set_in_turn(self._ready)

    def finish(self, reason: FinishReason, usage: Usage, timings: Timings) -> None:
        """Ends the log well; the last response says so. Only the first end counts."""
        if not self.ended:
            self._finish = _Finish(reason, usage, timings)
            self._ready.set()

    def fail(self, error: KvrelayError) -> None:
        """Ends the log with an error, which readers get after all responses. Only the first end counts."""
        if not self.ended:
            self._error = error
            self._ready.set()

    async def read(self, after_seq: int = 0) -> AsyncGenerator[Chunk, None]:
        """Yields the responses that follow `after_seq`, the old ones exactly as they were, then new ones to the end.

        The reader must close the iterator (`contextlib.aclosing`) if it leaves early.

        Raises:
            OutOfRange: no response has this seq.
            KvrelayError: what the request failed with.
        """
        if after_seq > len(self._formed):
            raise OutOfRange(f"resume_after_seq: {after_seq}; the last response so far is {len(self._formed)}")
        self.num_readers += 1
        try:
            while (response := await self._after(after_seq)) is not None:
                after_seq = response.seq
                yield response
        finally:
            self.num_readers -= 1
            if self.num_readers == 0 and not self.ended and self._on_abandoned is not None:
                self._on_abandoned()

    async def _after(self, seq: int) -> Chunk | None:
        """The response after this one, waiting for it; None after the last."""
        while seq == len(self._formed):
            await self._ready.wait()
            if seq == len(self._formed) and not self._form():
                if self._error is not None:
                    raise self._error
                return None
        return self._formed[seq]

    def _form(self) -> bool:
        """Makes all that is pending a response; says whether there was anything, as there is unless the log ended."""
        if not self.ended:
            self._ready.clear()
        last = self._finish if not (self._formed and self._formed[-1].finish_reason) else None
        if not self._pending_text and last is None:
            return False
        tokens, self._pending_tokens = self._pending_tokens, []
        text, self._pending_text = "".join(self._pending_text), []
        self._formed.append(
            Chunk(
                request_id=self._request_id,
                seq=len(self._formed) + 1,
                text=text,
                token_ids=tuple(token.token_id for token in tokens),
                logprobs=tuple(token.logprobs for token in tokens if token.logprobs is not None),
                finish_reason=last.reason if last else None,
                usage=last.usage if last else None,
                timings=last.timings if last else None,
            )
        )
        return True


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """A request's responses, and what tells it from another request under the same id."""

    body_digest: str
    log: ResponseLog


class ResponseHistory:
    """The requests that a client can resume: all that run, and for a while those that have ended.

    Args:
        replay_seconds: how long one that has ended is kept.
        replay_requests: how many of those are kept; the oldest go first.
    """

    def __init__(self, replay_seconds: float, replay_requests: int) -> None:
        self._replay_seconds = replay_seconds
        self._replay_requests = replay_requests
        self._entries: dict[str, HistoryEntry] = {}
        self._ended_at: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, request_id: str, body_digest: str, log: ResponseLog) -> None:
        """Keeps a request that begins to run; replaces one of the same id."""
        self._ended_at.pop(request_id, None)
        self._entries[request_id] = HistoryEntry(body_digest, log)

    def get(self, request_id: str, now: float) -> HistoryEntry | None:
        """Returns the entry; None if there never was one, or not any more. `now` is in seconds, on any one clock."""
        self.evict(now)
        return self._entries.get(request_id)

    def ended(self, request_id: str, now: float) -> None:
        """From now on the request is kept for a limited time; an unknown one is passed over."""
        if request_id in self._entries:
            self._ended_at.setdefault(request_id, now)
        self.evict(now)

    def remove(self, request_id: str) -> None:
        """Forgets a request, such as one that was refused before it ran."""
        self._entries.pop(request_id, None)
        self._ended_at.pop(request_id, None)

    def evict(self, now: float) -> None:
        """Drops what has been kept long enough."""
        while self._ended_at:
            request_id, ended_at = next(iter(self._ended_at.items()))
            if now - ended_at < self._replay_seconds and len(self._ended_at) <= self._replay_requests:
                return
            self.remove(request_id)
