"""A progress bar on stderr."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvrelay.bench.load import Outcome, Record

__all__ = ["Progress", "progress_bar"]


class Progress:
    """Counts requests that have ended, or seconds where time is the limit."""

    def __init__(self, bar: Any, duration: float | None) -> None:
        self._bar = bar
        self._duration = duration
        self._num_tokens = 0
        self._num_failed = 0

    def request_ended(self, record: Record) -> None:
        self._num_tokens += record.num_received
        self._num_failed += record.outcome is Outcome.FAILED
        now = record.ended or 0.0
        failed = f", {self._num_failed} failed" if self._num_failed else ""
        self._bar.set_postfix_str(f"{self._num_tokens / max(now, 1e-9):,.0f} tokens/s{failed}", refresh=False)
        self._bar.update(1 if self._duration is None else min(now, self._duration) - self._bar.n)


@contextmanager
def progress_bar(shown: bool, num_requests: int | None, duration: float | None) -> Iterator[Progress]:
    """Draws nothing unless shown. The number of requests may be unknown."""
    from tqdm import tqdm  # type: ignore[import-untyped]  # it ships none

    by_time = duration is not None
    form = "{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}<{remaining}, {postfix}]"
    with tqdm(
        desc="kvrelay bench",
        total=duration if by_time else num_requests,
        unit="s" if by_time else "requests",
        bar_format=form if by_time or num_requests else None,
        disable=not shown,
        leave=False,
        dynamic_ncols=True,
    ) as bar:
        yield Progress(bar, duration)
