"""Small plots as inline SVG. Colours come from the page's CSS by class, so that they follow its scheme.

A plot is a `Frame` with two axes and marks drawn on it: `bars`, `curve`, `area`, `verticals`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Axis", "Frame", "linear_axis", "log_axis", "stacked_bar"]

WIDTH, HEIGHT = 560, 280
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 42, 42
NUM_TICKS = 5


@dataclass(frozen=True, slots=True)
class Axis:
    """From values to a share of the axis's length.

    Attributes:
        ticks: values that get a label.
    """

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    is_log: bool = False

    def share(self, value: float) -> float:
        """0 at the low end, 1 at the high end; what lies outside is moved to the nearer end."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)


def linear_axis(label: str, high: float, *, exact: bool = False) -> Axis:
    """From 0. Unless it is to end exactly, it is extended to a whole step of 1, 2 or 5 times a power of ten."""
    step = _nice_step(high / NUM_TICKS)
    num_steps = math.floor(high / step * (1 + 1e-9)) if exact else math.ceil(high / step * (1 - 1e-9))
    ticks = [index * step for index in range(num_steps + 1)]
    return Axis(label, 0.0, high if exact else ticks[-1], ticks)


def log_axis(label: str, low: float, high: float) -> Axis:
    """Extended to 1, 2 or 5 times a power of ten; both ends must be above 0."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    steps = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    first = max(index for index, step in enumerate(steps) if step <= low * (1 + 1e-9))
    last = min(index for index, step in enumerate(steps) if step >= high * (1 - 1e-9))
    ticks = steps[first : max(last, first + 1) + 1]
    # Over many decades only the powers of ten have room.
    shown = ticks if len(ticks) <= 9 else [tick for tick in ticks if round(math.log10(tick), 6).is_integer()]
    return Axis(label, ticks[0], ticks[-1], shown, is_log=True)


def _nice_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough * (1 - 1e-9))


class Frame:
    """A plot being drawn.

    Args:
        title: what a screen reader says.
    """

    def __init__(self, title: str, x: Axis, y: Axis) -> None:
        self._title = title
        self._x = x
        self._y = y
        self._marks: list[str] = []

    def bars(self, edges: Sequence[float], heights: Sequence[float], texts: Iterable[str]) -> None:
        """A histogram: one edge more than heights. The texts appear under the pointer."""
        for left, right, height, text in zip(edges[:-1], edges[1:], heights, texts, strict=True):
            if height > 0:
                x, y = self._left(left), self._top(height)
                width, depth = max(self._left(right) - x - 0.7, 0.7), self._top(self._y.low) - y
                box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{depth:.1f}"'
                self._marks.append(f'<rect class="bar" {box}><title>{escape(text)}</title></rect>')

    def curve(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        """A line through points."""
        self._marks.append(f'<path class="curve" d="M{self._points(xs, ys)}"/>')

    def area(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        """A line through points, and what lies below it."""
        base = self._top(self._y.low)
        start, end = f"{self._left(xs[0]):.1f},{base:.1f}", f"{self._left(xs[-1]):.1f},{base:.1f}"
        self._marks.append(f'<path class="area" d="M{start} L{self._points(xs, ys)} L{end} Z"/>')
        self.curve(xs, ys)

    def verticals(self, values: Iterable[tuple[str, float]]) -> None:
        """Dashed lines from left to right, with their names above; one that would cover the last is set higher."""
        taken, row = -math.inf, 0
        for name, value in values:
            x, width = self._left(value), 7 * len(name)
            start = min(x - width / 2, WIDTH - width)
            row = row + 1 if start < taken + 4 else 0
            taken = start + width
            self._marks.append(f'<path class="limit" d="M{x:.1f},{TOP - 2} V{HEIGHT - BOTTOM}"/>')
            place = f'x="{start:.1f}" y="{TOP - 6 - 12 * row}"'
            self._marks.append(f'<text class="name" {place}>{escape(name)}</text>')

    def svg(self) -> str:
        """The whole plot."""
        opening = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self._title)}">'
        return "".join([opening, *self._grid(), *self._marks, "</svg>"])

    def _grid(self) -> Iterable[str]:
        bottom = HEIGHT - BOTTOM
        for tick in self._y.ticks:
            y = self._top(tick)
            yield f'<path class="grid" d="M{LEFT},{y:.1f} H{WIDTH - RIGHT}"/>'
            yield f'<text class="tick" text-anchor="end" x="{LEFT - 7}" y="{y + 4:.1f}">{_number(tick)}</text>'
        for tick in self._x.ticks:
            x = self._left(tick)
            yield f'<path class="grid" d="M{x:.1f},{bottom} v4"/>'
            yield f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{bottom + 17}">{_number(tick)}</text>'
        middle, height = (LEFT + WIDTH - RIGHT) / 2, (TOP + bottom) / 2
        yield f'<text class="axis" text-anchor="middle" x="{middle}" y="{HEIGHT - 6}">{escape(self._x.label)}</text>'
        turned = f'transform="translate(13 {height}) rotate(-90)"'
        yield f'<text class="axis" text-anchor="middle" {turned}>{escape(self._y.label)}</text>'

    def _left(self, value: float) -> float:
        return LEFT + self._x.share(value) * (WIDTH - LEFT - RIGHT)

    def _top(self, value: float) -> float:
        return HEIGHT - BOTTOM - self._y.share(value) * (HEIGHT - BOTTOM - TOP)

    def _points(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        return " L".join(f"{self._left(x):.1f},{self._top(y):.1f}" for x, y in zip(xs, ys, strict=True))


def stacked_bar(title: str, shares: Sequence[tuple[str, float]]) -> str:
    """One bar of parts, of classes part-0, part-1 and so on. The shares sum up to 1."""
    marks, x = [], 0.0
    for index, (name, share) in enumerate(shares):
        width = share * 1000
        box = f'x="{x:.1f}" y="0" width="{max(width - 2, 0):.1f}" height="22"'
        marks.append(f'<rect class="part-{index}" {box}><title>{escape(name)} {share:.1%}</title></rect>')
        x += width
    opening = f'<svg class="stack" viewBox="0 0 1000 22" preserveAspectRatio="none" role="img" aria-label="{title}">'
    return "".join([opening, *marks, "</svg>"])


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
