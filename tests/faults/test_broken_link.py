"""One link is broken and both of its ends are well: requests go over another, and no client hears of it."""

import signal
from random import Random

import pytest

from tests.checkpoints import VOCAB_SIZE
from tests.faults.history import Outcome, violations_of
from tests.faults.rig import SETTINGS, WORKERS, Rig

NUM_REQUESTS = 6
NUM_PROMPT_TOKENS = 10 * SETTINGS["max_batched_tokens"]  # more than a decode worker computes again by itself


@pytest.mark.asyncio(loop_scope="module")
async def test_the_only_decode_worker_cannot_reach_one_prefill_worker(rig: Rig) -> None:
    random = Random(1)
    prompts = [[random.randrange(3, VOCAB_SIZE) for _ in range(NUM_PROMPT_TOKENS)] for _ in range(NUM_REQUESTS)]
    expected = [
        await rig.client.complete(token_ids=prompt, max_tokens=8, temperature=0.0, cache_salt="reference")
        for prompt in prompts
    ]
    other, broken = rig.processes["decode-1"], rig.link("decode-0", "prefill-0")
    other.away_seconds = 1e9
    other.signal(signal.SIGKILL)
    try:
        await rig.wait_ready("prefill-0", "prefill-1", "decode-0")
        broken.refuses = True
        broken.cut()
        for index, (prompt, reference) in enumerate(zip(prompts, expected, strict=True)):
            outcome = Outcome(f"broken-link-{index}")
            async for chunk in rig.client.generate(
                token_ids=prompt, max_tokens=8, temperature=0.0, request_id=outcome.request_id, cache_salt="broken"
            ):
                outcome.chunks.append(chunk)
            assert not violations_of(outcome, reference, ())
    finally:
        rig.heal()
        other.away_seconds = 0.0
    await rig.wait_ready(*WORKERS)
    await rig.wait_whole()
