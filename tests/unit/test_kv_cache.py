import os
from collections.abc import Iterator

import pytest
import torch

from kvrelay.engine import kv_cache
from kvrelay.engine.kv_cache import HEADER_BYTES, KvCache, num_blocks_for
from kvrelay.engine.kv_layout import KvLayout
from kvrelay.engine.pool_header import PoolHeader
from kvrelay.errors import ConfigurationError
from kvrelay.settings import EngineSettings

LAYOUT = KvLayout(b"\7" * 32, "float32", block_size=4, num_layers=2, num_kv_heads=2, head_dim=8)
CPU = torch.device("cpu")


@pytest.fixture
def cache() -> Iterator[KvCache]:
    pool = KvCache(LAYOUT, 10, CPU)
    yield pool
    pool.close()


def block(value: int) -> bytes:
    return bytes([value]) * LAYOUT.block_bytes


def test_blocks_come_back_in_the_order_asked_for(cache: KvCache) -> None:
    cache.write_blocks([7, 2, 3], block(1) + block(2) + block(3))
    assert bytes(cache.read_blocks([3, 7, 0, 2])) == block(3) + block(1) + block(0) + block(2)
    assert bytes(cache.read_blocks([])) == b""


def test_a_wrong_length_writes_nothing(cache: KvCache) -> None:
    for data in (block(1)[:-1], block(1) * 3, b""):
        with pytest.raises(ValueError, match="reshape"):
            cache.write_blocks([1, 2], data)
    assert not cache.tensor.any()


def test_what_is_read_is_a_copy(cache: KvCache) -> None:
    data = cache.read_blocks([1])
    cache.write_blocks([1], block(9))
    assert bytes(data) == block(0)


def test_a_view_is_the_memory_itself(cache: KvCache) -> None:
    cache.block_view(4, 2)[:] = block(5) + block(6)
    assert bytes(cache.read_blocks([4, 5])) == block(5) + block(6)
    cache.tensor[4] = 0
    assert bytes(cache.block_view(4, 1)) == block(0)


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (9, 2), (10, 1), (0, -1)])
def test_a_view_stays_inside_the_pool(cache: KvCache, first: int, count: int) -> None:
    with pytest.raises(ValueError, match="no blocks"):
        cache.block_view(first, count)


def test_another_reader_of_the_file_sees_header_and_blocks(cache: KvCache) -> None:
    assert cache.fd is not None
    cache.write_header(epoch=2**63 + 5)
    cache.write_blocks([3], block(8))
    header = PoolHeader.unpack(os.pread(cache.fd, HEADER_BYTES, 0))
    assert header == PoolHeader(cache.nonce, 2**63 + 5, LAYOUT.digest, 10, LAYOUT.block_bytes)
    assert os.pread(cache.fd, LAYOUT.block_bytes, HEADER_BYTES + 3 * LAYOUT.block_bytes) == block(8)
    assert os.fstat(cache.fd).st_size == cache.size


def test_a_header_of_something_else_is_refused() -> None:
    good = PoolHeader(b"n" * 16, 1, LAYOUT.digest, 10, 64).pack()
    for page in (b"", good[:20], b"x" + good[1:], good[:8] + b"\xff" + good[9:]):
        with pytest.raises(ValueError, match="header"):
            PoolHeader.unpack(page)


def test_pools_have_nonces_of_their_own(cache: KvCache) -> None:
    other = KvCache(LAYOUT, 1, CPU)
    other.close()
    assert other.nonce != cache.nonce
    assert len(other.nonce) == 16


def test_closing_leaves_tensors_valid(cache: KvCache) -> None:
    tensor = cache.tensor
    fd = cache.fd
    assert fd is not None
    cache.close()
    cache.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    tensor.fill_(1)
    assert tensor.sum() == tensor.numel()


def test_all_memory_is_resident_from_the_start() -> None:
    before = shared_memory_bytes()
    pool = KvCache(LAYOUT, (32 << 20) // LAYOUT.block_bytes, CPU)
    after = shared_memory_bytes()
    pool.tensor.fill_(1)
    assert after - before >= 31 << 20
    assert shared_memory_bytes() - after < 1 << 20
    pool.close()


def shared_memory_bytes() -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssShmem"))
    return int(line.split()[1]) << 10


def test_number_of_blocks() -> None:
    assert num_blocks_for(EngineSettings(num_blocks=17, kv_cache_memory=1 << 30), LAYOUT, CPU) == 17
    assert num_blocks_for(EngineSettings(kv_cache_memory=10 * LAYOUT.block_bytes + 1), LAYOUT, CPU) == 10
    assert num_blocks_for(EngineSettings(), LAYOUT, CPU) == (512 << 20) // LAYOUT.block_bytes
    with pytest.raises(ConfigurationError, match="kv_cache_memory"):
        num_blocks_for(EngineSettings(kv_cache_memory=1), LAYOUT, CPU)


def test_a_pool_larger_than_the_memory_is_refused_before_it_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_available_memory", lambda: 9 * LAYOUT.block_bytes)
    with pytest.raises(ConfigurationError, match="kv_cache_memory"):
        KvCache(LAYOUT, 10, CPU)
    KvCache(LAYOUT, 9, CPU).close()


def test_available_memory_is_plausible() -> None:
    assert 1 << 20 < kv_cache._available_memory() < 1 << 50
