"""Tokens by position: whatever way and order they come in, the log has each once and in order."""

import asyncio
from collections.abc import Sequence
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from gateway.completion import Completion
from gateway.detokenizer import CompletionText
from gateway.response_log import ResponseLog
from kvrelay.request import FinishReason, Timings, Token, Usage
from tests.patience import SOON

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Letters:
    """A detokenizer for token ids that are positions in the alphabet."""

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(LETTERS[token_id] for token_id in token_ids)

    def flush(self) -> str:
        return ""


async def read(completion: Completion, log: ResponseLog) -> tuple[str, list[int]]:
    completion.finish_text()
    log.finish(FinishReason.STOP, Usage(), Timings())
    chunks = [chunk async for chunk in log.read()]
    return "".join(chunk.text for chunk in chunks), [token for chunk in chunks for token in chunk.token_ids]


def completion_for(stop: tuple[str, ...] = ()) -> tuple[Completion, ResponseLog]:
    log = ResponseLog("request")
    return Completion(CompletionText(Letters(), stop), log), log


@given(st.integers(0, 1 << 32), st.integers(1, 26))
def test_order_and_repetition_do_not_matter(seed: int, count: int) -> None:
    random = Random(seed)
    runs = []
    for start in range(count):
        end = random.randint(start + 1, count)
        runs.append((start, [Token(index) for index in range(start, end)]))
    random.shuffle(runs)

    async def check() -> None:
        completion, log = completion_for()
        for start, tokens in runs:
            completion.add(start, tokens)
        assert completion.num_tokens == count
        assert await read(completion, log) == (LETTERS[:count], list(range(count)))

    asyncio.run(check())


async def test_a_gap_holds_back_what_follows() -> None:
    completion, log = completion_for()
    completion.add(1, [Token(1), Token(2)])
    assert completion.num_tokens == 0
    completion.add(0, [Token(0)])
    assert await read(completion, log) == ("abc", [0, 1, 2])


async def test_nothing_follows_a_stop_string() -> None:
    completion, log = completion_for(stop=("de",))
    completion.add(0, [Token(index) for index in range(8)])
    completion.add(8, [Token(8)])
    assert completion.stopped
    assert completion.num_tokens == 5
    assert await read(completion, log) == ("abc", [0, 1, 2, 3, 4])


async def test_waiters_are_told_of_tokens_and_of_a_stop() -> None:
    completion, _ = completion_for(stop=("c",))
    two, ten, stop = (
        asyncio.create_task(waiting)
        for waiting in (completion.wait_for(2), completion.wait_for(10), completion.wait_for_stop())
    )
    completion.add(0, [Token(0), Token(1)])
    await asyncio.wait_for(two, SOON)
    assert not ten.done()
    assert not stop.done()
    completion.add(2, [Token(2)])
    await asyncio.wait_for(asyncio.gather(ten, stop), SOON)
