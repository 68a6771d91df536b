"""Steps one behind, through real processes: prefill, handover, decode, and the same tokens."""

from pathlib import Path
from typing import Any

from tests.checkpoints import greedy_oracle, make_checkpoint
from tests.e2e.cluster import start_cluster
from tests.e2e.test_equality import mixed_prompts, num_preemptions, rounds_with_preemption


def test_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "llama", "llama")
    settings: dict[str, Any] = {"overlap": "always", "block_size": 8, "num_blocks": 20, "max_batched_tokens": 27}
    with start_cluster(tmp_path / "run", model, prefill=1, decode=2, **settings) as cluster:
        prompts = mixed_prompts(seed=2)
        rounds = rounds_with_preemption(cluster, prompts, at_least=1)
        assert num_preemptions(cluster) > 0
    for (token_ids, count), *results in zip(prompts, *rounds, strict=True):
        for result in results:
            assert list(result.token_ids) == greedy_oracle(model, token_ids, count)
