"""Which GPU a worker takes, and how much of it, where torch says that there are some."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kvrelay.engine.device import choose_device, default_kv_memory
from kvrelay.settings import EngineSettings

GIB = 1 << 30
CPU = torch.device("cpu")


@dataclass
class Gpus:
    """What torch says of them."""

    count: int
    total: int = 80 * GIB
    free: int = 80 * GIB
    reserved: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: self.count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: self.count)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, self.total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.reserved)
        monkeypatch.setattr(torch, "empty", lambda *sizes, **options: None)


def memory(monkeypatch: pytest.MonkeyPatch, gpus: Gpus, **settings: Any) -> float:
    """In GiB."""
    gpus.install(monkeypatch)
    engine = EngineSettings(**settings)
    return default_kv_memory(engine, choose_device(engine)) / GIB


def test_workers_of_a_host_take_its_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpus(count=2).install(monkeypatch)
    devices = [choose_device(EngineSettings(local_rank=rank, local_size=5)) for rank in range(5)]
    assert [str(device) for device in devices] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]


def test_without_a_gpu_all_take_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpus(count=0).install(monkeypatch)
    assert choose_device(EngineSettings(local_rank=3, local_size=4)) == CPU


def test_a_device_that_is_named_is_taken_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpus(count=2).install(monkeypatch)
    assert choose_device(EngineSettings(device="cuda:0", local_rank=1, local_size=2)) == torch.device("cuda:0")
    assert choose_device(EngineSettings(device="cpu", local_rank=1, local_size=2)) == CPU


def test_a_gpu_of_ones_own_is_filled_but_for_weights_and_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(count=2, free=60 * GIB, reserved=20 * GIB)
    assert memory(monkeypatch, gpus, local_rank=1, local_size=2) == 0.85 * 60


@pytest.mark.parametrize("free", [60, 35])  # before and after the other worker has filled its half
def test_a_shared_gpu_is_shared_evenly_whoever_comes_first(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    gpus = Gpus(count=1, free=free * GIB, reserved=20 * GIB)
    for own in ({}, {"device": "cuda:0"}):
        assert memory(monkeypatch, gpus, local_size=2, **own) == 0.85 * 20


def test_only_workers_of_the_same_gpu_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three workers on two GPUs: the second has one of its own."""
    shares = [memory(monkeypatch, Gpus(count=2), local_rank=rank, local_size=3) for rank in range(3)]
    assert shares == [0.85 * 40, 0.85 * 80, 0.85 * 40]


def test_what_others_have_taken_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory(monkeypatch, Gpus(count=1, free=10 * GIB)) == 0.85 * 10
    assert memory(monkeypatch, Gpus(count=1, reserved=50 * GIB), local_size=2) == 0.0


def test_memory_of_a_cpu_is_fixed() -> None:
    assert default_kv_memory(EngineSettings(local_size=7), CPU) == 512 << 20
