"""When requests are sent."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from numpy.random import Generator

    from kvrelay.bench.workload import Job

__all__ = ["Arrivals", "ClosedLoop", "RandomArrivals", "TraceArrivals"]


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """Streams that each send their next request when the last one has ended: the cluster sets the pace."""

    concurrency: int

    def __str__(self) -> str:
        return f"closed loop, {self.concurrency} concurrent"


@dataclass(frozen=True, slots=True)
class RandomArrivals:
    """Independent gaps of mean 1 / rate, whatever the cluster does.

    Attributes:
        rate: requests per second.
        burstiness: shape of the gaps' gamma distribution. 1 makes them exponential, a Poisson process; less comes in
            bursts, more comes evenly.
    """

    rate: float
    burstiness: float = 1.0

    def schedule(self, jobs: "Iterable[Job]", random: "Generator") -> "Iterator[tuple[float, Job]]":
        """Pairs of seconds after the start and job."""
        moment = 0.0
        for job in jobs:
            moment += random.gamma(self.burstiness, 1 / (self.rate * self.burstiness))
            yield moment, job

    def __str__(self) -> str:
        kind = "Poisson" if self.burstiness == 1 else f"gamma (burstiness {self.burstiness:g})"
        return f"{kind}, {self.rate:g} requests/s"


@dataclass(frozen=True, slots=True)
class TraceArrivals:
    """The trace's own timestamps, `speed` times as fast."""

    speed: float = 1.0

    def schedule(self, jobs: "Iterable[Job]", random: "Generator") -> "Iterator[tuple[float, Job]]":
        """As `RandomArrivals.schedule`; nothing is random here."""
        for job in jobs:
            yield (job.timestamp or 0.0) / self.speed, job

    def __str__(self) -> str:
        return f"the trace's timestamps, {self.speed:g} times as fast"


Arrivals: TypeAlias = ClosedLoop | RandomArrivals | TraceArrivals
