"""A seed draws the same tokens whatever else is in the batch, and whichever worker draws them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvrelay import Client
from kvrelay.client import GenerateOptions
from tests.checkpoints import make_checkpoint
from tests.e2e.cluster import start_cluster


def test_a_seed_repeats_itself_alone_and_in_a_crowd(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "qwen3", "qwen3")
    variants: list[GenerateOptions] = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 40},
        {"temperature": 1.3, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.02, "logprobs": 2},
    ]

    def draw(client: Client, index: int) -> tuple[int, ...]:
        options: GenerateOptions = {
            **variants[index % len(variants)],
            "token_ids": [3 + index % 5] * (5 + index % 7),
            "seed": index // 4,
            "max_tokens": 24,
            "ignore_eos": True,
        }
        return client.complete(**options).token_ids

    with (
        start_cluster(tmp_path / "run", model, decode=2, max_batched_tokens=32, block_size=8, num_blocks=24) as cluster,
        cluster.client() as client,
        ThreadPoolExecutor(32) as threads,
    ):
        alone = [draw(client, index) for index in range(32)]
        crowded = list(threads.map(lambda index: draw(client, index), range(32)))
        assert crowded == alone
        assert len(set(alone)) > 24
        cluster.wait_whole()
