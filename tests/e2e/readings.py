"""Requests that are read in threads of their own while things go wrong, and what must have come in the end."""

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from random import Random
from typing import TypedDict, Unpack

from kvrelay import Client
from kvrelay.client import GenerateOptions
from kvrelay.errors import KvrelayError
from kvrelay.request import Chunk, FinishReason
from tests.checkpoints import VOCAB_SIZE
from tests.patience import eventually

LENGTH = 1500  # tokens of a completion that is seen while it runs
LATE_LENGTH = 50
NUM_LATE = 8  # requests, so that some go to a silent worker however much the other has done meanwhile
PROMPT = [17, 4, 99, 256, 31, 8]
ids = itertools.count()


class Greedy(TypedDict):
    """What all requests here have in common; how long they run is said by each."""

    token_ids: list[int]
    temperature: float
    ignore_eos: bool


GREEDY: Greedy = {"token_ids": PROMPT, "temperature": 0, "ignore_eos": True}


class Reading:
    """A request whose responses are read in a thread of its own."""

    def __init__(self, client: Client, **options: Unpack[GenerateOptions]) -> None:
        self.request_id = options.setdefault("request_id", f"reading-{next(ids)}")
        self.max_tokens = options["max_tokens"]
        self.chunks: list[Chunk] = []
        self.error: KvrelayError | None = None
        self.ended_at = 0.0
        self._stream = client.generate(**options)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            for chunk in self._stream:
                self.chunks.append(chunk)
        except KvrelayError as error:
            self.error = error
        self.ended_at = time.monotonic()

    @property
    def token_ids(self) -> list[int]:
        return [token_id for chunk in list(self.chunks) for token_id in chunk.token_ids]

    @property
    def ended(self) -> bool:
        return self.ended_at > 0.0

    def wait(self, seconds: float = 60.0) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), "the request hangs"

    def cancel(self) -> None:
        self._stream.close()
        self.wait()


@contextlib.contextmanager
def running(client: Client, count: int) -> Iterator[list[Reading]]:
    """So many equal requests, each of which has had tokens already."""
    readings = [Reading(client, **GREEDY, max_tokens=LENGTH) for _ in range(count)]
    try:
        eventually(lambda: all(len(reading.token_ids) > 2 for reading in readings), 30, "all requests run")
        yield readings
    finally:
        for reading in readings:
            reading.cancel()


def late_requests(client: Client) -> list[Reading]:
    """Requests that have their first token; where their decode worker is silent, they have no other."""
    readings = [Reading(client, **GREEDY, max_tokens=LATE_LENGTH) for _ in range(NUM_LATE)]
    eventually(lambda: all(reading.token_ids for reading in readings), 30, "all first tokens")
    return readings


def check_complete(readings: Sequence[Reading]) -> None:
    """Each was read to its end; nothing is missing, doubled or different."""
    for reading in readings:
        reading.wait()
        assert reading.error is None
        assert reading.chunks[-1].finish_reason is FinishReason.LENGTH
        assert [chunk.seq for chunk in reading.chunks] == list(range(1, len(reading.chunks) + 1))
        assert len(reading.token_ids) == reading.max_tokens
    check_agree(readings)


def check_agree(readings: Sequence[Reading]) -> None:
    """As far as each has come, all have had the same tokens."""
    longest = max((reading.token_ids for reading in readings), key=len)
    assert all(reading.token_ids == longest[: len(reading.token_ids)] for reading in readings)


def on_worker(client: Client, worker_id: str) -> set[str]:
    """The requests that hold blocks there."""
    return {entry.request_id for entry in client.held_blocks() if entry.worker_id == worker_id}


def a_long_prompt(client: Client) -> Reading:
    """One of which nothing is cached."""
    random = Random(next(ids))
    prompt = [random.randrange(3, VOCAB_SIZE) for _ in range(4000)]
    return Reading(client, token_ids=prompt, max_tokens=3, ignore_eos=True)


def num_unfinished(readings: Sequence[Reading]) -> int:
    return sum(not reading.ended for reading in readings)
