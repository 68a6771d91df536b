"""A cluster whose workers compute with 8-bit weights."""

from pathlib import Path

import pytest

from tests.checkpoints import oracle_logits
from tests.e2e.cluster import start_cluster


def test_a_cluster_serves_with_int8_weights(tmp_path: Path, tiny_llama: Path) -> None:
    prompt = list(range(3, 60))
    with (
        start_cluster(tmp_path / "run", tiny_llama, num_blocks=64, quantization="int8") as cluster,
        cluster.client() as client,
    ):
        completion = client.complete(token_ids=prompt, max_tokens=8, temperature=0, ignore_eos=True, logprobs=1)
        cluster.wait_whole()
    assert len(completion.token_ids) == 8
    for count, (token_id, found) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        exact = oracle_logits(tiny_llama, [*prompt, *completion.token_ids[:count]]).log_softmax(dim=0)[token_id].item()
        # Near, and yet further than float32 would be.
        assert found.logprob == pytest.approx(exact, abs=0.2)
        assert found.logprob != pytest.approx(exact, abs=1e-5)
