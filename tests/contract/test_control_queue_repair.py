"""The request queue when something is wrong: Redis, a gateway, or what stands in the records."""

import asyncio
import logging
import os
import signal
from typing import Any

import pytest
from redis.asyncio import Redis

from kvrelay.control.connection import connect
from kvrelay.control.private_redis import PrivateRedis
from kvrelay.control.request_queue import Outcome, RequestQueue, Verdict
from kvrelay.errors import AlreadyExists, ResourceExhausted, Unavailable
from tests.contract.queue_kit import RUNNING, WAITING, counts, enter, fill, new_queue, poll_until
from tests.patience import until

pytest_plugins = ["tests.contract.redis_kit", "tests.contract.queue_kit"]


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


@pytest.mark.parametrize("outcome", [Outcome.COMPLETED, Outcome.CANCELLED])
async def test_what_a_former_start_has_finished_may_run_again(
    queue: RequestQueue, redis: Redis, outcome: Outcome
) -> None:
    """Its responses died with it, and perhaps nobody has seen them."""
    await enter(queue, "a", "body")
    await queue.finish("a", outcome)
    restarted = new_queue(redis)
    with pytest.raises(AlreadyExists):
        await enter(restarted, "a", "other body")
    assert await enter(restarted, "a", "body") == RUNNING


async def test_what_a_dead_gateway_has_finished_may_run_again(redis: Redis) -> None:
    dead, queue = new_queue(redis, "dead"), new_queue(redis, lease=0.4)
    await enter(dead, "a")
    await dead.finish("a", Outcome.COMPLETED)
    assert (await enter(queue, "a")).verdict is Verdict.EXISTING
    await until_gone(queue, redis, "dead")
    assert await enter(queue, "a") == RUNNING


async def until_gone(queue: RequestQueue, redis: Redis, gateway_id: str) -> None:
    """Until the queue has taken notice that a gateway is silent."""

    async def is_gone() -> bool:
        await queue.poll()
        return await redis.zscore("kvrelay:queue:gateways", gateway_id) is None

    await until(is_gone, what=f"{gateway_id} is gone")


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
