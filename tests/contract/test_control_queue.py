"""The request queue over real servers: bounds, order and identity."""

import asyncio
import hashlib
import time

import pytest
from redis.asyncio import Redis

from kvrelay.control.connection import connect
from kvrelay.control.private_redis import PrivateRedis
from kvrelay.control.request_queue import (
    Admission,
    ExistingRequest,
    Outcome,
    RequestQueue,
    RequestState,
    Verdict,
)
from kvrelay.errors import AlreadyExists, ResourceExhausted
from kvrelay.request import QueueStatus
from tests.contract.queue_kit import KEY, RUNNING, WAITING, counts, enter, fill, new_queue

pytest_plugins = ["tests.contract.redis_kit", "tests.contract.queue_kit"]


async def test_runs_then_waits_then_refuses(queue: RequestQueue) -> None:
    assert await fill(queue, "abcde") == [Verdict.RUNNING] * 2 + [Verdict.WAITING] * 3
    assert await queue.status() == QueueStatus(waiting=3, running=2, capacity=5)
    with pytest.raises(ResourceExhausted) as raised:
        await enter(queue, "f")
    assert raised.value.reason == "QUEUE_FULL"
    assert raised.value.retry_after == 1.0
    assert await counts(queue) == (3, 2)
    assert await queue.finish("a", Outcome.COMPLETED) == ["c"]
    assert await enter(queue, "f") == WAITING


async def test_retry_after_follows_the_finishes(redis: Redis) -> None:
    queue = new_queue(redis, running=1, waiting=0)
    for number in range(40):
        assert await enter(queue, str(number)) == RUNNING
        await queue.finish(str(number), Outcome.COMPLETED)
    assert await redis.llen("kvrelay:queue:finishes") == 32
    assert await enter(queue, "last") == RUNNING
    with pytest.raises(ResourceExhausted) as raised:
        await enter(queue, "too many")
    assert raised.value.retry_after == 0.1


async def test_order_is_priority_deadline_arrival(redis: Redis) -> None:
    queue = new_queue(redis, running=1, waiting=10)
    now = time.time()
    await enter(queue, "running")
    arrivals = [
        ("late", 0, None),
        ("later", 0, None),
        ("due", 0, now + 60),
        ("sooner", 0, now + 30),
        ("low", -5, now + 1),
    ]
    for request_id, priority, deadline in [*arrivals, ("high", 7, None)]:
        assert await enter(queue, request_id, priority=priority, deadline=deadline) == WAITING
    order = []
    last = "running"
    while promoted := await queue.finish(last, Outcome.COMPLETED):
        (last,) = promoted
        order.append(last)
    assert order == ["high", "sooner", "due", "late", "later", "low"]
    assert await counts(queue) == (0, 0)


async def test_nobody_overtakes_those_who_wait(redis: Redis) -> None:
    first, second = new_queue(redis, running=1), new_queue(redis, "g2", running=2)
    await second.poll()
    await fill(first, ["a", "b"])
    assert await enter(second, "c") == WAITING  # although a slot is free by the second gateway's bound
    assert await second.finish("c", Outcome.CANCELLED) == []
    assert await first.poll() == ["b"]


async def test_leaving_while_waiting_promotes_nobody(queue: RequestQueue) -> None:
    await fill(queue, "abcd")
    assert await queue.finish("c", Outcome.CANCELLED) == []
    assert await counts(queue) == (1, 2)
    assert await queue.finish("a", Outcome.COMPLETED) == ["d"]
    assert await queue.finish("c", Outcome.CANCELLED) == []
    assert await queue.finish("never seen", Outcome.CANCELLED) == []
    assert await counts(queue) == (0, 2)


async def test_one_id_one_body(redis: Redis, queue: RequestQueue) -> None:
    other = new_queue(redis, "g2")
    await enter(queue, "a", "body")
    for gateway in (queue, other):
        with pytest.raises(AlreadyExists):
            await enter(gateway, "a", "other body")
        admission = await enter(gateway, "a", "body")
        assert admission == Admission(Verdict.EXISTING, ExistingRequest(RequestState.RUNNING, "g1"))
    await queue.finish("a", Outcome.COMPLETED)
    for gateway in (queue, other):
        with pytest.raises(AlreadyExists):
            await enter(gateway, "a", "other body")
        finished = ExistingRequest(RequestState.FINISHED, "g1", Outcome.COMPLETED)
        assert await enter(gateway, "a", "body") == Admission(Verdict.EXISTING, finished)
    assert await counts(queue) == (0, 0)


async def test_waiting_request_exists_too(redis: Redis, queue: RequestQueue) -> None:
    await fill(queue, "abc")
    waiting = Admission(Verdict.EXISTING, ExistingRequest(RequestState.WAITING, "g1"))
    assert await enter(queue, "c") == waiting
    assert await enter(new_queue(redis, "g2"), "c") == waiting


