"""A thousand requests of which a third are cancelled, at any moment: every block comes back, and memory stays flat."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

from kvrelay import Client, FinishReason
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.e2e.cluster import Cluster, start_cluster

NUM_REQUESTS = 1000
NUM_CLIENTS = 24
# What the allocators of Python, torch and gRPC keep may still move a little after the warm-up.
MEMORY_SLACK = 12 << 20


def run_requests(cluster: Cluster, count: int, seed: int) -> int:
    """Runs requests from many threads, cancelling every third one; answers how many ran to their end."""
    with Client(cluster.target, timeout=120) as client, ThreadPoolExecutor(NUM_CLIENTS) as threads:

        def run(index: int) -> bool:
            random = Random(seed * NUM_REQUESTS + index)
            prompt = [random.randrange(3, VOCAB_SIZE) for _ in range(random.randrange(1, 60))]
            leave_after = random.randrange(0, 8) if index % 3 == 0 else None
            with client.generate(token_ids=prompt, max_tokens=12, temperature=1.0, ignore_eos=True) as stream:
                for position, chunk in enumerate(stream):
                    if leave_after is not None and position >= leave_after:
                        return False
                    if chunk.finish_reason is not None:
                        return chunk.finish_reason is FinishReason.LENGTH
            return False

        return sum(threads.map(run, range(count)))


def memory(cluster: Cluster) -> dict[str, int]:
    return {worker.id: worker.memory_bytes for worker in cluster.status().workers}


def test_pools_are_whole_and_memory_flat_after_a_thousand_requests(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "llama", "llama")
    with start_cluster(
        tmp_path / "run", model, prefill=2, decode=2, block_size=8, num_blocks=256, max_batched_tokens=64
    ) as cluster:
        pids = {worker.id: worker.pid for worker in cluster.status().workers}
        run_requests(cluster, NUM_REQUESTS // 4, seed=1)
        cluster.wait_whole()
        before = memory(cluster)
        finished = run_requests(cluster, NUM_REQUESTS, seed=2)
        cluster.wait_whole()
        after = memory(cluster)
        assert pids == {worker.id: worker.pid for worker in cluster.status().workers}
    # Those who leave may have had all tokens in few chunks already.
    assert finished >= NUM_REQUESTS * 2 // 3 - 1
    assert {name: size for name, size in after.items() if size > before[name] + MEMORY_SLACK} == {}
