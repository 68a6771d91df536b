"""Which sizes are captured and which are replayed; what CUDA does is in tests/gpu."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvrelay.engine.cuda_graphs import CudaGraphs, bucket_sizes


class FakeGraph:
    """Remembers what was computed while it was captured."""

    capturing: "FakeGraph | None" = None
    replayed: list[int] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.size = 0

    def replay(self) -> None:
        FakeGraph.replayed.append(self.size)


@contextlib.contextmanager
def capture(graph: FakeGraph, pool: Any) -> Iterator[None]:
    assert pool == "the pool", "graphs that share no memory take it many times"
    FakeGraph.capturing = graph
    yield
    FakeGraph.capturing = None


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGraph.replayed = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(CudaGraphs, "_warm_up", staticmethod(lambda compute, size, device: compute(size)))


@pytest.mark.usefixtures("cuda")
def test_the_next_larger_size_is_replayed() -> None:
    warmed_up, captured = [], []

    def compute(size: int) -> None:
        if FakeGraph.capturing is None:
            warmed_up.append(size)
        else:
            FakeGraph.capturing.size = size
            captured.append(size)

    graphs = CudaGraphs(compute, [1, 2, 4, 8], torch.device("cuda"))
    assert captured == warmed_up == [8, 4, 2, 1], "the largest first, each after its kernels were compiled"
    for num_rows in range(1, 9):
        graphs.run(num_rows)
    assert FakeGraph.replayed == [1, 2, 4, 4, 8, 8, 8, 8]


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (20, [1, 2, 4, 8, 16, 20]),
        (256, [1, 2, 4, *range(8, 257, 8)]),
        (300, [1, 2, 4, *range(8, 257, 8), 288, 300]),
    ],
)
def test_buckets_reach_the_largest_batch(largest: int, sizes: list[int]) -> None:
    assert bucket_sizes(largest) == sizes
