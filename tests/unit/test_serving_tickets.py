"""One ticket and several decode workers: who is lost before the KV cache has moved costs no second prefill."""

import asyncio

import pytest

from kvrelay.errors import FailedPrecondition, KvrelayError, Unavailable
from kvrelay.request import FinishReason
from kvrelay.telemetry import Attribute, EventName
from kvrelay.v1 import worker_pb2
from tests.patience import SOON
from tests.unit.serving_kit import MAX_TOKENS, Act, DecodeCall, DecodeWorker, PrefillWorker, Run, lost, token_at

TOKENS = [token_at(position) for position in range(MAX_TOKENS)]


def fails_with(error: KvrelayError) -> Act:
    async def act(call: DecodeCall) -> worker_pb2.DecodeResponse:
        raise error

    return act


def dies_after(num_tokens: int) -> Act:
    """The worker d1 is lost once so many tokens are known: the prefill worker's, and its own."""

    async def act(call: DecodeCall) -> worker_pb2.DecodeResponse:
        call.tell(1, num_tokens)
        await call.sink.wait_for(num_tokens)
        raise lost("d1")

    return act


async def finish(run: Run) -> None:
    async with asyncio.timeout(SOON):
        assert await run.to_the_end() is FinishReason.LENGTH
    assert run.token_ids == TOKENS


@pytest.mark.parametrize("reason", ["WORKER_LOST", "WORKER_DRAINING", "STALE_EPOCH", "NO_FRAME_STREAM"])
async def test_another_decode_worker_gets_the_ticket_and_prefill_goes_on(reason: str) -> None:
    prefill = PrefillWorker()

    async def takes_over(call: DecodeCall) -> worker_pb2.DecodeResponse:
        assert not prefill.prompt_done.is_set()
        prefill.prompt_done.set()
        return await call.finish()

    first = DecodeWorker("d1", fails_with(lost("d1", reason)))
    second = DecodeWorker("d2", takes_over)
    run = Run([prefill, first, second])
    await finish(run)
    assert len(prefill.sequences) == 1
    (former,), (latter,) = first.calls, second.calls
    assert former.ticket == latter.ticket == b"ticket-1"
    assert former.sequence.request_id == "request"
    assert latter.sequence.request_id == "request#2"
    latter.sequence.request_id = former.sequence.request_id
    assert latter.sequence == former.sequence
    assert run.span.events == [
        (EventName.RECOVERED, {Attribute.WORKER_ID: "d1", Attribute.ERROR_REASON: reason}),
    ]


async def test_a_first_token_that_was_told_is_not_in_what_the_next_worker_is_sent() -> None:
    """Its blocks are not in the ticket; the token itself comes with them."""
    prefill = PrefillWorker()

    async def dies_after_the_first_token(call: DecodeCall) -> worker_pb2.DecodeResponse:
        prefill.prompt_done.set()
        await call.sink.wait_for(1)
        raise lost("d1")

    second = DecodeWorker("d2")
    await finish(Run([prefill, DecodeWorker("d1", dies_after_the_first_token), second]))
    assert len(prefill.sequences) == 1
    assert second.calls[0].ticket == b"ticket-1"
    assert list(second.calls[0].sequence.completion_token_ids) == []
    assert second.calls[0].sequence.sampling.max_tokens == MAX_TOKENS


async def test_a_later_attempt_has_its_own_tokens_in_its_ticket() -> None:
    prefill = PrefillWorker()
    prefill.prompt_done.set()
    second = DecodeWorker("d2", fails_with(lost("d2")))
    third = DecodeWorker("d3")
    await finish(Run([prefill, DecodeWorker("d1", dies_after(3)), second, third]))
    assert [list(sequence.completion_token_ids) for sequence in prefill.sequences] == [[], TOKENS[:3]]
    for worker in (second, third):
        assert worker.calls[0].ticket == b"ticket-2"
        assert list(worker.calls[0].sequence.completion_token_ids) == TOKENS[:3]


async def test_after_the_release_it_is_prefilled_again() -> None:
    prefill = PrefillWorker()
    prefill.prompt_done.set()

    async def dies_after_the_release(call: DecodeCall) -> worker_pb2.DecodeResponse:
        await call.sink.wait_for(1)
        prefill.released.set()
        for _ in range(10):
            await asyncio.sleep(0)
        raise lost("d1")

    second = DecodeWorker("d2")
    await finish(Run([prefill, DecodeWorker("d1", dies_after_the_release), second]))
    assert [list(sequence.completion_token_ids) for sequence in prefill.sequences] == [[], TOKENS[:1]]
    assert second.calls[0].ticket == b"ticket-2"


