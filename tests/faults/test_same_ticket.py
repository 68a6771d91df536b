"""A decode worker is lost before the KV cache has moved: another gets the ticket, and no prompt is computed twice."""

from random import Random

import pytest

from kvrelay.client import GenerateOptions
from tests.checkpoints import VOCAB_SIZE
from tests.faults.history import Outcome, violations_of
from tests.faults.rig import PREFILL, SETTINGS, WORKERS, Rig

VICTIM = "decode-0"
COUNT_PROMPTS = "prefill.admitted=delay:0"  # each time the worker's log says so
NUM_PROMPT_TOKENS = 200
NUM_TRIES = 20  # the router may prefer the other one


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("point", ["decode.received", "transfer.received", "transfer.before_release"])
async def test_a_killed_decode_worker_costs_no_second_prefill(rig: Rig, point: str) -> None:
    """The last of these is after the client had its first token."""
    await check_computed_once(rig, f"{point}=kill")


@pytest.mark.asyncio(loop_scope="module")
async def test_a_frozen_decode_worker_costs_none_and_releases_nothing_when_it_thaws(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on with the Release, in a former epoch, for what another has long since; the lease has waited."""
    monkeypatch.setattr(rig.processes[VICTIM], "away_seconds", 2 * SETTINGS["lease_seconds"])
    await check_computed_once(rig, "transfer.before_release=stop")


async def check_computed_once(rig: Rig, failpoint: str) -> None:
    """A request meets the failpoint, and brings what it brings without one."""
    random = Random(failpoint)
    options: GenerateOptions = {
        "token_ids": [random.randrange(3, VOCAB_SIZE) for _ in range(NUM_PROMPT_TOKENS)],
        "max_tokens": 24,
        "temperature": 0.8,
        "seed": 7,
        "ignore_eos": True,
    }
    await rig.wait_ready(*WORKERS)
    reference: GenerateOptions = {**options, "cache_salt": "reference"}
    expected = await rig.client.complete(**reference)
    num_struck = rig.processes[VICTIM].met().total()
    for attempt in range(NUM_TRIES):
        rig.processes[VICTIM].arm(failpoint)
        for name in PREFILL:
            rig.processes[name].arm(COUNT_PROMPTS)
        before = num_prompts(rig)
        outcome = Outcome(f"{failpoint.replace('=', '-')}-{attempt}")
        ask: GenerateOptions = {**options, "request_id": outcome.request_id, "cache_salt": outcome.request_id}
        async for chunk in rig.client.generate(**ask):
            outcome.chunks.append(chunk)
        num_computed = num_prompts(rig) - before
        rig.heal()
        assert not violations_of(outcome, expected, ())
        if rig.processes[VICTIM].met().total() > num_struck:
            break
    assert rig.processes[VICTIM].met().total() == num_struck + 1
    assert num_computed == 1, rig.logs()
    await rig.wait_ready(*WORKERS)
    await rig.wait_whole()


def num_prompts(rig: Rig) -> int:
    """Prompts that were admitted by prefill workers so far."""
    return sum(rig.processes[name].met()["prefill.admitted"] for name in PREFILL)
