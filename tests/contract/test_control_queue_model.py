"""The queue against a small model in memory, through random histories with wipes and restarts."""

import asyncio
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from redis.asyncio import Redis

from kvrelay.control.connection import connect
from kvrelay.control.private_redis import PrivateRedis
from kvrelay.control.request_queue import Outcome, RequestQueue, Verdict
from kvrelay.errors import ResourceExhausted
from tests.contract.queue_kit import KEY
from tests.exploring import exploring

pytest_plugins = ["tests.contract.redis_kit"]

MAX_RUNNING, MAX_WAITING = 2, 4


class QueueMachine(RuleBasedStateMachine):
    def __init__(self, redis: Redis, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.redis, self.wait_for = redis, loop.run_until_complete
        self.wait_for(redis.flushall())
        self.queue = RequestQueue(redis, KEY, "g", max_running=MAX_RUNNING, max_waiting=MAX_WAITING)
        self.number = 0
        self.running: set[str] = set()
        self.waiting: list[tuple[int, int, str]] = []

    @rule(priority=st.integers(-2, 2))
    def enter(self, priority: int) -> None:
        self.number += 1
        request_id = f"r{self.number}"
        try:
            admission = self.wait_for(self.queue.enter(request_id, "d", priority, None, self.number))
        except ResourceExhausted:
            assert len(self.waiting) == MAX_WAITING
        else:
            if not self.waiting and len(self.running) < MAX_RUNNING:
                assert admission.verdict is Verdict.RUNNING
                self.running.add(request_id)
            else:
                assert admission.verdict is Verdict.WAITING
                self.waiting.append((-priority, self.number, request_id))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome))
    def finish(self, data: st.DataObject, outcome: Outcome) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.running)))
        self.running.discard(request_id)
        self.check_promoted(self.wait_for(self.queue.finish(request_id, outcome)))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(sorted(self.waiting)))
        self.waiting.remove(entry)
        assert self.wait_for(self.queue.finish(entry[2], Outcome.CANCELLED)) == []

    @rule()
    def poll(self) -> None:
        self.check_promoted(self.wait_for(self.queue.poll()))

    @rule()
    def wipe(self) -> None:
        self.wait_for(self.redis.flushall())
        self.poll()

    @rule()
    def restart_gateway(self) -> None:
        self.queue = RequestQueue(self.redis, KEY, "g", max_running=MAX_RUNNING, max_waiting=MAX_WAITING)
        self.running, self.waiting = set(), []
        self.poll()

    def check_promoted(self, promoted: list[str]) -> None:
        expected = []
        while self.waiting and len(self.running) < MAX_RUNNING:
            entry = min(self.waiting)
            self.waiting.remove(entry)
            self.running.add(entry[2])
            expected.append(entry[2])
        assert promoted == expected

    @invariant()
    def counts_agree(self) -> None:
        status = self.wait_for(self.queue.status())
        assert (status.waiting, status.running) == (len(self.waiting), len(self.running))


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.close()


def test_queue_does_as_the_model(shared_server: PrivateRedis, loop: asyncio.AbstractEventLoop) -> None:
    redis = loop.run_until_complete(connect(shared_server.url))
    machine: Any = partial(QueueMachine, redis, loop)
    try:
        run_state_machine_as_test(machine, settings=exploring(max_examples=15, max_acts=30))
    finally:
        loop.run_until_complete(redis.aclose())
