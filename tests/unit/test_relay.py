"""The two workers' news of one request race; whichever comes first, the request ends as it should."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.relay import _Run
from gateway.requests import CancelHandle
from gateway.response_log import ResponseLog
from kvrelay.errors import FailedPrecondition, KvrelayError, Unavailable
from kvrelay.request import FinishReason, SamplingParams
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

    relay: Any = SimpleNamespace(tokenizer=SimpleNamespace(detokenizer=Silent))
    call: Any = SimpleNamespace(sampling=SamplingParams())
    placement: Any = SimpleNamespace(prefill_done=lambda: None)
    run = _Run(relay, call, ResponseLog("request"), CancelHandle(), None)
    decoding = asyncio.create_task(decode())
    await asyncio.wait([decoding])
    async with asyncio.timeout(TIME_LIMIT):
        asyncio.get_running_loop().call_later(0.01, prefill_says.set)
        return cast(FinishReason, await run._follow(responses(), decoding, placement))


async def test_the_prefill_worker_explains_why_the_handover_ended() -> None:
    ended = FailedPrecondition("nothing is held any more", reason="HANDOVER_ENDED")
    assert await follow(asyncio.Event(), ended) is FinishReason.STOP


async def test_a_lost_decode_worker_ends_the_request_at_once() -> None:
    with pytest.raises(Unavailable):
        await follow(asyncio.Event(), Unavailable("lost", reason="WORKER_LOST"))
