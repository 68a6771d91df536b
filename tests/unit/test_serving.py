"""The two workers' news of one request race; whichever comes first, the request ends as it should."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry import trace

from gateway.completion import Completion
from gateway.detokenizer import CompletionText
from gateway.recovery import Recovery
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


async def follow(prefill_says: asyncio.Event, decode_fails_with: KvrelayError) -> FinishReason:
    """What comes of a request whose decode worker fails before the prefill worker's first token is here."""

    async def responses() -> AsyncIterator[worker_pb2.PrefillResponse]:
        await prefill_says.wait()
        yield worker_pb2.PrefillResponse(first_token=LAST)

    async def decode() -> FinishReason:
        raise decode_fails_with

    text: Any = Silent()
    completion = Completion(CompletionText(text, ()), ResponseLog("request"))
    request = Request("request", (1, 2), Sampling(max_tokens=4))
    dispatch: Any = None
    recovery = Recovery(max_failures=0)
    serving = Serving(
        request, completion, Account(), dispatch, recovery, stoppable=False, deadline=None, span=trace.INVALID_SPAN
    )
    placement: Any = SimpleNamespace(prefill_done=lambda: None)
    decoding = asyncio.create_task(decode())
    await asyncio.wait([decoding])
    async with asyncio.timeout(TIME_LIMIT):
        asyncio.get_running_loop().call_later(0.01, prefill_says.set)
        return await serving._follow(responses(), decoding, placement)


async def test_the_prefill_worker_explains_why_the_handover_ended() -> None:
    ended = FailedPrecondition("nothing is held any more", reason="HANDOVER_ENDED")
    assert await follow(asyncio.Event(), ended) is FinishReason.STOP


async def test_a_lost_decode_worker_ends_the_request_at_once() -> None:
    with pytest.raises(Unavailable):
        await follow(asyncio.Event(), Unavailable("lost", reason="WORKER_LOST"))
