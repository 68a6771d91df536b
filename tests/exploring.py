"""How hypothesis explores: the same examples each time, and no clock, which another load of the machine would stop."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from hypothesis import HealthCheck, settings

__all__ = ["choose", "exploring"]

settings.register_profile(
    "kvrelay", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("kvrelay")


def exploring(max_examples: int, max_acts: int) -> settings:
    """Of a state machine so many lives, each of up to so many acts."""
    return settings(max_examples=max_examples, stateful_step_count=max_acts, suppress_health_check=list(HealthCheck))


def choose(random: Random, choices: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """One of each, without hypothesis."""
    return {name: random.choice(values) for name, values in choices.items()}
