"""The router's choices, on a clock that the test moves."""

from dataclasses import replace

import pytest

from gateway.disaggregation import Disaggregation
from gateway.route import Prompt, WorkerView
from gateway.router import BROKEN_LINK_SECONDS, Router
from kvrelay.engine.prefix import block_digests, root_digest
from kvrelay.errors import Unavailable
from kvrelay.request import WorkerRole

BLOCK_SIZE = 16
ROOT = root_digest(b"model", "")


def prefill(name: str, waiting_tokens: int = 0, seen_at: float = 0.0, block_size: int = BLOCK_SIZE) -> WorkerView:
    return WorkerView(name, WorkerRole.PREFILL, 0, 0, waiting_tokens, 100, seen_at, block_size, 512, 0.1)


def decode(
    name: str, running: int = 0, blocks_free: int = 100, waiting: int = 0, block_size: int = BLOCK_SIZE
) -> WorkerView:
    return WorkerView(name, WorkerRole.DECODE, running, waiting, 0, blocks_free, 0.0, block_size, 512, 0.1)


WORKERS = [prefill("p1"), prefill("p2"), decode("d1"), decode("d2")]


def prompt(num_tokens: int, first: int = 0, root: bytes = ROOT) -> Prompt:
    token_ids = range(first, first + num_tokens)
    return Prompt(num_tokens, {size: block_digests(root, token_ids, size) for size in (BLOCK_SIZE, 2 * BLOCK_SIZE)})


def test_an_idle_cluster_is_used_evenly() -> None:
    router = Router()
    routes = [router.choose(f"r{index}", prompt(64, index * 1000), WORKERS, now=1.0) for index in range(4)]
    assert [route.prefill_id for route in routes] == ["p1", "p2", "p1", "p2"]
    assert [route.decode_id for route in routes] == ["d1", "d2", "d1", "d2"]


def test_the_order_of_the_workers_does_not_matter() -> None:
    for workers in (WORKERS, WORKERS[::-1]):
        route = Router().choose("r", prompt(64), workers, now=1.0)
        assert (route.prefill_id, route.decode_id) == ("p1", "d1")


def test_prefill_goes_where_fewer_tokens_wait() -> None:
    workers = [prefill("p1", waiting_tokens=500), prefill("p2", waiting_tokens=400), decode("d1")]
    assert Router().choose("r", prompt(64), workers, now=1.0).prefill_id == "p2"


def test_a_cached_prefix_is_worth_its_tokens() -> None:
    router = Router()
    assert router.choose("first", prompt(64), WORKERS, now=1.0).prefill_id == "p1"
    router.finished("first")
    longer = prompt(100)
    route = router.choose("second", longer, [prefill("p1", 63), prefill("p2"), decode("d1")], now=1.0)
    assert (route.prefill_id, route.num_uncached_tokens) == ("p1", 36)
    router.finished("second")
    route = router.choose("third", longer, [prefill("p1", 200), prefill("p2"), decode("d1")], now=1.0)
    assert (route.prefill_id, route.num_uncached_tokens) == ("p2", 100)


def test_each_worker_is_judged_by_its_own_block_size() -> None:
    """Two workers of 80 tokens' prefix: one has 5 blocks of 16, the other 2 of 32, which are 64 tokens."""
    small, large, decoding = prefill("p1"), prefill("p2", block_size=32), decode("d1")
    router = Router()
    for request_id, worker in (("r1", small), ("r2", large)):
        router.choose(request_id, prompt(80), [worker, decoding], now=1.0)
        router.finished(request_id)
    for worker, num_uncached in ((small, 20), (large, 36)):
        route = router.choose("r3", prompt(100), [worker, decoding], now=1.0)
        assert route.num_uncached_tokens == num_uncached
        router.finished("r3")


def test_room_is_counted_in_tokens() -> None:
    workers = [prefill("p1"), decode("d1", blocks_free=6), decode("d2", blocks_free=4, block_size=32)]
    assert Router().choose("r", prompt(64), workers, now=1.0).decode_id == "d2"
    for block_size, late in ((16, True), (32, False)):
        workers = [prefill("p1"), decode("d1", blocks_free=4, block_size=block_size)]
        assert Router().choose("r", prompt(64), workers, now=1.0).reserves_late is late


def test_a_prompt_that_is_cached_whole_still_costs_a_token() -> None:
    router = Router()
    router.choose("first", prompt(64), WORKERS, now=1.0)
    assert router.choose("second", prompt(64), WORKERS, now=1.0, avoid={"p2"}).num_uncached_tokens == 1


def test_another_salt_shares_nothing() -> None:
    router = Router()
    router.choose("first", prompt(64), WORKERS, now=1.0)
    salted = prompt(64, root=root_digest(b"model", "salt"))
    assert router.choose("second", salted, WORKERS, now=1.0, avoid={"p2"}).num_uncached_tokens == 64


