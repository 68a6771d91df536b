"""A decode worker is lost before the KV cache has moved: another gets the ticket, and no prompt is computed twice."""

import itertools
from random import Random

import pytest

from kvrelay.client import GenerateOptions
from tests.checkpoints import VOCAB_SIZE
from tests.faults.conftest import Stage
from tests.faults.history import Outcome, faults_of
from tests.faults.rig import WORKERS, Rig

PREFILL, VICTIM = WORKERS[:2], "decode-0"
COUNT_PROMPTS = "prefill.admitted=delay:0"  # each time the worker's log says so
NUM_PROMPT_TOKENS = 200
NUM_TRIES = 20  # the router may prefer the other one
ids = itertools.count()


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize("point", ["decode.received", "transfer.received", "transfer.before_release"])
async def test_a_prompt_is_computed_once(stage: Stage, point: str) -> None:
    """The last of these is after the client had its first token."""
    rig = stage.rig
    random = Random(point)
    options: GenerateOptions = {
        "token_ids": [random.randrange(3, VOCAB_SIZE) for _ in range(NUM_PROMPT_TOKENS)],
        "max_tokens": 24,
        "temperature": 0.8,
        "seed": 7,
        "ignore_eos": True,
    }
    await rig.wait_ready(*WORKERS)
    expected = await rig.client.complete(**options, cache_salt="reference")
    num_struck = rig.processes[VICTIM].num_fired()
    for _ in range(NUM_TRIES):
        rig.processes[VICTIM].arm(f"{point}=kill")
        for name in PREFILL:
            rig.processes[name].arm(COUNT_PROMPTS)
        before = num_prompts(rig)
        outcome = Outcome(f"same-ticket-{next(ids)}")
        async for chunk in rig.client.generate(**options, request_id=outcome.request_id, cache_salt=outcome.request_id):
            outcome.chunks.append(chunk)
        num_computed = num_prompts(rig) - before
        rig.heal()
        assert not faults_of(outcome, expected, frozenset())
        if rig.processes[VICTIM].num_fired() > num_struck:
            break
    assert rig.processes[VICTIM].num_fired() == num_struck + 1
    assert num_computed == 1, rig.logs()
    await rig.wait_ready(*WORKERS)
    await rig.wait_whole()


def num_prompts(rig: Rig) -> int:
    """Prompts that were admitted by prefill workers so far."""
    return sum(rig.processes[name].log.read_text().count("failpoint prefill.admitted") for name in PREFILL)
