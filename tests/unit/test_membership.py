from dataclasses import replace

import pytest

from kvrelay.control.membership import Membership
from kvrelay.control.registry import GatewayRecord, Lease, ModelInfo, WorkerLoad, WorkerRecord
from kvrelay.request import WorkerRole, WorkerState

MODEL = ModelInfo("demo", "LlamaForCausalLM", 2048, 4096, 16, "cd")
WORKER = WorkerRecord("w", WorkerRole.DECODE, "127.0.0.1:1", pid=1, model=MODEL, epoch=10)
LOAD = WorkerLoad(WorkerState.READY, 0, 0, 8, 8, 0)
GATEWAY = GatewayRecord("g", "127.0.0.1:2", pid=2, epoch=10)


@pytest.fixture
def members() -> Membership:
    return Membership(lease_seconds=3.0)


def lease(beat: int, epoch: int = 10) -> Lease:
    return Lease(replace(WORKER, epoch=epoch), beat, LOAD)


def test_silence_of_a_lease_drops(members: Membership) -> None:
    members.renew(lease(1), 100.0)
    members.renew(Lease(GATEWAY, 1), 101.0)
    members.expire(102.9, readable_since=0.0)
    assert members.workers().keys() == {"w"}
    members.expire(103.0, readable_since=0.0)
    assert members.workers() == {}
    assert members.gateways() == {"g": GATEWAY}


def test_silence_while_redis_was_away_does_not_count(members: Membership) -> None:
    members.renew(lease(1), 100.0)
    members.expire(200.0, readable_since=200.0)
    members.expire(202.9, readable_since=200.0)
    assert members.workers().keys() == {"w"}
    members.expire(203.0, readable_since=200.0)
    assert members.workers() == {}


def test_only_a_new_beat_renews(members: Membership) -> None:
    members.renew(lease(2), 100.0)
    for old in (lease(2), lease(1), lease(9, epoch=9)):
        members.renew(old, 101.0)
        assert members.workers()["w"].seen_at == 100.0
    members.renew(lease(3), 101.0)
    assert members.workers()["w"].seen_at == 101.0
    members.renew(lease(1, epoch=11), 102.0)
    assert members.workers()["w"].record.epoch == 11


def test_a_replay_after_the_farewell_or_the_end_revives_nobody(members: Membership) -> None:
    members.renew(lease(1), 100.0)
    members.renew(replace(lease(2), withdrawn=True), 100.1)
    members.renew(lease(1), 100.2)
    assert members.workers() == {}
    members.renew(lease(3), 100.3)
    members.expire(200.0, readable_since=0.0)
    members.renew(lease(3), 200.0)
    assert members.workers() == {}
