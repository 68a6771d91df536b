"""Rotation and KV write against the reference, in caches where every slot that nobody may write is NaN."""

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch

from kvrelay.engine.batch import Batch
from kvrelay.engine.kernels.gpu.rotary import rotate_and_store, store
from kvrelay.engine.kernels.interface import HeadNorms, Rotation
from kvrelay.engine.kernels.reference import ReferenceKernels
from kvrelay.engine.kv_cache import KvCache
from kvrelay.engine.kv_layout import KvLayout

NUM_BLOCKS, BLOCK_SIZE, NUM_LAYERS = 5, 4, 3
# Triton's interpreter cuts bfloat16 off where a GPU rounds: one unit in the last place.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
# (query heads, KV heads, head dimension)
SHAPES = [(1, 1, 16), (4, 2, 16), (7, 1, 64), (6, 3, 80), (5, 5, 96), (32, 8, 128), (3, 1, 192), (4, 2, 256)]

NewCache = Callable[[int, int, torch.dtype], KvCache]


@pytest.fixture
def new_cache(device: torch.device) -> Iterator[NewCache]:
    caches: list[KvCache] = []

    def new(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> KvCache:
        name = str(dtype).removeprefix("torch.")
        layout = KvLayout(b"", name, BLOCK_SIZE, NUM_LAYERS, num_kv_heads, head_dim)
        caches.append(KvCache(layout, NUM_BLOCKS, device))
        caches[-1].tensor.fill_(float("nan"))
        return caches[-1]

    yield new
    for each in caches:
        each.close()


def make_batch(cache: KvCache, length: int, padding: tuple[int, ...] = ()) -> Batch:
    """Tokens at random slots; those in `padding` have none."""
    generator = torch.Generator().manual_seed(length)
    slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=generator)[:length]
    rows = slots // BLOCK_SIZE * cache.block_stride + slots % BLOCK_SIZE
    rows[list(padding)] = -1
    unused = torch.zeros(0, dtype=torch.int32, device=cache.device)
    return Batch(unused, rows.to(cache.device), unused, unused, unused, length, 1)


def random(*shape: int, like: KvCache, seed: int = 0) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(like.device, like.tensor.dtype)


def make_rotation(length: int, head_dim: int, device: torch.device) -> Rotation:
    angles = torch.linspace(-3, 30, length * head_dim // 2, device=device).view(length, head_dim // 2)
    return Rotation(angles.cos(), angles.sin())


def make_norms(cache: KvCache) -> HeadNorms:
    head_dim = cache.layout.head_dim
    return HeadNorms(random(head_dim, like=cache, seed=1), random(head_dim, like=cache, seed=2), 1e-6)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_norms", [True, False])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), SHAPES)
def test_rotation(
    num_heads: int, num_kv_heads: int, head_dim: int, with_norms: bool, dtype: torch.dtype, new_cache: NewCache
) -> None:
    cache, exact = new_cache(num_kv_heads, head_dim, dtype), new_cache(num_kv_heads, head_dim, torch.float32)
    heads = random(3, num_heads + 2 * num_kv_heads, head_dim, like=cache)
    rotation = make_rotation(3, head_dim, cache.device)
    norms = make_norms(cache) if with_norms else None
    exact_norms = HeadNorms(norms.query.float(), norms.key.float(), norms.epsilon) if norms else None
    batch = make_batch(cache, 3)
    expected = ReferenceKernels().rotate_and_store(heads.float(), rotation, exact_norms, exact, 1, batch)
    assert_near(rotate_and_store(heads, rotation, norms, cache, 1, batch), expected)
    assert_near(cache.tensor, exact.tensor)


def test_padding_leaves_the_cache_alone(new_cache: NewCache) -> None:
    cache, untouched = new_cache(2, 32, torch.float32), new_cache(2, 32, torch.float32)
    batch, others = make_batch(cache, 5, padding=(0, 3, 4)), torch.tensor([1, 2])
    heads = random(5, 8, 32, like=cache)
    rotation = make_rotation(5, 32, cache.device)
    query = rotate_and_store(heads, rotation, None, cache, 2, batch)
    kept = Rotation(rotation.cosines[others], rotation.sines[others])
    alone = dataclasses.replace(batch, rows=batch.rows[others])
    expected = ReferenceKernels().rotate_and_store(heads[others], kept, None, untouched, 2, alone)
    assert_near(query[others], expected)
    assert_near(cache.tensor, untouched.tensor)
    cache.tensor.fill_(float("nan"))
    store(heads[:, :2], heads[:, 2:4], cache, 0, batch)
    assert int(cache.tensor.isfinite().sum()) == 2 * 2 * 2 * 32


def test_no_tokens(new_cache: NewCache) -> None:
    cache = new_cache(2, 16, torch.float32)
    heads = random(0, 8, 16, like=cache)
    query = rotate_and_store(heads, make_rotation(0, 16, cache.device), None, cache, 0, make_batch(cache, 0))
    assert query.shape == (0, 4, 16)
    store(heads[:, :2], heads[:, 2:4], cache, 0, make_batch(cache, 0))
    assert cache.tensor.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(1, 16), (3, 80), (8, 128), (33, 64), (2, 256)])
def test_store(num_kv_heads: int, head_dim: int, dtype: torch.dtype, new_cache: NewCache) -> None:
    """Strided as a fused projection, and as transformers, leave keys and values."""
    cache, expected = new_cache(num_kv_heads, head_dim, dtype), new_cache(num_kv_heads, head_dim, dtype)
    fused = random(4, 3 * num_kv_heads, head_dim, like=cache)
    transposed = random(num_kv_heads, 4, head_dim, like=cache, seed=1).transpose(0, 1)
    turned = random(4, head_dim, num_kv_heads, like=cache, seed=2).transpose(1, 2)
    batch = make_batch(cache, 4)
    for layer, (key, value) in enumerate(
        [(fused[:, num_kv_heads : 2 * num_kv_heads], fused[:, 2 * num_kv_heads :]), (transposed, turned)]
    ):
        store(key, value, cache, layer, batch)
        ReferenceKernels().store(key, value, expected, layer, batch)
    assert torch.equal(cache.tensor.nan_to_num(7.0), expected.tensor.nan_to_num(7.0))