async def test_tokens_beyond_the_first_say_that_the_cache_has_moved() -> None:
    """The news of the Release, which comes by another way, may come later."""
    prefill = PrefillWorker()
    prefill.prompt_done.set()
    second = DecodeWorker("d2")
    await finish(Run([prefill, DecodeWorker("d1", dies_after(2)), second]))
    assert len(prefill.sequences) == 2
    assert second.calls[0].ticket == b"ticket-2"


async def test_a_cache_that_did_not_come_over_is_computed_again() -> None:
    prefill = PrefillWorker()
    prefill.prompt_done.set()
    failed = FailedPrecondition("no", reason="TRANSFER_FAILED", metadata={"stage": "decode", "worker": "d1"})
    second = DecodeWorker("d2")
    await finish(Run([prefill, DecodeWorker("d1", fails_with(failed)), second]))
    assert len(prefill.sequences) == 2
    assert second.calls[0].ticket == b"ticket-2"


async def test_without_another_decode_worker_it_begins_again_and_the_failure_counts_once() -> None:
    prefill = PrefillWorker()
    prefill.prompt_done.set()
    alone = DecodeWorker("d1", fails_with(lost("d1")), DecodeCall.finish)
    run = Run([prefill, alone], max_failures=1)
    await finish(run)
    assert [call.ticket for call in alone.calls] == [b"ticket-1", b"ticket-2"]
    assert len(run.span.events) == 1


async def test_too_many_lost_decode_workers_end_the_request_and_each_counts_once() -> None:
    prefill = PrefillWorker()
    workers = [DecodeWorker(f"d{index}", fails_with(lost(f"d{index}"))) for index in range(5)]
    run = Run([prefill, *workers], max_failures=2)
    with pytest.raises(Unavailable) as caught:
        async with asyncio.timeout(SOON):
            await run.to_the_end()
    assert caught.value.metadata == {"stage": "decode", "worker": "d2", "cause": "WORKER_LOST", "failures": "3"}
    assert [len(worker.calls) for worker in workers] == [1, 1, 1, 0, 0]
    assert len(prefill.sequences) == 1


async def test_what_came_too_early_from_the_lost_worker_is_forgotten() -> None:
    """It may be another's computation, and tokens of two computations are not mixed."""
    prefill = PrefillWorker()

    async def dies_early(call: DecodeCall) -> worker_pb2.DecodeResponse:
        call.sink.take(worker_pb2.SequenceTokens(first_index=2, token_ids=[99, 99]))
        raise lost("d1")

    async def takes_over(call: DecodeCall) -> worker_pb2.DecodeResponse:
        prefill.prompt_done.set()
        await call.sink.wait_for(1)
        call.tell(1, 2)
        return await call.finish()

    await finish(Run([prefill, DecodeWorker("d1", dies_early), DecodeWorker("d2", takes_over)]))


async def test_a_decode_worker_that_computes_the_prompt_again_may_be_faster_than_the_prefill_worker() -> None:
    prefill = PrefillWorker()

    async def recomputes(call: DecodeCall) -> worker_pb2.DecodeResponse:
        call.tell(0, 3)
        prefill.prompt_done.set()
        for _ in range(10):
            await asyncio.sleep(0)
        return await call.finish()

    await finish(Run([prefill, DecodeWorker("d1", recomputes)]))


async def test_a_ticket_that_a_decode_worker_did_without_is_given_back_while_it_decodes() -> None:
    """It has computed the prompt again; what the prefill worker holds for it would be held to its last token."""
    prefill = PrefillWorker()
    prefill.prompt_done.set()

    async def recomputes(call: DecodeCall) -> worker_pb2.DecodeResponse:
        call.tell(1, 2)
        await prefill.ended.wait()
        return await call.finish()

    await finish(Run([prefill, DecodeWorker("d1", recomputes)]))


async def test_a_ticket_is_not_given_back_before_that() -> None:
    prefill = PrefillWorker()
    prefill.prompt_done.set()

    async def waits(call: DecodeCall) -> worker_pb2.DecodeResponse:
        await call.sink.wait_for(1)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not prefill.ended.is_set()
        return await call.finish()

    await finish(Run([prefill, DecodeWorker("d1", waits)]))
