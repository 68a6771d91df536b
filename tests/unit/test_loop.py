import threading
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Items
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvrelay.engine import loop as loop_module
from kvrelay.engine.engine import Engine, Launched
from kvrelay.engine.events import Event, Failed, Finished, Sampled, StepOutput
from kvrelay.engine.loop import EngineLoop
from kvrelay.engine.scheduler import Scheduler
from kvrelay.engine.sequence import Chunk, Role, Sequence
from kvrelay.errors import AlreadyExists, DeadlineExceeded, Unavailable
from kvrelay.request import Request, Sampling
from tests.patience import SOON, eventually
from tests.unit.scheduling import Bench
from tests.unit.shared_pools import joined

dies = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


class CountingEngine(Engine):
    num_steps = 0

    def step(self) -> StepOutput:
        self.num_steps += 1
        return super().step()


class Rig:
    """A loop over a fake model, and what it delivered."""

    def __init__(self, **limits: Any) -> None:
        self.bench = Bench(**limits)
        self.overlaps = self.bench.model.overlaps
        self.engine = CountingEngine(self.bench.scheduler, self)
        self.loop = EngineLoop(self.engine, self._deliver)
        self.refuse: Callable[[Items[Chunk]], bool] = lambda chunks: False
        self.on_deliver: Callable[[], None] = lambda: None
        self._events: list[Event] = []
        self._arrived = threading.Condition()

    def launch(self, chunks: Items[Chunk]) -> Launched:
        if self.refuse(chunks):
            raise RuntimeError("the model broke")
        return self.bench.model.launch(chunks)

    def add(self, request_id: str, prompt: Items[int] = (1, 2, 3), role: Role = Role.WHOLE, **more: Any) -> Sequence:
        sequence = Sequence(Request(request_id, tuple(prompt), Sampling(max_tokens=3)), role, **more)
        self.loop.tell(lambda scheduler: scheduler.add(sequence)).result(SOON)
        return sequence

    def wait_for(self, kind: type[Event], request_id: str) -> Event:
        def found() -> list[Event]:
            return [event for event in self._events if isinstance(event, kind) and event.request_id == request_id]

        with self._arrived:
            assert self._arrived.wait_for(found, SOON), f"no {kind.__name__} of {request_id}"
            return found()[0]

    def tokens(self, request_id: str) -> list[int]:
        with self._arrived:
            sampled = [event for event in self._events if isinstance(event, Sampled)]
        return [event.token.token_id for event in sampled if event.request_id == request_id]

    def steps_within(self, seconds: float) -> int:
        before = self.engine.num_steps
        threading.Event().wait(seconds)
        return self.engine.num_steps - before

    def wait_for_end(self) -> None:
        self.loop._thread.join(SOON)
        assert not self.loop.alive

    def _deliver(self, output: StepOutput) -> None:
        self.on_deliver()
        with self._arrived:
            self._events += output.events
            self._arrived.notify_all()


