"""Steps one behind, through real processes: prefill, handover, decode, and the same tokens."""

from pathlib import Path

from tests.checkpoints import greedy_oracle, make_checkpoint
from tests.e2e.cluster import start_cluster
from tests.e2e.test_equality import complete_all, mixed_prompts


def test_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "llama", "llama")
    settings = {"overlap": "always", "block_size": 8, "num_blocks": 20, "max_batched_tokens": 27}
    with start_cluster(tmp_path / "run", model, prefill=1, decode=2, **settings) as cluster:
        prompts = mixed_prompts(seed=2)
        results = complete_all(cluster.target, prompts)
        cluster.wait_whole()
        num_preemptions = sum(worker.preemptions for worker in cluster.status().workers)
    for (token_ids, count), result in zip(prompts, results, strict=True):
        assert list(result.token_ids) == greedy_oracle(model, token_ids, count)
    assert num_preemptions > 0
