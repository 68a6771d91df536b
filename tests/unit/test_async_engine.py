"""The asyncio side of the engine: events arrive in order, and nobody who leaves stays behind."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence

import pytest

from kvrelay.engine.async_engine import AsyncEngine
from kvrelay.engine.block_pool import BlockPool
from kvrelay.engine.engine import Engine
from kvrelay.engine.events import Event, Failed, Finished, Sampled, StepOutput
from kvrelay.engine.limits import Limits
from kvrelay.engine.scheduler import Scheduler
from kvrelay.engine.sequence import Chunk
from kvrelay.engine.sequence import Sequence as EngineSequence
from kvrelay.errors import AlreadyExists, InvalidArgument
from kvrelay.request import Request, Sampling, Token
from tests.patience import SOON


class Counted:
    """A step whose tokens are positions."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = chunks

    def tokens(self) -> list[Token]:
        return [Token(chunk.end) for chunk in self._chunks if chunk.samples]


class Counting:
    """A runner of such steps."""

    def __init__(self, overlaps: bool) -> None:
        self.overlaps = overlaps

    def launch(self, chunks: Sequence[Chunk]) -> Counted:
        return Counted(chunks)


@pytest.fixture(params=[False, True], ids=["alone", "overlap"])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[AsyncEngine]:
    limits = Limits(max_num_sequences=8, max_batched_tokens=16, context_length=64, block_size=4)
    engine = AsyncEngine(Engine(Scheduler(BlockPool(32), limits), Counting(request.param)))
    engine.start()
    yield engine
    await nothing_is_held(engine)
    engine.stop()


async def nothing_is_held(engine: AsyncEngine) -> None:
    """What ended in flight is held until the step in flight is over."""
    async with asyncio.timeout(SOON):
        while await engine.ask(lambda scheduler: scheduler.held()):
            pass


def sequence(request_id: str, max_tokens: int = 4, num_prompt_tokens: int = 6) -> EngineSequence:
    return EngineSequence(Request(request_id, tuple(range(num_prompt_tokens)), Sampling(max_tokens)))


class Inbox:
    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = asyncio.Event()

    def __call__(self, event: Event, step: StepOutput) -> None:
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self.ended.set()

    async def tokens(self) -> list[int]:
        await asyncio.wait_for(self.ended.wait(), SOON)
        return [event.token.token_id for event in self.events if isinstance(event, Sampled)]


async def test_events_arrive_in_order(engine: AsyncEngine) -> None:
    inboxes = [Inbox() for _ in range(5)]
    for index, inbox in enumerate(inboxes):
        await engine.submit(sequence(f"request {index}"), inbox)
    for inbox in inboxes:
        assert await inbox.tokens() == [6, 7, 8, 9]


async def test_an_id_is_free_again_after_its_end(engine: AsyncEngine) -> None:
    for _ in range(2):
        inbox = Inbox()
        await engine.submit(sequence("request"), inbox)
        await inbox.tokens()


async def test_an_id_in_use_is_refused_and_its_owner_undisturbed(engine: AsyncEngine) -> None:
    inbox = Inbox()
    first = asyncio.create_task(engine.submit(sequence("request", max_tokens=40), inbox))
    await asyncio.sleep(0)
    with pytest.raises(AlreadyExists):
        await engine.submit(sequence("request"), Inbox())
    await first
    assert len(await inbox.tokens()) == 40


async def test_a_refused_sequence_leaves_nothing(engine: AsyncEngine) -> None:
    with pytest.raises(InvalidArgument):
        await engine.submit(sequence("request", num_prompt_tokens=64), Inbox())
    inbox = Inbox()
    await engine.submit(sequence("request"), inbox)
    await inbox.tokens()


async def test_a_cancelled_submission_leaves_nothing(engine: AsyncEngine) -> None:
    task = asyncio.create_task(engine.submit(sequence("request", max_tokens=50), Inbox()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    inbox = Inbox()
    await engine.submit(sequence("request"), inbox)
    assert await inbox.tokens() == [6, 7, 8, 9]


async def test_the_next_of_an_id_hears_nothing_of_the_former(engine: AsyncEngine) -> None:
    for _ in range(50):
        await engine.submit(sequence("request", max_tokens=50), Inbox())
        engine.abort("request")
        inbox = Inbox()
        await engine.submit(sequence("request"), inbox)
        assert await inbox.tokens() == [6, 7, 8, 9]


async def test_an_aborted_sequence_is_not_heard_of_again(engine: AsyncEngine) -> None:
    """Nor is what the engine has said of it already, and this event loop has not yet heard."""
    inbox, add, step = Inbox(), threading.Event(), threading.Event()
    engine.tell(lambda _: hold(add))
    submission = asyncio.create_task(engine.submit(sequence("request", max_tokens=50), inbox))
    await asyncio.sleep(0)
    engine.tell(lambda _: hold(step))
    add.set()
    await submission
    step.set()
    for _ in range(4):  # steps, while the event loop stands still
        engine._engine_loop.tell(lambda _: None).result(SOON)
    engine.abort("request")
    await nothing_is_held(engine)  # answers come after all that was said before them
    assert inbox.events == []


def hold(event: threading.Event) -> None:
    """Between two steps."""
    event.wait(SOON)


async def test_a_listener_that_fails_ends_its_own_request_only(engine: AsyncEngine) -> None:
    class Failing(Inbox):
        def __call__(self, event: Event, step: StepOutput) -> None:
            super().__call__(event, step)
            if isinstance(event, Sampled):
                raise RuntimeError("defect")

    failing, healthy = Failing(), Inbox()
    await engine.submit(sequence("failing", max_tokens=50), failing)
    await engine.submit(sequence("healthy"), healthy)
    assert await healthy.tokens() == [6, 7, 8, 9]
    await failing.tokens()


async def test_free_blocks_are_told_as_they_are(engine: AsyncEngine) -> None:
    """Of a pool that is shared others take some while this engine sleeps."""
    taken = engine._pool.allocate(3)
    assert (engine.load.blocks_total, engine.load.blocks_free) == (32, 29)
    engine._pool.release(taken)
    assert engine.load.blocks_free == 32