def test_a_restarted_worker_has_an_empty_cache() -> None:
    router = Router()
    router.choose("first", prompt(64), [prefill("p1"), decode("d1")], now=1.0)
    restarted = replace(prefill("p1"), epoch=1)
    assert router.choose("second", prompt(64), [restarted, decode("d1")], now=1.0).num_uncached_tokens == 64
    assert router.choose("third", prompt(64), [restarted, decode("d1")], now=1.0).num_uncached_tokens == 1


def test_tokens_sent_count_until_the_next_heartbeat_tells_of_them() -> None:
    router = Router()
    router.choose("r1", prompt(300), [prefill("p1"), decode("d1")], now=1.0)

    def where(request_id: str, heartbeat: WorkerView) -> str | None:
        route = router.choose(request_id, prompt(10, 5000), [heartbeat, prefill("p2", 200), decode("d1")], now=2.0)
        router.finished(request_id)
        return route.prefill_id

    assert where("r2", prefill("p1", waiting_tokens=0, seen_at=0.5)) == "p2"
    assert where("r3", prefill("p1", waiting_tokens=150, seen_at=1.5)) == "p1"


def test_a_computed_prompt_is_queued_no_more() -> None:
    for notify in ("prefill_done", "finished"):
        router = Router()
        router.choose("r1", prompt(300), WORKERS, now=1.0)
        getattr(router, notify)("r1")
        getattr(router, notify)("r1")
        assert router.choose("r2", prompt(64, 5000), WORKERS, now=1.0).prefill_id == "p1"


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        ([decode("d1", running=3), decode("d2", running=2)], "d2"),
        ([decode("d1", running=1, waiting=2), decode("d2", running=2)], "d2"),
        ([decode("d1", running=2, blocks_free=10), decode("d2", running=3, blocks_free=100)], "d2"),
        ([decode("d1", blocks_free=0), decode("d2", running=3, blocks_free=8)], "d2"),
        ([decode("d2", blocks_free=0), decode("d1", blocks_free=0)], "d1"),
    ],
)
def test_decode_goes_where_sequences_are_few_for_the_free_blocks(workers: list[WorkerView], expected: str) -> None:
    assert Router().choose("r", prompt(64), [prefill("p1"), *workers], now=1.0).decode_id == expected


def test_decode_counts_what_was_sent_but_is_not_reported_yet() -> None:
    router = Router()
    for index in range(3):
        router.choose(f"r{index}", prompt(16, index * 100), WORKERS, now=1.0, avoid={"d2"})
    assert router.choose("r3", prompt(16, 900), [*WORKERS[:3], decode("d2", running=2)], now=1.0).decode_id == "d2"
    router.finished("r3")
    for index in range(3):
        router.finished(f"r{index}")
    assert router.choose("r4", prompt(16, 901), WORKERS, now=1.0).decode_id == "d1"


def test_among_equal_decode_workers_the_prefix_decides() -> None:
    router = Router()
    router.choose("r1", prompt(64), WORKERS, now=1.0, avoid={"d1"})
    router.finished("r1")
    assert router.choose("r2", prompt(64), WORKERS, now=1.0).decode_id == "d2"
    assert router.choose("r3", prompt(64, 5000), WORKERS, now=1.0).decode_id == "d1"


def test_draining_and_avoided_workers_are_passed_over() -> None:
    router = Router()
    draining = [replace(WORKERS[0], draining=True), *WORKERS[1:]]
    route = router.choose("r", prompt(64), draining, now=1.0, avoid={"d1"})
    assert (route.prefill_id, route.decode_id) == ("p2", "d2")


@pytest.mark.parametrize(("missing", "stage"), [({"p1", "p2"}, "prefill"), ({"d1", "d2"}, "decode")])
def test_without_workers_of_a_role_nothing_is_chosen(missing: set[str], stage: str) -> None:
    router = Router()
    others = [worker for worker in WORKERS if worker.worker_id not in missing]
    with pytest.raises(Unavailable) as caught:
        router.choose("r", prompt(64), others, now=1.0)
    assert (caught.value.reason, caught.value.metadata) == ("NO_WORKERS", {"stage": stage})
    route = router.choose("r", prompt(64), WORKERS, now=1.0)
    assert (route.prefill_id, route.decode_id, route.num_uncached_tokens) == ("p1", "d1", 64)


def test_who_failed_is_better_than_nobody() -> None:
    route = Router().choose("r", prompt(64), WORKERS, now=1.0, avoid={"p1", "p2", "d1", "d2"})
    assert (route.prefill_id, route.decode_id) == ("p1", "d1")


def start(name: str, epoch: int = 0) -> tuple[str, int]:
    return name, epoch


