"""Distributions of prompt and output lengths, in tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvrelay.errors import ConfigurationError

if TYPE_CHECKING:
    from numpy.random import Generator

__all__ = ["FORMS", "LengthDistribution"]

FORMS = "fixed:N, lognormal:MEAN,SIGMA, exponential:MEAN or uniform:A,B, and after it ,min=N and ,max=N"
MAX_LENGTH = 1_000_000


@dataclass(frozen=True, slots=True)
class _Kind:
    parameters: tuple[str, ...]
    draw: "Callable[..., float]"


def _lognormal(random: "Generator", mean: float, sigma: float) -> float:
    # The mean of a lognormal is exp(mu + sigma^2 / 2).
    return random.lognormal(math.log(mean) - sigma * sigma / 2, sigma)


_KINDS = {
    "fixed": _Kind(("N",), lambda random, length: length),
    "lognormal": _Kind(("MEAN", "SIGMA"), _lognormal),
    "exponential": _Kind(("MEAN",), lambda random, mean: random.exponential(mean)),
    "uniform": _Kind(("A", "B"), lambda random, low, high: random.integers(int(low), int(high), endpoint=True)),
}


@dataclass(frozen=True, slots=True)
class LengthDistribution:
    """A random number of tokens, rounded to a whole one and clipped to minimum and maximum.

    Attributes:
        text: as the user wrote it. MEAN is the mean before clipping; SIGMA is the deviation of the logarithm.
    """

    text: str
    kind: str
    parameters: tuple[float, ...]
    minimum: int = 1
    maximum: int = MAX_LENGTH

    @classmethod
    def parse(cls, flag: str, text: str) -> "LengthDistribution":
        """Reads one of `FORMS`; a plain number is a fixed length.

        Raises:
            ConfigurationError: naming the flag, the text and what is valid.
        """
        try:
            return _parse(text)
        except ValueError as error:
            raise ConfigurationError(f"{flag}: {text!r}: {error}; valid are {FORMS}") from None

    def __str__(self) -> str:
        return self.text

    def draw(self, random: "Generator") -> int:
        value = _KINDS[self.kind].draw(random, *self.parameters)
        return round(min(max(value, self.minimum), self.maximum))


def _parse(text: str) -> LengthDistribution:
    kind, colon, rest = text.partition(":")
    if not colon:
        kind, rest = "fixed", text
    if kind not in _KINDS:
        raise ValueError(f"{kind!r} is no distribution")
    fields = rest.split(",")
    bounds = dict(_bound(field) for field in fields if "=" in field)
    values = tuple(_value(field) for field in fields if "=" not in field)
    names = _KINDS[kind].parameters
    if len(values) != len(names):
        raise ValueError(f"{kind} takes {','.join(names)}")
    _check(kind, values)
    distribution = LengthDistribution(text, kind, values, **bounds)
    if distribution.minimum > distribution.maximum:
        raise ValueError("min is above max")
    return distribution


def _bound(field: str) -> tuple[str, int]:
    name, _, number = field.partition("=")
    if name not in ("min", "max"):
        raise ValueError(f"{name!r} is neither min nor max")
    return f"{name}imum", int(_whole(_value(number)))


def _check(kind: str, values: tuple[float, ...]) -> None:
    if kind in ("fixed", "uniform"):
        for value in values:
            _whole(value)
    elif not 1 <= values[0] <= MAX_LENGTH:
        raise ValueError(f"a mean is from 1 to {MAX_LENGTH:,}")
    if kind == "uniform" and values[0] > values[1]:
        raise ValueError("A is above B")
    if kind == "lognormal" and not 0 <= values[1] <= 10:
        raise ValueError("SIGMA is from 0 to 10")


def _whole(value: float) -> float:
    if not (value.is_integer() and 1 <= value <= MAX_LENGTH):
        raise ValueError(f"{value:g} is not a whole number from 1 to {MAX_LENGTH:,}")
    return value


def _value(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
