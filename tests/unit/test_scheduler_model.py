"""Random lives of many sequences: the invariants hold after each act, and in the end everybody got their own tokens."""

from random import Random

import pytest

from tests.exploring import choose, exploring
from tests.unit.scheduler_lives import CHOICES, NOT_FINISHED, Disturbance, Spec
from tests.unit.scheduler_machine import SchedulerMachine

TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = exploring(max_examples=30, max_acts=40)


@pytest.mark.parametrize("overlap", [False, True], ids=["alone", "overlap"])
@pytest.mark.parametrize("seed", range(50))
def test_long_lives(seed: int, overlap: bool) -> None:
    """The same acts and invariants at random, which reaches fuller schedulers than the search for small examples."""
    random, machine = Random(seed), SchedulerMachine()
    machine.begin(random.randint(8, 20), random.randint(1, 6), random.randint(1, 20), seed % 4 > 0, overlap)
    for _ in range(150):
        index = random.randrange(10)
        match random.choice(["add", "step", "step", "step", "end_transfer", "release", "disturb"]):
            case "add" if len(machine.live(*NOT_FINISHED)) < 10:
                machine.add([Spec(**choose(random, CHOICES)) for _ in range(random.randint(1, 4))])
            case "end_transfer":
                machine.end_transfer(index, random.randint(0, 30), random.random() < 0.4, random.choice([0, 0, 1]))
            case "release" if random.random() < 0.5:
                machine.release(index)
            case "disturb" if random.random() < 0.2:
                machine.disturb(index, random.choice(list(Disturbance)))
            case _:
                machine.step(random.choice([0, 0, 1, 2]), random.randint(1, 4))
        machine.check()
    machine.teardown()
