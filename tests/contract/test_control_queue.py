"""The request queue over real servers: bounds, order, identity, and repair."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Iterable
from typing import Any

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
from kvrelay.errors import AlreadyExists, ResourceExhausted, Unavailable
from kvrelay.request import QueueStatus

pytest_plugins = ["redis_kit"]

RUNNING, WAITING = Admission(Verdict.RUNNING), Admission(Verdict.WAITING)


def new_queue(
    redis: Redis, gateway_id: str = "g1", running: int = 2, waiting: int = 3, lease: float = 30.0
) -> RequestQueue:
    return RequestQueue(redis, gateway_id, max_running=running, max_waiting=waiting, lease_seconds=lease)


@pytest.fixture
def queue(redis: Redis) -> RequestQueue:
    return new_queue(redis)


async def enter(
    queue: RequestQueue, request_id: str, digest: str = "d", priority: int = 0, deadline: float | None = None
) -> Admission:
    return await queue.enter(request_id, digest, priority, deadline, time.time())


async def fill(queue: RequestQueue, request_ids: Iterable[str]) -> list[Verdict]:
    return [(await enter(queue, request_id)).verdict for request_id in request_ids]


async def counts(queue: RequestQueue) -> tuple[int, int]:
    status = await queue.status()
    return status.waiting, status.running


async def poll_until(queue: RequestQueue, expected: tuple[int, int]) -> list[str]:
    """Polls as a gateway does until (waiting, running) are as expected; what was promoted on the way."""
    promoted: list[str] = []
    async with asyncio.timeout(6):
        while True:
            promoted += await queue.poll()
            if await counts(queue) == expected:
                return promoted
            await asyncio.sleep(0.02)


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
    queue = RequestQueue(redis, "g1", max_running=1, max_waiting=0, replay_seconds=100)
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


async def test_wiped_redis_is_told_again(queue: RequestQueue, redis: Redis) -> None:
    await fill(queue, "abcde")
    await redis.flushall()
    assert await queue.poll() == []
    assert await counts(queue) == (3, 2)
    with pytest.raises(ResourceExhausted):
        await enter(queue, "f")
    await redis.flushall()
    assert await queue.finish("a", Outcome.COMPLETED) == []
    promoted = await queue.poll()
    assert promoted == ["c"]
    assert await counts(queue) == (2, 2)
    assert (await enter(queue, "a")).verdict is Verdict.EXISTING
    assert await queue.finish("c", Outcome.COMPLETED) == ["d"]


async def test_entry_after_a_wipe_does_not_pass_the_bound(queue: RequestQueue, redis: Redis) -> None:
    await fill(queue, "ab")
    await redis.flushall()
    assert await enter(queue, "c") == WAITING
    assert await counts(queue) == (1, 2)


async def test_large_restoration_comes_in_parts(redis: Redis) -> None:
    queue = new_queue(redis, running=300, waiting=700)
    await asyncio.gather(*(enter(queue, f"r{number}") for number in range(1000)))
    assert await counts(queue) == (700, 300)
    await redis.flushall()
    await queue.poll()
    assert await counts(queue) == (700, 300)


async def test_dead_gateways_requests_are_dropped(redis: Redis) -> None:
    dead, queue = new_queue(redis, "dead"), new_queue(redis, lease=0.4)
    await fill(dead, "abc")
    assert await fill(queue, "d") == [Verdict.WAITING]
    assert await poll_until(queue, (0, 1)) == ["d"]
    assert await redis.keys("*:dead") == []
    assert await enter(queue, "a") == RUNNING
    # It was only slow: what it holds comes back.
    await dead.finish("c", Outcome.CANCELLED)
    await dead.poll()
    assert (await counts(queue))[1] == 3


async def test_restarted_gateway_inherits_nothing(queue: RequestQueue, redis: Redis) -> None:
    await fill(queue, "abcde")
    restarted = new_queue(redis)
    assert await fill(restarted, "ab") == [Verdict.RUNNING] * 2
    assert await counts(restarted) == (0, 2)


async def test_entry_whose_reply_was_lost_can_be_repeated(
    queue: RequestQueue, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvrelay.control.request_queue._GRACE_SECONDS", 0.2)
    script = queue._enter

    async def lossy(*arguments: str | int) -> object:
        await script(*arguments)
        raise Unavailable("lost")

    queue._enter = lossy  # type: ignore[assignment]
    for request_id in "ab":
        with pytest.raises(Unavailable):
            await enter(queue, request_id)
    queue._enter = script
    assert await enter(queue, "a") == RUNNING
    assert await counts(queue) == (0, 2)
    await poll_until(queue, (0, 1))  # b was nobody's
    assert await enter(queue, "b") == RUNNING


async def test_cancelled_entry_leaves_nothing_for_long(queue: RequestQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvrelay.control.request_queue._GRACE_SECONDS", 0.1)
    await queue.poll()
    for num_iterations in range(0, 20):
        task = asyncio.create_task(enter(queue, f"r{num_iterations}"))
        for _ in range(num_iterations):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if not task.cancelled():
            await queue.finish(f"r{num_iterations}", Outcome.CANCELLED)
    await poll_until(queue, (0, 0))


QUEUE_KEYS = {"waiting": "zset", "running": "zset", "gateways": "zset", "finishes": "list", "owned:g1": "set"}


@pytest.mark.parametrize("key", QUEUE_KEYS)
@pytest.mark.parametrize("wrong", ["string", "hash"])
async def test_wrong_type_is_put_aside_and_the_queue_repairs_itself(
    queue: RequestQueue, redis: Redis, key: str, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    await fill(queue, "abcd")
    name = f"kvrelay:queue:{key}"
    await redis.delete(name)
    if wrong == "string":
        await redis.set(name, "text")
    else:
        await redis.hset(name, "field", "value")
    await queue.poll()
    await queue.poll()
    assert await counts(queue) == (2, 2)
    assert await redis.type(f"kvrelay:quarantine:{name}") == wrong
    assert caplog.text.count("put aside") == 1
    assert await queue.finish("a", Outcome.COMPLETED) == ["c"]
    assert await redis.type(name) in (QUEUE_KEYS[key], "none")


RECORDS: dict[str, dict[Any, Any] | None] = {
    "string": None,
    "no fields": {"foo": "bar"},
    "bad state": {"state": "flying", "digest": "d", "gateway": "g", "rank": "r", "since": "1", "outcome": ""},
    "bad time": {"state": "running", "digest": "d", "gateway": "g", "rank": "r", "since": "x", "outcome": ""},
    "bad outcome": {"state": "finished", "digest": "d", "gateway": "g", "rank": "r", "since": "1", "outcome": "won"},
}


@pytest.mark.parametrize("fields", RECORDS.values(), ids=RECORDS.keys())
async def test_malformed_record_is_put_aside(queue: RequestQueue, redis: Redis, fields: dict[Any, Any] | None) -> None:
    async def damage(request_id: str) -> None:
        await redis.delete(f"kvrelay:request:{request_id}")
        if fields is None:
            await redis.set(f"kvrelay:request:{request_id}", "text")
        else:
            await redis.hset(f"kvrelay:request:{request_id}", mapping=fields)

    await damage("a")
    assert await enter(queue, "a") == RUNNING
    assert await redis.exists("kvrelay:quarantine:kvrelay:request:a")
    await fill(queue, "bcd")
    await damage("a")
    await damage("c")
    await queue.poll()
    assert await counts(queue) == (2, 2)
    await damage("c")
    assert await queue.finish("a", Outcome.COMPLETED) == ["d"]
    await queue.poll()
    assert await counts(queue) == (1, 2)


async def test_garbage_in_the_indexes_takes_no_slot_for_long(queue: RequestQueue, redis: Redis) -> None:
    await fill(queue, "ab")
    await redis.zadd("kvrelay:queue:running", {f"ghost{number}": number for number in range(40)})
    await redis.zadd("kvrelay:queue:waiting", {f"ghost/{number}": number for number in range(40)})
    await redis.zadd("kvrelay:queue:waiting", {b"\xff": 0, b"": 0})
    await redis.zadd("kvrelay:queue:gateways", {b"\xff": 0, b"": 1})
    await redis.sadd("kvrelay:queue:owned:g1", "ghost", "")
    await poll_until(queue, (0, 2))
    assert await enter(queue, "c") == WAITING


async def test_frozen_redis_refuses_and_recovers(own_server: PrivateRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvrelay.control.request_queue._GRACE_SECONDS", 0.3)
    client = await connect(own_server.url)
    queue = new_queue(client)
    await fill(queue, "abc")
    assert own_server.pid is not None
    os.kill(own_server.pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(20):  # one after the other they would take twice as long
            outcomes = await asyncio.gather(
                *(enter(queue, f"r{number}") for number in range(40)),
                *(queue.poll(), queue.finish("a", Outcome.COMPLETED), queue.status()),
                return_exceptions=True,
            )
        assert {type(outcome) for outcome in outcomes} == {Unavailable}
    finally:
        os.kill(own_server.pid, signal.SIGCONT)
    assert await poll_until(queue, (0, 2)) == ["c"]
    await client.aclose()


async def test_killed_and_replaced_redis_is_filled_again(own_server: PrivateRedis) -> None:
    client = await connect(own_server.url)
    queue = new_queue(client)
    await fill(queue, "abc")
    assert own_server.pid is not None
    os.kill(own_server.pid, signal.SIGKILL)
    own_server.stop()
    with pytest.raises(Unavailable):
        await queue.finish("a", Outcome.COMPLETED)
    own_server.start()
    assert await queue.poll() == ["c"]
    assert await counts(queue) == (0, 2)
    await client.aclose()


async def test_full_redis_is_unavailable(own_server: PrivateRedis) -> None:
    client = await connect(own_server.url)
    queue = new_queue(client)
    await fill(queue, "abc")
    await client.config_set("maxmemory", "1")
    with pytest.raises(Unavailable):
        await enter(queue, "d")
    await client.config_set("maxmemory", "0")
    await queue.poll()
    assert await counts(queue) == (1, 2)
    await client.aclose()


async def test_redis_sees_ids_and_digests_alone(queue: RequestQueue, redis: Redis) -> None:
    await fill(queue, "abc")
    assert all(str(key).startswith("kvrelay:") for key in await redis.keys("*"))
    record = await redis.hgetall("kvrelay:request:c")
    assert record.keys() == {"state", "digest", "gateway", "rank", "since", "outcome"}
