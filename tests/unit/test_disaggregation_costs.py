"""What both ways of a prompt cost, and which way the router takes."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.disaggregation import (
    ASSUMED_PREFILL_RATE,
    Disaggregation,
    Link,
    PromptWork,
    seconds_local,
    seconds_split,
)
from gateway.route import Prompt, Route, WorkerView
from gateway.router import Router
from kvrelay.engine.prefix import block_digests, root_digest
from kvrelay.errors import Unavailable
from kvrelay.request import WorkerRole

BLOCK_SIZE = 16
RATE = 1000.0
TOKEN_BYTES = 1000
LINK = Link(bandwidth=1e6, latency=0.002)
CHUNK_TOKENS = 100
ITL_LIMIT = 0.1


def moved(prompt: PromptWork, link: Link, num_tokens: int) -> float:
    return seconds_split(prompt, link, num_tokens_moved=num_tokens, token_bytes=TOKEN_BYTES, chunk_tokens=CHUNK_TOKENS)


def work(uncached: int, queued: int = 0, rate: float = RATE) -> PromptWork:
    return PromptWork(queued, uncached, rate)


@pytest.mark.parametrize(
    ("prompt", "num_running", "expected"),
    [
        (work(50), 0, 0.05),
        (work(50), 3, 0.05 + 3 * 0.05),
        (work(2000), 3, 2.0 + 3 * 0.1),  # no step keeps a stream waiting for longer than the limit
        (work(50, queued=100), 3, 0.15 + 3 * 0.05),
        (work(50, rate=0.0), 0, 50 / ASSUMED_PREFILL_RATE),
    ],
)
def test_a_local_prompt_costs_its_time_and_what_streams_lose(
    prompt: PromptWork, num_running: int, expected: float
) -> None:
    assert seconds_local(prompt, num_running, ITL_LIMIT) == pytest.approx(expected)


def test_without_a_limit_streams_wait_for_all_of_a_local_prompt() -> None:
    assert seconds_local(work(2000), 3, itl_limit=0.0) == pytest.approx(2.0 + 3 * 2.0)


@pytest.mark.parametrize(
    ("prompt", "num_moved", "bandwidth", "exposed"),
    [
        (work(1000), 1000, 1e6, 0.1),  # only the last chunk's bytes are not hidden
        (work(50), 50, 1e6, 0.05),  # all is one chunk
        (work(1000), 1000, 0.5e6, 1.0),  # the link is slower than prefill
        (work(1), 1000, 1e6, 0.999),  # prefill has it cached, the decode worker has not
        (work(1000), 0, 1e6, 0.0),  # the decode worker has all of it
        (work(1000, queued=500), 1000, 1e6, 0.1),
    ],
)
def test_a_moved_prompt_costs_its_time_the_link_and_the_bytes_that_are_not_hidden(
    prompt: PromptWork, num_moved: int, bandwidth: float, exposed: float
) -> None:
    cost = moved(prompt, replace(LINK, bandwidth=bandwidth), num_moved)
    assert cost == pytest.approx(prompt.seconds + LINK.latency + exposed)


amounts = st.integers(0, 10_000)


@given(amounts, amounts, amounts, st.integers(0, 64), st.floats(1.0, 1e6))
def test_more_work_never_costs_less(queued: int, uncached: int, more: int, num_running: int, rate: float) -> None:
    least, larger, later = (
        work(uncached, queued, rate),
        work(uncached + more, queued, rate),
        work(uncached, queued + more, rate),
    )
    for harder in (larger, later):
        assert seconds_local(harder, num_running, ITL_LIMIT) >= seconds_local(least, num_running, ITL_LIMIT)
        assert moved(harder, LINK, uncached) >= least.seconds + LINK.latency
    assert seconds_local(least, num_running + more, ITL_LIMIT) >= seconds_local(least, num_running, ITL_LIMIT)
    slower = replace(LINK, bandwidth=LINK.bandwidth / 2)
    assert moved(least, slower, more) >= moved(least, LINK, more)


# The router


OWN_SETTINGS: dict[str, Any] = {"block_size": BLOCK_SIZE, "max_batched_tokens": CHUNK_TOKENS, "itl_limit": ITL_LIMIT}


def prefill(name: str = "p1", waiting_tokens: int = 0, rate: float = RATE, **own: Any) -> WorkerView:
    settings = OWN_SETTINGS | own
    return WorkerView(name, WorkerRole.PREFILL, 0, 0, waiting_tokens, 1000, 0.0, prefill_rate=rate, **settings)


def decode(
    name: str = "d1", running: int = 0, waiting_tokens: int = 0, blocks_free: int = 1000, **own: Any
) -> WorkerView:
    settings = OWN_SETTINGS | own
    return WorkerView(
        *(name, WorkerRole.DECODE, running, 0, waiting_tokens, blocks_free, 0.0),
        prefill_rate=RATE,
        block_bytes=16_000,
        **settings,
    )


def choose(
    chooser: Router, workers: list[WorkerView], num_tokens: int = 64, first: int = 0, name: str = "request"
) -> Route:
    root, token_ids = root_digest(b"model", ""), range(first, first + num_tokens)
    sizes = {worker.block_size for worker in workers}
    prompt = Prompt(num_tokens, {size: block_digests(root, token_ids, size) for size in sizes})
    return chooser.choose(name, prompt, workers, now=1.0)


@pytest.mark.parametrize(
    ("workers", "num_tokens", "prefill_id"),
    [
        ([prefill(), decode()], 1, None),
        ([prefill(), decode()], 2000, None),  # nobody runs there whom it could delay
        ([prefill(), decode(running=1)], 1, None),  # a delay of 1 ms, and the link costs 2
        ([prefill(), decode(running=8)], 64, "p1"),
        ([prefill(), decode(running=8)], 2000, "p1"),
        ([prefill(waiting_tokens=9000), decode(running=8)], 2000, None),
        ([prefill(), decode(waiting_tokens=2000)], 64, "p1"),
        ([prefill(rate=RATE / 100), decode(running=8)], 2000, None),
        ([prefill(rate=RATE * 100), decode()], 2000, "p1"),
    ],
)
def test_auto_takes_what_costs_less(workers: list[WorkerView], num_tokens: int, prefill_id: str | None) -> None:
    assert choose(Router(Disaggregation.AUTO), workers, num_tokens).prefill_id == prefill_id


def test_a_prompt_that_the_decode_worker_has_cached_stays_there() -> None:
    chooser, workers = Router(Disaggregation.AUTO), [prefill(waiting_tokens=500), decode(running=8)]
    first = choose(chooser, workers, 2000)
    assert first.prefill_id == "p1"
    chooser.finished("request")
    assert choose(chooser, workers, 2000) == Route(None, "d1", 1)
    assert choose(chooser, workers, 2000, first=5000, name="other").prefill_id == "p1"


def test_the_measured_link_decides_between_both_ways() -> None:
    """Streams run on the decode worker, so a prompt is worth moving, unless the link is as slow as this."""
    busy = replace(decode(running=8), block_bytes=1 << 20)
    for link, prefill_id in ((Link(1e10, 0.001), "p1"), (Link(1e6, 0.001), None), (Link(1e10, 60.0), None)):
        workers = [prefill(), replace(busy, links={"p1": link})]
        assert choose(Router(Disaggregation.AUTO), workers, 2000).prefill_id == prefill_id


def test_each_prefill_worker_is_judged_by_its_own_chunks() -> None:
    """What is computed last is moved last, so that large chunks leave more of a transfer to wait for."""
    for chunk_tokens, prefill_id in ((100, "p1"), (2000, None)):
        workers = [prefill(max_batched_tokens=chunk_tokens), decode(running=8, links={"p1": LINK})]
        assert choose(Router(Disaggregation.AUTO), workers, 2000).prefill_id == prefill_id


def test_each_decode_worker_is_judged_by_its_own_limit() -> None:
    for limit, prefill_id in ((0.1, "p1"), (0.01, None), (0.0, "p1")):
        workers = [prefill(), decode(running=8, itl_limit=limit, links={"p1": LINK})]
        assert choose(Router(Disaggregation.AUTO), workers, 2000).prefill_id == prefill_id
    workers = [decode("d1", running=4, itl_limit=0.0), decode("d2", running=4, itl_limit=0.01)]
    assert choose(Router(Disaggregation.NEVER), workers, 2000).decode_id == "d2"


def test_local_prompts_count_where_they_are_computed() -> None:
    chooser, workers = Router(Disaggregation.NEVER), [decode("d1"), decode("d2")]
    assert [choose(chooser, workers, 64, i * 100, f"r{i}").decode_id for i in range(4)] == ["d1", "d2", "d1", "d2"]
    chooser.prefill_done("r1")
    chooser.finished("r3")
    assert choose(chooser, workers, 64, 900, "next").decode_id == "d2"


def test_never_leaves_prefill_workers_alone_and_needs_none() -> None:
    chooser = Router(Disaggregation.NEVER)
    assert choose(chooser, [prefill(rate=1e9), decode(running=60)], 2000) == Route(None, "d1", 2000)
    assert choose(chooser, [decode()]).computed_on == "d1"


def test_never_prefers_a_decode_worker_with_room() -> None:
    workers = [decode("d1", blocks_free=3), decode("d2", running=5)]
    assert choose(Router(Disaggregation.NEVER), workers, 64).decode_id == "d2"


def test_auto_does_without_prefill_workers_and_always_does_not() -> None:
    assert choose(Router(Disaggregation.AUTO), [decode(running=60)], 2000).prefill_id is None
    with pytest.raises(Unavailable) as caught:
        choose(Router(Disaggregation.ALWAYS), [decode()])
    assert caught.value.metadata == {"stage": "prefill"}
    for mode in Disaggregation:
        with pytest.raises(Unavailable) as caught:
            choose(Router(mode), [prefill()])
        assert caught.value.metadata == {"stage": "decode"}


def test_what_serving_needs_follows_from_the_mode() -> None:
    assert set(Disaggregation.ALWAYS.roles) == {WorkerRole.PREFILL, WorkerRole.DECODE}
    assert Disaggregation.NEVER.roles == Disaggregation.AUTO.roles == (WorkerRole.DECODE,)


def test_a_worker_without_experience_is_taken_to_be_as_fast_as_the_fastest() -> None:
    unknown = replace(decode(), prefill_rate=0.0)
    for decoding, prefill_id in ((unknown, None), (decode(), "p1")):
        route = choose(Router(Disaggregation.AUTO), [prefill(rate=1e5), decoding], 2000)
        assert route.prefill_id == prefill_id


@given(
    st.sampled_from(list(Disaggregation)),
    st.lists(st.tuples(st.integers(1, 3000), st.sampled_from(["nothing", "prefill_done", "finished"])), max_size=12),
)
def test_when_all_requests_have_left_nothing_is_counted_any_more(
    mode: Disaggregation, requests: list[tuple[int, str]]
) -> None:
    workers = [prefill("p1"), prefill("p2"), decode("d1", running=2), decode("d2", running=2)]
    used, unused = Router(mode), Router(mode)
    for index, (num_tokens, news) in enumerate(requests):
        choose(used, workers, num_tokens, index * 10_000, f"r{index}")
        if news != "nothing":
            getattr(used, news)(f"r{index}")
    for index in range(len(requests)):
        used.finished(f"r{index}")
    for num_tokens in (1, 500, 5000):
        assert choose(used, workers, num_tokens, 900_000) == choose(unused, workers, num_tokens, 900_000)
