"""How a cluster and its workers begin and end: drains, signals, restarts, and what is left behind."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

import pytest

from kvrelay import Client
from kvrelay.client import Stream
from kvrelay.errors import KvrelayError, Unavailable
from kvrelay.request import FinishReason, WorkerState
from tests.e2e.cluster import START_SECONDS, STOP_SECONDS, Cluster, start_cluster
from tests.e2e.processes import clean_environment, descendants, is_alive, kvrelay, silent, worker_process
from tests.patience import eventually

LENGTH = 4000  # of a completion that runs for seconds


class Greedy(TypedDict):
    """What all requests here have in common; how long they run is said by each."""

    token_ids: list[int]
    temperature: float
    ignore_eos: bool


GREEDY: Greedy = {"token_ids": [17, 4, 99, 256, 31, 8], "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def one_and_two(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One prefill and two decode workers."""
    run_dir = tmp_path_factory.mktemp("lifecycle") / "run"
    with start_cluster(run_dir, tiny_llama, prefill=1, decode=2, num_blocks=512) as cluster:
        yield cluster


@contextlib.contextmanager
def launched(folder: Path, model: Path, run_dir: Path | None = None) -> Iterator["subprocess.Popen[str]"]:
    """`kvrelay up`, one and one, on a free port; `folder` takes what it prints and its temporary files."""
    options = {"--model": model, "--port": 0, "--num-blocks": 512, "--disaggregation": "always"}
    options |= {"--run-dir": run_dir} if run_dir else {}
    command = [sys.executable, "-m", "kvrelay", "up", *(str(word) for pair in options.items() for word in pair)]
    environment = clean_environment(TMPDIR=str(folder))
    with (folder / "up.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def printed(folder: Path, process: "subprocess.Popen[str]", pattern: str) -> str:
    """The pattern's group, once that has been printed."""

    def search() -> re.Match[str] | None:
        return re.search(pattern, (folder / "up.log").read_text())

    eventually(lambda: search() or process.poll() is not None, START_SECONDS, pattern)
    found = search()
    assert found is not None, (folder / "up.log").read_text()
    return found[1]


@contextlib.contextmanager
def up(folder: Path, model: Path, run_dir: Path | None = None) -> Iterator[Cluster]:
    """A ready cluster that the test itself ends. `Cluster.run_dir` names what it has made if none is given."""
    with launched(folder, model, run_dir) as process:
        made = Path(printed(folder, process, "logs are in (.*)/logs"))
        port = int(printed(folder, process, r"ready after \S+ s: 127\.0\.0\.1:(\d+) "))
        cluster = Cluster(made, port, process, 2)
        cluster.wait_ready()
        yield cluster


@contextlib.contextmanager
def a_running_request(client: Client) -> Iterator[Stream]:
    with client.generate(**GREEDY, max_tokens=LENGTH) as stream:
        next(stream)
        yield stream


def check_finishes(stream: Stream) -> None:
    last = list(stream)[-1]
    assert last.finish_reason is FinishReason.LENGTH
    assert last.usage is not None
    assert last.usage.completion_tokens == LENGTH


def error_of_a_request(client: Client, max_tokens: int = 2) -> KvrelayError | None:
    try:
        client.complete(**GREEDY, max_tokens=max_tokens, timeout=10)
    except KvrelayError as error:
        return error
    return None


def check_nothing_is_left(processes: list[int]) -> None:
    eventually(lambda: not any(map(is_alive, processes)), 2.0, "all processes are gone")


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(tiny_llama: Path, tmp_path: Path) -> None:
    shared_memory = set(Path("/dev/shm").iterdir())
    with up(tmp_path, tiny_llama) as cluster, cluster.client() as client:
        assert cluster.run_dir.parent == tmp_path
        processes = descendants(cluster.process.pid)
        assert len(processes) >= 4  # Redis, a gateway, two workers
        decode = cluster.pid("decode-0")
        with a_running_request(client) as stream:
            with silent(decode):  # the request cannot end before new ones are refused
                cluster.process.send_signal(signal.SIGTERM)
                # One token, for which no decode worker is needed.
                eventually(lambda: error_of_a_request(client, 1) is not None, 5, "new requests are refused")
                error = error_of_a_request(client, 1)
            assert isinstance(error, Unavailable)
            assert error.reason == "DRAINING"
            check_finishes(stream)
        assert cluster.process.wait(STOP_SECONDS) == 0
        check_nothing_is_left(processes)
    assert [path.name for path in tmp_path.iterdir()] == ["up.log"]
    assert set(Path("/dev/shm").iterdir()) <= shared_memory


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_an_end_before_the_beginning(number: int, exit_code: int, tiny_llama: Path, tmp_path: Path) -> None:
    with launched(tmp_path, tiny_llama) as process:
        printed(tmp_path, process, "(logs) are in")
        processes = descendants(process.pid)
        process.send_signal(number)
        assert process.wait(STOP_SECONDS) == exit_code
        check_nothing_is_left(processes)
    assert [path.name for path in tmp_path.iterdir()] == ["up.log"]


def test_a_run_directory_serves_again_after_any_end(one_and_two: Cluster, tiny_llama: Path, tmp_path: Path) -> None:
    """Beside another cluster, which notices nothing."""
    neighbours = [(worker.id, worker.pid) for worker in one_and_two.status().workers]
    run_dir = tmp_path / "run"
    with up(tmp_path, tiny_llama, run_dir) as cluster, cluster.client() as client:
        expected = client.complete(**GREEDY, max_tokens=20).token_ids
        cluster.process.send_signal(signal.SIGINT)
        assert cluster.process.wait(STOP_SECONDS) == 130
    assert (run_dir / "logs").is_dir()

    with up(tmp_path, tiny_llama, run_dir) as cluster, cluster.client() as client:
        assert client.complete(**GREEDY, max_tokens=20).token_ids == expected
        processes = descendants(cluster.process.pid)
        assert len(processes) >= 4
        with a_running_request(client) as stream:
            cluster.process.kill()
            check_nothing_is_left(processes)
            with pytest.raises(Unavailable):
                list(stream)

    with up(tmp_path, tiny_llama, run_dir) as cluster, cluster.client() as client, one_and_two.client() as other:
        assert client.complete(**GREEDY, max_tokens=20).token_ids == expected
        assert other.complete(**GREEDY, max_tokens=20).token_ids == expected
        assert {worker.pid for worker in cluster.status().workers}.isdisjoint(pid for _, pid in neighbours)
        assert cluster.stop() == 0
    assert [(worker.id, worker.pid) for worker in one_and_two.status().workers] == neighbours


def test_a_drained_decode_worker_hands_its_sequences_over(one_and_two: Cluster) -> None:
    """They end on the other worker, with the tokens that they would have had, long before the drain's time is up."""
    with one_and_two.client() as client:
        expected = client.complete(**GREEDY, max_tokens=LENGTH).token_ids
        with a_running_request(client) as stream:
            held = next(entry for entry in client.held_blocks() if entry.worker_id.startswith("decode"))
            before = {worker.id: worker.epoch for worker in one_and_two.status().workers}
            pid = one_and_two.kill(held.worker_id, signal.SIGTERM)
            # The worker ends while the request runs on.
            eventually(lambda: not is_alive(pid), STOP_SECONDS, "the worker has left")
            assert client.status().queue.running == 1
            chunks = list(stream)
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == LENGTH
        token_ids = [token_id for chunk in chunks for token_id in chunk.token_ids]
        assert token_ids == list(expected)[-len(token_ids) :]

        def is_back() -> bool:
            workers = {worker.id: worker for worker in one_and_two.status().workers}
            return held.worker_id in workers and workers[held.worker_id].epoch > before[held.worker_id]

        eventually(is_back, START_SECONDS, "the worker starts anew")
    one_and_two.wait_ready()
    one_and_two.wait_whole()


def test_a_rolling_restart_costs_no_client_an_error(one_and_two: Cluster) -> None:
    """Every worker is another process afterwards, also the only prefill worker; requests waited for it."""
    before = {worker.id: worker.pid for worker in one_and_two.status().workers}
    stop = threading.Event()

    def ask(length: int) -> list[int]:
        answers = []
        with one_and_two.client() as client:
            while not stop.is_set():
                answers.append(len(client.complete(**GREEDY, max_tokens=length).token_ids))
        return answers

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, length) for length in (3, 40, 300, 3000)]
        try:
            result = kvrelay("restart", "--rolling", "--target", one_and_two.target, seconds=2 * START_SECONDS)
        finally:
            stop.set()
        for length, answers in zip((3, 40, 300, 3000), asking, strict=True):
            lengths = answers.result(60.0)
            assert lengths
            assert set(lengths) == {length}
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("is ready again") == 3
    after = {worker.id: worker.pid for worker in one_and_two.status().workers}
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values())
    one_and_two.wait_whole()


