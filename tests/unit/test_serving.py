"""The two workers' news of one request race; whichever comes first, the request ends as it should."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry import trace

from gateway.completion import Completion
from gateway.detokenizer import CompletionText
from gateway.fleet import TokenSink
from gateway.recovery import Recovery
from gateway.reservation import Reservation
from gateway.response_log import ResponseLog
from gateway.serving import Account, Serving
from kvrelay.errors import FailedPrecondition, KvrelayError, Unavailable
from kvrelay.request import FinishReason, Request, Sampling
from kvrelay.v1 import inference_pb2, worker_pb2

TIME_LIMIT = 5
LAST = worker_pb2.FirstToken(token_id=1, finish_reason=inference_pb2.FINISH_REASON_STOP)


class Silent:
    """A detokenizer; the texts do not matter here."""

    def push(self, token_ids: list[int]) -> str:
        return ""

    def flush(self) -> str:
        return ""


def new_serving() -> Serving:
    text: Any = Silent()
    completion = Completion(CompletionText(text, ()), ResponseLog("request"))
    request = Request("request", (1, 2), Sampling(max_tokens=4))
    dispatch: Any = None
    recovery = Recovery(max_failures=0)
    return Serving(
        request, completion, Account(), dispatch, recovery, stoppable=False, deadline=None, span=trace.INVALID_SPAN
    )


async def follow(prefill_says: asyncio.Event, decode_fails_with: KvrelayError) -> FinishReason:
    """What comes of a request whose decode worker fails before the prefill worker's first token is here."""

    async def responses() -> AsyncIterator[worker_pb2.PrefillResponse]:
        await prefill_says.wait()
        yield worker_pb2.PrefillResponse(first_token=LAST)

    async def decode() -> FinishReason:
        raise decode_fails_with

    placement: Any = SimpleNamespace(prefill_done=lambda: None)
    decoding = asyncio.create_task(decode())
    await asyncio.wait([decoding])
    async with asyncio.timeout(TIME_LIMIT):
        asyncio.get_running_loop().call_later(0.01, prefill_says.set)
        return await new_serving()._follow(responses(), decoding, placement)


async def test_the_prefill_worker_explains_why_the_handover_ended() -> None:
    ended = FailedPrecondition("nothing is held any more", reason="HANDOVER_ENDED")
    assert await follow(asyncio.Event(), ended) is FinishReason.STOP


async def test_a_lost_decode_worker_ends_the_request_at_once() -> None:
    with pytest.raises(Unavailable):
        await follow(asyncio.Event(), Unavailable("lost", reason="WORKER_LOST"))


class Workers:
    """Both workers of one request. Prefill ends only after the decode worker has been asked."""

    def __init__(self) -> None:
        self.decode_asked = asyncio.Event()
        self.asked_for_announcement = False

    @contextlib.asynccontextmanager
    async def prefill(
        self, sequence: worker_pb2.SequenceSpec, timeout: float | None, announce_last_chunk: bool = False
    ) -> AsyncIterator[AsyncIterator[worker_pb2.PrefillResponse]]:
        self.asked_for_announcement = announce_last_chunk
        yield self._responses()

    async def _responses(self) -> AsyncIterator[worker_pb2.PrefillResponse]:
        yield worker_pb2.PrefillResponse(admitted=worker_pb2.Admitted(ticket=b"ticket"))
        if self.asked_for_announcement:
            for _ in range(10):
                await asyncio.sleep(0)
            assert not self.decode_asked.is_set(), "it was asked before the last chunk"
            yield worker_pb2.PrefillResponse(last_chunk=worker_pb2.LastChunk())
        await self.decode_asked.wait()
        yield worker_pb2.PrefillResponse(first_token=worker_pb2.FirstToken(token_id=1))

    async def decode(
        self, sequence: worker_pb2.SequenceSpec, ticket: bytes, timeout: float | None, sink: TokenSink
    ) -> worker_pb2.DecodeResponse:
        self.decode_asked.set()
        return worker_pb2.DecodeResponse(finish_reason=inference_pb2.FINISH_REASON_LENGTH)


@pytest.mark.parametrize("late", [False, True])
async def test_decode_blocks_are_asked_for_at_once_or_with_the_last_chunk(late: bool) -> None:
    workers = Workers()
    placement: Any = SimpleNamespace(
        prefill=workers, decode=workers, reservation=Reservation(late), prefill_done=lambda: None
    )
    async with asyncio.timeout(TIME_LIMIT):
        assert await new_serving()._attempt(placement) is FinishReason.LENGTH
    assert workers.asked_for_announcement is late
