"""How hypothesis explores a state machine: the same acts each time, and no clock."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from hypothesis import HealthCheck, settings

__all__ = ["choose", "exploring"]


def exploring(max_examples: int, max_acts: int) -> settings:
    """So many lives, each of up to so many acts."""
    return settings(
        max_examples=max_examples,
        stateful_step_count=max_acts,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def choose(random: Random, choices: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """One of each, without hypothesis."""
    return {name: random.choice(values) for name, values in choices.items()}