def test_sigterm_drains_one_worker_and_costs_no_request(one_and_two: Cluster) -> None:
    with one_and_two.client() as client, a_running_request(client) as stream:
        epochs = {worker.id: worker.epoch for worker in one_and_two.status().workers}
        worker_id = next(entry.worker_id for entry in client.held_blocks() if entry.worker_id.startswith("decode"))
        one_and_two.kill(worker_id, signal.SIGTERM)

        def state() -> WorkerState:
            return next(worker.state for worker in one_and_two.status().workers if worker.id == worker_id)

        while (now := state()) is WorkerState.READY:
            assert error_of_a_request(client) is None
        assert now is WorkerState.DRAINING
        assert [error_of_a_request(client) for _ in range(10)] == [None] * 10
        check_finishes(stream)

    with one_and_two.client() as client:

        def restarted() -> bool:
            assert error_of_a_request(client) is None
            workers = {worker.id: worker for worker in one_and_two.status().workers}
            return worker_id in workers and workers[worker_id].epoch > epochs[worker_id]

        eventually(restarted, START_SECONDS, f"{worker_id} is restarted")
    one_and_two.wait_ready()
    one_and_two.wait_whole()


def test_a_worker_that_keeps_dying_is_restarted_ever_more_slowly(one_and_two: Cluster) -> None:
    one_and_two.wait_ready()
    log = one_and_two.run_dir.parent / f"{one_and_two.run_dir.name}.up.log"

    def kill_the_next(former: int | None) -> int:
        eventually(lambda: worker_process(one_and_two.run_dir, "prefill-0") not in (None, former), 20, "a restart")
        pid = worker_process(one_and_two.run_dir, "prefill-0")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        return pid

    pid, times = None, []
    for _ in range(3):
        pid = kill_the_next(pid)
        times.append(time.monotonic())
    pauses = re.findall(r"prefill-0 ended \(killed by SIGKILL\); again in (\S+) s", log.read_text())
    assert pauses[:2] == ["0.5", "1.0"]
    assert times[1] - times[0] >= 0.5
    assert times[2] - times[1] >= 1.0
    one_and_two.wait_ready()
    one_and_two.wait_whole()
