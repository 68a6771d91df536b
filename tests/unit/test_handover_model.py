"""Random handovers: time passes, leases end, somebody aborts, bytes flip, answers get lost, the prefill worker starts
anew, an old ticket comes again, two decode workers have the same; and everybody gets their own tokens, and all pools
are whole in the end."""

from random import Random

import pytest

from tests.exploring import choose, exploring
from tests.unit.handing_over import HandoverMachine
from tests.unit.handing_over_shared import SharedHandoverMachine
from tests.unit.handover_lives import CHOICES, WAITS, Loss, Side, Spec

TestHandoverMachine = HandoverMachine.TestCase
TestSharedHandoverMachine = SharedHandoverMachine.TestCase
TestHandoverMachine.settings = TestSharedHandoverMachine.settings = exploring(max_examples=40, max_acts=60)


def random_act(machine: HandoverMachine, random: Random) -> None:
    index = random.randrange(20)
    match random.choices(
        ["submit", "decode", "prefill steps", "decode steps", "announce", "fetch", "release", "present", "disturb"],
        [3, 4, 4, 3, 8, 8, 5, 2, 1],
    )[0]:
        case "submit":
            machine.submit(Spec(**choose(random, CHOICES)))
        case "decode":
            machine.submit_decode(index, random.randrange(2))
        case "prefill steps":
            machine.step_prefill(random.randint(1, 3))
        case "decode steps":
            machine.step_decode(random.randint(1, 3))
        case "announce":
            machine.announce(index, random.randint(1, 8), random.random() < 0.5)
        case "fetch":
            machine.fetch(index, random.random() < 0.1, index)
        case "release":
            machine.release(index, random.choice([Loss.NONE] * 6 + [Loss.REQUEST, Loss.ANSWER]))
        case "present":
            machine.present(index)
            machine.forge(index, random.randrange(1 << 14))
        case _:
            disturb(machine, random, index)


def disturb(machine: HandoverMachine, random: Random, index: int) -> None:
    match random.choice(["wait", "wait", "abort", "break", "lapse", "restart"]):
        case "wait":
            machine.wait(random.choice(WAITS), random.random() < 0.5)
        case "abort":
            machine.abort(index, random.choice(list(Side)))
        case "break":
            machine.break_off(index)
        case "lapse":
            machine.lapse()
        case _:
            machine.restart()


def long_life(seed: int, kind: type[HandoverMachine]) -> HandoverMachine:
    random, machine = Random(seed), kind()
    machine.begin(random.randint(8, 14), random.randint(8, 20), random.randint(1, 12), seed % 2 == 0)
    for _ in range(600):
        random_act(machine, random)
        machine.check()
    machine.teardown()
    return machine


@pytest.mark.parametrize("kind", [HandoverMachine, SharedHandoverMachine])
@pytest.mark.parametrize("first", range(0, 60, 10))
def test_long_lives(first: int, kind: type[HandoverMachine]) -> None:
    """The same acts at random, which reaches fuller workers; and it is seen that all that matters did happen."""
    machines = [long_life(seed, kind) for seed in range(first, first + 10)]
    assert sum(machine.num_adopted for machine in machines) > 50
    num_borrowed = sum(machine.num_borrowed for machine in machines)
    assert num_borrowed > 50 if kind is SharedHandoverMachine else num_borrowed == 0
    assert sum(machine.num_recomputed for machine in machines) > 20
    assert sum(machine.num_refused for machine in machines) > 20
    assert sum(machine.num_taken_from_another for machine in machines) > 10
