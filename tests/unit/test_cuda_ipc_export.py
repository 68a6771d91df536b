"""CUDA IPC without a GPU: who may offer and open a pool. No test here touches a device."""

from typing import Any

import pytest
import torch

from kv_transfer import cuda_ipc
from kv_transfer.cuda_ipc import CudaIpcReceiver, check_export, export_pool
from kv_transfer.senders import Senders
from kvrelay.engine.kv_cache import KvCache
from kvrelay.engine.kv_layout import KvLayout
from kvrelay.errors import FailedPrecondition
from kvrelay.host import host_id
from kvrelay.v1 import kv_pb2

LAYOUT = KvLayout(b"m" * 32, "float32", block_size=16, num_layers=1, num_kv_heads=1, head_dim=8)


def _export(**changes: Any) -> kv_pb2.CudaIpcExport:
    size = 4 * LAYOUT.block_bytes
    fields = {"host_id": host_id(), "device_uuid": "gpu", "handle": b"h" * 64, "offset": 512, "size": size + 512}
    return kv_pb2.CudaIpcExport(**{**fields, "num_blocks": 4, **changes})


@pytest.fixture
def cache() -> Any:
    cache = KvCache(LAYOUT, 4, torch.device("cpu"))
    yield cache
    cache.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"host_id": "elsewhere"}, "another host"),
        ({"handle": b"h" * 63}, "63 bytes"),
        ({"handle": b""}, "0 bytes"),
        ({"num_blocks": 0}, "does not fit"),
        ({"num_blocks": 5}, "does not fit"),
        ({"offset": 513}, "does not fit"),
    ],
)
def test_export_that_cannot_be_opened(changes: Any, words: str) -> None:
    check_export(_export(), LAYOUT.block_bytes)
    with pytest.raises(FailedPrecondition, match=words) as caught:
        check_export(_export(**changes), LAYOUT.block_bytes)
    assert caught.value.reason == "CUDA_IPC_UNAVAILABLE"


def test_a_pool_on_the_cpu_is_neither_exported_nor_filled(cache: KvCache) -> None:
    with pytest.raises(FailedPrecondition, match="not in a GPU's memory"):
        export_pool(cache)
    with pytest.raises(FailedPrecondition, match="not in a GPU's memory"):
        CudaIpcReceiver.open_pool(_export(), cache)
    assert "cuda_ipc" not in Senders(cache).names(b"")


def test_a_gpu_that_is_not_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda_ipc, "_uuid", lambda index: ("GPU-a", "GPU-b")[index])
    assert cuda_ipc._device("GPU-b") == 1
    with pytest.raises(FailedPrecondition, match="not visible"):
        cuda_ipc._device("GPU-c")
