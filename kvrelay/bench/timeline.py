"""How a load went over time."""

from dataclasses import dataclass

import numpy as np

from kvrelay.bench.measure import Floats, Run

__all__ = ["Timeline", "timeline"]

NUM_BINS = 60
NUM_MOMENTS = 240


@dataclass(frozen=True, slots=True)
class Timeline:
    """Attributes:
    edges: seconds after the start, one more than there are bins.
    tokens_per_second: output tokens in each bin.
    moments: seconds after the start.
    running: requests that were sent and had not ended at each moment.
    """

    edges: Floats
    tokens_per_second: Floats
    moments: Floats
    running: Floats


def timeline(run: Run) -> Timeline:
    """From the start to the last response."""
    ends = np.array([run.window if record.ended is None else record.ended for record in run.records])
    starts = np.array([record.sent for record in run.records])
    horizon = max(run.window, float(ends.max(initial=0.0)), 1e-6)
    times = np.concatenate([np.empty(0), *(record.response_times for record in run.records)])
    tokens = np.concatenate([np.empty(0), *(record.response_tokens for record in run.records)])
    edges = np.linspace(0.0, horizon, NUM_BINS + 1)
    counts, _ = np.histogram(times, edges, weights=tokens)
    moments = np.linspace(0.0, horizon, NUM_MOMENTS)
    running = np.searchsorted(np.sort(starts), moments, "right") - np.searchsorted(np.sort(ends), moments, "right")
    return Timeline(edges, counts / np.diff(edges), moments, running.astype(np.float64))
