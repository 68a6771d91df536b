"""The two workers' news of one request race; whichever comes first, the request ends as it should."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway.disaggregation import Disaggregation
from gateway.prefilling import Prefilling
from gateway.reservation import Reservation
from kvrelay.errors import AlreadyExists, FailedPrecondition, Internal, Unavailable
from kvrelay.request import FinishReason
from kvrelay.v1 import inference_pb2, worker_pb2
from tests.patience import SOON
from tests.unit.serving_kit import Act, DecodeCall, DecodeWorker, PrefillWorker, Run, lost, token_at

LOCAL_PROMPT = worker_pb2.LocalPrompt(cached_tokens=2, prefill_queue=0.25, prefill=0.5)


async def test_the_prefill_worker_explains_why_the_handover_ended() -> None:
    prefill = PrefillWorker()
    prefill.reason = inference_pb2.FINISH_REASON_STOP

    async def finds_nothing(call: DecodeCall) -> worker_pb2.DecodeResponse:
        asyncio.get_running_loop().call_later(0.01, prefill.prompt_done.set)
        raise FailedPrecondition("nothing is held any more", reason="HANDOVER_ENDED")

    async with asyncio.timeout(SOON):
        assert await Run([prefill, DecodeWorker("d1", finds_nothing)]).to_the_end() is FinishReason.STOP


async def test_a_lost_decode_worker_ends_the_request_at_once_where_nothing_else_can_be_done() -> None:
    async def dies(call: DecodeCall) -> worker_pb2.DecodeResponse:
        raise lost("d1")

    with pytest.raises(Unavailable):
        async with asyncio.timeout(SOON):
            await Run([PrefillWorker(), DecodeWorker("d1", dies)], max_failures=0).to_the_end()


async def test_a_prefill_worker_that_ends_without_a_token_is_a_defect_and_not_waited_for() -> None:
    async def ends_after_the_ticket() -> AsyncIterator[worker_pb2.PrefillResponse]:
        return
        yield

    async with (
        asyncio.timeout(SOON),
        Prefilling(b"", ends_after_the_ticket(), Reservation(late=False)) as prefilling,
    ):
        with pytest.raises(Internal):
            await prefilling.first_token


@pytest.mark.parametrize("late", [False, True])
async def test_decode_blocks_are_asked_for_at_once_or_with_the_last_chunk(late: bool) -> None:
    prefill, asked = PrefillWorker(), asyncio.Event()

    async def decode(call: DecodeCall) -> worker_pb2.DecodeResponse:
        asked.set()
        assert prefill.nearly_done.is_set() is late
        prefill.prompt_done.set()
        return await call.finish()

    worker = DecodeWorker("d1", decode)
    worker.blocks_free = 1 if late else 100
    async with asyncio.timeout(SOON):
        running = asyncio.create_task(Run([prefill, worker]).to_the_end())
        if late:
            for _ in range(20):
                await asyncio.sleep(0)
            assert not asked.is_set(), "it was asked before the last chunk"
            prefill.nearly_done.set()
        assert await running is FinishReason.LENGTH


def local(*acts: Act, stop: tuple[str, ...] = ()) -> Run:
    return Run([DecodeWorker("d1", *acts)], stop=stop, mode=Disaggregation.NEVER)


def check_accounted(run: Run) -> None:
    assert run.account.num_cached_tokens == LOCAL_PROMPT.cached_tokens
    timings = run.account.timings
    assert (timings.prefill_queue, timings.prefill) == (LOCAL_PROMPT.prefill_queue, LOCAL_PROMPT.prefill)
    assert timings.time_to_first_token > 0


def tell_first(call: DecodeCall) -> None:
    tokens = worker_pb2.SequenceTokens(first_index=0, token_ids=[token_at(0)], local_prompt=LOCAL_PROMPT)
    call.sink.take(tokens)


async def test_a_local_prompt_is_accounted_for_when_a_stop_string_ends_it() -> None:
    async def decode(call: DecodeCall) -> worker_pb2.DecodeResponse:
        tell_first(call)
        await asyncio.Event().wait()
        raise AssertionError

    run = local(decode, stop=(f".{token_at(0)}.",))
    async with asyncio.timeout(SOON):
        assert await run.to_the_end() is FinishReason.STOP
    check_accounted(run)


async def test_a_local_prompt_is_accounted_for_when_it_is_aborted() -> None:
    told = asyncio.Event()

    async def decode(call: DecodeCall) -> worker_pb2.DecodeResponse:
        tell_first(call)
        told.set()
        await asyncio.Event().wait()
        raise AssertionError

    run = local(decode)
    running = asyncio.create_task(run.to_the_end())
    async with asyncio.timeout(SOON):
        await told.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    check_accounted(run)


async def test_what_makes_up_for_a_lost_worker_is_not_accounted_for() -> None:
    async def dies(call: DecodeCall) -> worker_pb2.DecodeResponse:
        tell_first(call)
        raise lost("d1")

    async def goes_on(call: DecodeCall) -> worker_pb2.DecodeResponse:
        again = worker_pb2.LocalPrompt(cached_tokens=3, prefill=9)
        call.sink.take(worker_pb2.SequenceTokens(first_index=1, token_ids=[token_at(1)], local_prompt=again))
        return await call.finish()

    run = local(dies, goes_on)
    async with asyncio.timeout(SOON):
        assert await run.to_the_end() is FinishReason.LENGTH
    check_accounted(run)


async def test_a_worker_that_has_a_former_call_of_this_id_still_is_asked_under_another() -> None:
    """It may not have noticed yet that it lost the gateway which the client had asked before."""

    async def has_it(call: DecodeCall) -> worker_pb2.DecodeResponse:
        metadata = {"stage": "decode", "worker": "d1"}
        raise AlreadyExists("on this worker already", reason="ALREADY_ON_WORKER", metadata=metadata)

    worker = DecodeWorker("d1", has_it, DecodeCall.finish)
    prefill = PrefillWorker()
    prefill.prompt_done.set()
    async with asyncio.timeout(SOON):
        assert await Run([prefill, worker], max_failures=0).to_the_end() is FinishReason.LENGTH
    assert len({call.sequence.request_id for call in worker.calls}) == 2