@pytest.fixture(params=[False, True], ids=["alone", "overlap"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(overlap=request.param)
    rig.loop.start()
    yield rig
    rig.loop.stop()
    assert not rig.loop.alive


def test_commands_come_from_many_threads_and_their_answers_go_back(rig: Rig) -> None:
    names = [f"{thread}-{number}" for thread in range(8) for number in range(10)]

    def submit(name: str) -> Sequence:
        sequence = rig.add(name, [len(name), *map(ord, name)])
        assert rig.loop.tell(lambda scheduler: (name, type(scheduler))).result(SOON) == (name, Scheduler)
        return sequence

    with ThreadPoolExecutor(8) as threads:
        sequences = list(threads.map(submit, names))
    for sequence in sequences:
        rig.wait_for(Finished, sequence.request_id)
        assert rig.tokens(sequence.request_id) == rig.bench.expected(sequence)
    assert rig.loop.tell(lambda _: threading.current_thread().name).result(SOON) == "engine"


def test_a_command_that_fails_hands_its_exception_back_and_the_loop_lives(rig: Rig) -> None:
    rig.add("a", role=Role.PREFILL)
    with pytest.raises(AlreadyExists):
        rig.add("a")
    with pytest.raises(ZeroDivisionError):
        rig.loop.tell(lambda _: 1 / 0).result(SOON)
    rig.add("b")
    rig.wait_for(Finished, "b")


def test_a_cancelled_command_is_not_run(rig: Rig) -> None:
    busy, go = threading.Event(), threading.Event()

    def hold_up(_: Scheduler) -> None:
        busy.set()
        go.wait(SOON)

    rig.loop.tell(hold_up)
    assert busy.wait(SOON)
    future = rig.loop.tell(lambda scheduler: scheduler.add(Sequence(Request("a", (1,), Sampling(1)))))
    assert future.cancel()
    go.set()
    assert rig.loop.tell(lambda scheduler: scheduler.load().waiting).result(SOON) == 0


def test_the_load_is_that_after_the_last_step(rig: Rig) -> None:
    assert rig.loop.load.blocks_free == rig.loop.load.blocks_total == 64
    rig.add("a", role=Role.PREFILL)
    rig.wait_for(Sampled, "a")
    assert rig.loop.load.blocks_free == 63
    rig.loop.tell(lambda scheduler: scheduler.forget("a")).result(SOON)
    rig.add("b")
    rig.wait_for(Finished, "b")
    assert rig.loop.load.blocks_free == 64


def test_a_broken_step_fails_its_batch_only(rig: Rig) -> None:
    rig.refuse = lambda chunks: any(chunk.sequence.request_id == "bad" for chunk in chunks)
    rig.add("bad")
    assert isinstance(rig.wait_for(Failed, "bad"), Failed)
    good = rig.add("good")
    rig.wait_for(Finished, "good")
    assert rig.tokens("good") == rig.bench.expected(good)
    assert rig.loop.alive


def test_an_idle_loop_sleeps(rig: Rig) -> None:
    rig.add("a", role=Role.PREFILL)
    rig.wait_for(Sampled, "a")
    rig.loop.tell(lambda _: None).result(SOON)
    assert rig.steps_within(0.2) <= 1
    rig.add("b")
    rig.wait_for(Finished, "b")


def test_a_loop_that_waits_for_blocks_sees_when_another_process_frees_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "QUIET_SECONDS", 1000.0)
    with joined(tmp_path / "pool", 4) as pool, joined(tmp_path / "pool", 4) as other:
        taken = other.allocate(4)
        rig = Rig(num_blocks=4, pool=pool)
        rig.loop.start()
        sequence = rig.add("a")
        rig.loop.tell(lambda _: None).result(SOON)
        assert rig.loop.load.waiting == 1
        other.release(taken)
        rig.wait_for(Finished, "a")
        rig.loop.stop()
        assert rig.tokens("a") == rig.bench.expected(sequence)


def test_an_idle_loop_wakes_for_a_deadline(rig: Rig) -> None:
    started = time.monotonic()
    rig.add("a", role=Role.PREFILL, deadline=started + 0.2)
    rig.wait_for(Sampled, "a")
    before = rig.engine.num_steps
    failed = rig.wait_for(Failed, "a")
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, DeadlineExceeded)
    assert time.monotonic() - started >= 0.2
    assert rig.engine.num_steps - before <= 4


def test_a_transfer_past_its_deadline_does_not_make_the_loop_spin(rig: Rig) -> None:
    deadline = time.monotonic() + 0.05
    rig.add("a", role=Role.DECODE, deadline=deadline)
    eventually(lambda: time.monotonic() > deadline)
    rig.loop.tell(lambda _: None).result(SOON)
    assert rig.steps_within(0.2) <= 1


