"""CUDA graphs of one function of a batch size: captured once for some sizes, replayed for all."""

import bisect
import gc
import logging
import time
from collections.abc import Callable, Sequence

import torch

__all__ = ["CudaGraphs", "bucket_sizes"]

log = logging.getLogger(__name__)

_NUM_WARM_UPS = (
    2  # The first call compiles kernels and allocates workspaces; the second does nothing for the first time.
)


def bucket_sizes(largest: int) -> list[int]:
    """The batch sizes that are captured: dense where a step is short, and up to `largest`."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(288, largest + 1, 32)]
    return sorted({*(size for size in sizes if size < largest), largest})


class CudaGraphs:
    """Runs a step as a graph: one launch in place of hundreds.

    All graphs share one memory pool. The largest is captured first, so that the others find their memory in its.
    """

    def __init__(self, compute: Callable[[int], None], sizes: Sequence[int], device: torch.device) -> None:
        """Captures.

        Args:
            compute: computes a batch of so many rows, from buffers to buffers that stay where they are.
            sizes: ascending.

        Raises:
            RuntimeError: the function cannot be captured.
        """
        self._sizes = list(sizes)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        started = time.monotonic()
        pool = torch.cuda.graph_pool_handle()
        gc.collect()  # Memory that is freed during a capture ends it.
        for size in reversed(self._sizes):
            self._warm_up(compute, size, device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                compute(size)
            self._graphs[size] = graph
        torch.cuda.synchronize(device)
        log.info("captured %d CUDA graphs in %.1f s", len(self._graphs), time.monotonic() - started)

    def run(self, num_rows: int) -> None:
        """Launches the step for `num_rows` or some more."""
        self._graphs[self._sizes[bisect.bisect_left(self._sizes, num_rows)]].replay()

    @staticmethod
    def _warm_up(compute: Callable[[int], None], size: int, device: torch.device) -> None:
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_NUM_WARM_UPS):
                compute(size)
        torch.cuda.current_stream(device).wait_stream(stream)
