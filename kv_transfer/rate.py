"""How fast a link is: measured when the pair meets, refined by what really travels."""

import math
import time
from collections.abc import Awaitable, Callable

from kv_transfer.transport import BlockReceiver, TransferFailed

__all__ = ["LinkRate", "measure_bandwidth", "measure_latency"]

PROBE_BYTES = 4 << 20
NUM_PROBES = 2  # the first also pays for connections and for memory that nobody has touched
NUM_ROUND_TRIPS = 3
# What travels in less says more about the latency.
MIN_BYTES = 256 << 10
WEIGHT = 0.2


class LinkRate:
    """Bandwidth and latency of one link.

    Attributes:
        bandwidth: bytes per second.
        latency: seconds of a round trip, the least that was seen at pairing.
    """

    def __init__(self, bandwidth: float, latency: float) -> None:
        self.bandwidth = bandwidth
        self.latency = latency

    def add(self, num_bytes: int, seconds: float) -> None:
        """Takes notice of a pull that spent `seconds` receiving `num_bytes`; older pulls weigh exponentially less."""
        if num_bytes >= MIN_BYTES and seconds > 0:
            self.bandwidth += WEIGHT * (num_bytes / seconds - self.bandwidth)


async def measure_latency(ping: Callable[[], Awaitable[object]], clock: Callable[[], float] = time.monotonic) -> float:
    """Seconds of the shortest of a few round trips."""
    least = math.inf
    for _ in range(NUM_ROUND_TRIPS):
        started = clock()
        await ping()
        least = min(least, clock() - started)
    return least


async def measure_bandwidth(receiver: BlockReceiver, clock: Callable[[], float] = time.monotonic) -> float:
    """Bytes per second of the best of a few probes.

    Raises:
        TransferFailed, KvrelayError: the way does not work.
    """
    best = 0.0
    for _ in range(NUM_PROBES):
        started = clock()
        num_bytes = await receiver.probe(PROBE_BYTES)
        if num_bytes <= 0:
            raise TransferFailed("a probe brought nothing", reason="SHORT_READ")
        best = max(best, num_bytes / max(clock() - started, 1e-9))
    return best