def test_stop_ends_the_thread_and_whoever_comes_later_is_told(rig: Rig) -> None:
    rig.add("a", role=Role.PREFILL)
    rig.loop.stop()
    assert not rig.loop.alive
    with pytest.raises(Unavailable) as caught:
        rig.loop.tell(lambda _: None)
    assert caught.value.reason == "ENGINE_STOPPED"
    rig.loop.stop()


def test_stop_waits_for_the_step_in_progress_but_not_for_the_work(rig: Rig) -> None:
    delivering, go = threading.Event(), threading.Event()

    def hold_up() -> None:
        delivering.set()
        go.wait(SOON)

    rig.on_deliver = hold_up
    rig.add("a")
    assert delivering.wait(SOON)
    stopper = threading.Thread(target=rig.loop.stop)
    stopper.start()
    stopper.join(0.05)
    assert stopper.is_alive()
    go.set()
    stopper.join(SOON)
    assert not rig.loop.alive
    assert rig.loop.load.running == 1
    assert not rig.engine._in_flight, "the device still computes"


def test_a_loop_that_was_not_started_refuses_commands() -> None:
    loop = Rig().loop
    assert not loop.alive
    with pytest.raises(Unavailable):
        loop.tell(lambda _: None)
    loop.stop()


@dies
def test_commands_that_the_loop_did_not_live_to_see_fail(rig: Rig) -> None:
    delivering, go = threading.Event(), threading.Event()

    def break_down() -> None:
        delivering.set()
        go.wait(SOON)
        raise RuntimeError("the event loop is closed")

    rig.on_deliver = break_down
    rig.add("a")
    assert delivering.wait(SOON)
    futures = [rig.loop.tell(lambda scheduler: scheduler.load()) for _ in range(3)]
    futures[0].cancel()
    go.set()
    for future in futures[1:]:
        with pytest.raises(Unavailable):
            future.result(SOON)
    rig.wait_for_end()


def test_no_command_is_left_without_an_answer_when_the_loop_stops() -> None:
    for _ in range(20):
        rig = Rig()
        rig.loop.start()
        told = threading.Event()

        def tell_on(rig: Rig = rig, told: threading.Event = told) -> int:
            count = 0
            while True:
                try:
                    future = rig.loop.tell(lambda _: None)
                except Unavailable:
                    return count
                told.set()
                try:
                    future.result(SOON)
                except Unavailable:
                    return count
                count += 1

        with ThreadPoolExecutor(3) as threads:
            counts = [threads.submit(tell_on) for _ in range(3)]
            assert told.wait(SOON)
            rig.loop.stop()
            assert all(count.result(SOON) >= 0 for count in counts)


@dies
def test_a_lost_block_ends_the_loop(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "QUIET_SECONDS", 0.01)
    rig.loop.tell(lambda scheduler: scheduler.pool.allocate(1)).result(SOON)
    rig.wait_for_end()
    with pytest.raises(Unavailable):
        rig.loop.tell(lambda _: None)


def test_whole_books_do_not_end_the_loop(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "QUIET_SECONDS", 0.01)
    rig.add("a", role=Role.PREFILL)
    checked = threading.Semaphore(0)
    check = rig.bench.pool.check

    def check_and_tell(held: Iterable[int]) -> None:
        check(held)
        checked.release()

    monkeypatch.setattr(rig.bench.pool, "check", check_and_tell)
    for _ in range(3):
        assert checked.acquire(timeout=SOON)
    assert rig.loop.alive


def test_a_step_that_does_not_end_is_seen_from_outside(rig: Rig) -> None:
    computing, go_on = threading.Event(), threading.Event()

    def block(chunks: Items[Chunk]) -> bool:
        computing.set()
        go_on.wait(SOON)
        return False

    rig.refuse = block
    rig.add("a")
    assert computing.wait(SOON)
    first = rig.loop.step_seconds()
    time.sleep(0.01)
    assert rig.loop.step_seconds() > first > 0.0
    go_on.set()
    rig.wait_for(Finished, "a")
    eventually(lambda: rig.loop.step_seconds() == 0.0)  # the loop has delivered before it sleeps