async def test_what_never_ran_or_failed_may_enter_again(queue: RequestQueue) -> None:
    await fill(queue, "abc")
    await queue.finish("c", Outcome.CANCELLED)
    assert await enter(queue, "c") == WAITING
    await queue.finish("a", Outcome.FAILED)
    with pytest.raises(AlreadyExists):
        await enter(queue, "a", "other body")
    assert await enter(queue, "a") == WAITING
    assert await queue.finish("b", Outcome.CANCELLED) == ["a"]
    assert (await enter(queue, "b")).verdict is Verdict.EXISTING


async def test_finished_record_is_remembered_for_its_time(redis: Redis) -> None:
    queue = RequestQueue(redis, KEY, "g1", max_running=1, max_waiting=0, replay_seconds=100)
    await enter(queue, "a")
    assert 3500 < await redis.ttl("kvrelay:request:a") <= 3600
    await queue.finish("a", Outcome.COMPLETED)
    assert 95 < await redis.ttl("kvrelay:request:a") <= 100


async def test_equal_entries_at_once_run_once(queue: RequestQueue) -> None:
    verdicts = [admission.verdict for admission in await asyncio.gather(*(enter(queue, "a") for _ in range(20)))]
    assert verdicts.count(Verdict.RUNNING) == 1
    assert verdicts.count(Verdict.EXISTING) == 19


async def test_many_entries_over_two_connections_keep_the_bounds(shared_server: PrivateRedis, redis: Redis) -> None:
    other_client = await connect(shared_server.url)
    queues = [new_queue(redis, "g1", 10, 50), new_queue(other_client, "g2", 10, 50)]
    highest = 0

    async def one(number: int) -> str:
        nonlocal highest
        try:
            admission = await enter(queues[number % 2], f"r{number}")
        except ResourceExhausted:
            return "refused"
        highest = max(highest, (await queues[number % 2].status()).running)
        return admission.verdict.name

    answers = await asyncio.gather(*(one(number) for number in range(200)))
    assert {name: answers.count(name) for name in set(answers)} == {"RUNNING": 10, "WAITING": 50, "refused": 140}
    assert highest == 10

    running = [f"r{number}" for number, answer in enumerate(answers) if answer == "RUNNING"]
    num_finished = 0
    while running:
        finishes = [queues[int(request_id[1:]) % 2].finish(request_id, Outcome.COMPLETED) for request_id in running]
        num_finished += len(finishes)
        running = [request_id for promoted in await asyncio.gather(*finishes) for request_id in promoted]
        running += [request_id for queue in queues for request_id in await queue.poll()]
        assert (await queues[0].status()).running <= 10
    assert num_finished == 60
    assert await counts(queues[0]) == (0, 0)
    await other_client.aclose()


async def test_another_gateways_promotion_is_learnt_by_poll_once(redis: Redis, queue: RequestQueue) -> None:
    other = new_queue(redis, "g2")
    await fill(other, "ab")
    await fill(queue, "c")
    assert await other.finish("a", Outcome.COMPLETED) == []
    assert await queue.poll() == ["c"]
    assert await queue.poll() == []
    assert await counts(queue) == (0, 2)


async def test_promotion_that_overtakes_the_entrys_reply(redis: Redis, queue: RequestQueue) -> None:
    """The entry's own answer tells it, and nothing else does."""
    await fill(queue, "ab")
    replied, released = asyncio.Event(), asyncio.Event()
    script = queue._enter

    async def slow(*arguments: str | int) -> object:
        reply = await script(*arguments)
        replied.set()
        await released.wait()
        return reply

    queue._enter = slow  # type: ignore[assignment]
    entering = asyncio.create_task(enter(queue, "c"))
    await replied.wait()
    assert await queue.finish("a", Outcome.COMPLETED) == []
    assert await queue.poll() == []
    released.set()
    assert await entering == RUNNING


async def test_redis_sees_ids_and_digests_alone(queue: RequestQueue, redis: Redis) -> None:
    await fill(queue, "abc")
    assert all(str(key).startswith("kvrelay:") for key in await redis.keys("*"))
    record = await redis.hgetall("kvrelay:request:c")
    assert record.keys() == {"state", "digest", "gateway", "rank", "since", "outcome", "start"}


async def test_who_reads_redis_cannot_try_out_bodies(redis: Redis) -> None:
    body_digest = hashlib.sha256(b"a body that is easily guessed").hexdigest()
    digests = []
    for index, key in enumerate((KEY, KEY, b"another key" * 3)):
        queue = new_queue(redis, f"g{index}", running=9, key=key)
        await enter(queue, f"r{index}", body_digest)
        digest = await redis.hget(f"kvrelay:request:r{index}", "digest")
        assert digest is not None
        assert len(digest) == len(body_digest)
        digests.append(digest)
    assert digests[0] == digests[1]
    assert len({body_digest, *digests}) == 3