def test_a_link_that_broke_is_passed_over_for_a_while() -> None:
    router = Router()
    workers = [prefill("p1"), prefill("p2", waiting_tokens=900), decode("d1")]
    router.link_broke(start("p1"), start("d1"), now=1.0)
    assert router.choose("r", prompt(64), workers, now=1.1).prefill_id == "p2"
    assert router.choose("r", prompt(64), workers, now=0.99 + BROKEN_LINK_SECONDS).prefill_id == "p2"
    assert router.choose("r", prompt(64), workers, now=1.01 + BROKEN_LINK_SECONDS).prefill_id == "p1"


def test_another_start_has_links_of_its_own() -> None:
    router = Router()
    workers = [prefill("p1"), prefill("p2", waiting_tokens=900), decode("d1")]
    router.link_broke(start("p1"), start("d1"), now=1.0)
    for restarted in ([replace(workers[0], epoch=1), *workers[1:]], [*workers[:2], replace(workers[2], epoch=1)]):
        assert router.choose("r", prompt(64), restarted, now=1.1).prefill_id == "p1"


def test_a_whole_link_to_who_is_avoided_is_better_than_a_broken_one() -> None:
    router = Router()
    router.link_broke(start("p1"), start("d1"), now=1.0)
    router.link_broke(start("p2"), start("d1"), now=1.0)
    route = router.choose("r", prompt(64), WORKERS, now=1.1, avoid={"d2", "p1"})
    assert (route.prefill_id, route.decode_id) == ("p2", "d2")


def test_a_broken_link_is_better_than_none() -> None:
    router = Router()
    for name in ("p1", "p2"):
        router.link_broke(start(name), start("d1"), now=1.0)
    route = router.choose("r", prompt(64), [*WORKERS[:2], decode("d1")], now=1.1)
    assert (route.prefill_id, route.decode_id) == ("p1", "d1")


def test_over_a_broken_link_nothing_is_sent_that_the_decode_worker_may_compute() -> None:
    """On the idle decode worker it would cost the same; what runs there makes it worse, but not impossible."""
    router = Router(Disaggregation.AUTO)
    workers = [replace(prefill("p1"), prefill_rate=1000.0), replace(decode("d1", running=20), prefill_rate=1000.0)]
    assert router.choose("r", prompt(64), workers, now=1.0).prefill_id == "p1"
    router.link_broke(start("p1"), start("d1"), now=1.0)
    assert router.choose("r", prompt(64), workers, now=1.1).prefill_id is None


def test_a_move_takes_another_decode_worker_and_keeps_the_prefill_worker() -> None:
    router = Router()
    router.choose("r1", prompt(64), WORKERS, now=1.0)
    assert router.move("r1", prompt(64), WORKERS, now=1.0) == "d2"
    # It counts as the new worker's from then on.
    assert router.choose("r2", prompt(64, 5000), WORKERS, now=1.0).decode_id == "d1"
    with pytest.raises(Unavailable):
        router.move("r1", prompt(64), [prefill("p1"), decode("d2")], now=1.0)


def test_a_move_avoids_workers_where_there_are_others() -> None:
    router = Router()
    workers = [*WORKERS, decode("d3")]
    router.choose("r1", prompt(64), workers, now=1.0)
    assert router.move("r1", prompt(64), workers, now=1.0, avoid=["d2"]) == "d3"
    assert router.move("r1", prompt(64), workers, now=1.0, avoid=["d1", "d2"]) == "d1"


def test_blocks_are_promised_by_the_worker_that_a_request_moved_to() -> None:
    router = Router()
    workers = [prefill("p1"), decode("d1", blocks_free=11), decode("d2", blocks_free=10)]
    assert router.choose("r1", prompt(64), workers, now=1.0).decode_id == "d1"
    router.move("r1", prompt(64), workers, now=1.0)
    assert router.choose("r2", prompt(64, 5000), workers, now=1.0, avoid=["d1"]).reserves_late
    assert not router.choose("r3", prompt(64, 9000), workers, now=1.0, avoid=["d2"]).reserves_late


def test_a_request_that_is_routed_again_leaves_its_first_workers() -> None:
    router = Router()
    router.choose("r1", prompt(64), WORKERS, now=1.0)
    route = router.choose("r1", prompt(64), WORKERS, now=1.0, avoid={"p1", "d1"})
    assert (route.prefill_id, route.decode_id) == ("p2", "d2")
    route = router.choose("r2", prompt(64, 5000), WORKERS, now=1.0)
    assert (route.prefill_id, route.decode_id) == ("p1", "d1")


def test_the_memory_of_prefixes_is_bounded_and_forgets_the_oldest_ends_first() -> None:
    router = Router(max_digests=6)
    alone = [prefill("p1"), decode("d1")]

    def num_uncached(first: int) -> int:
        router.finished("r")
        return router.choose("r", prompt(64, first), alone, now=1.0).num_uncached_tokens

    assert num_uncached(0) == 64
    assert num_uncached(1000) == 64
    assert num_uncached(0) == 32
    assert num_uncached(1000) == 32
