"""The bounded queue before the workers, whose state is in Redis.

    enter ──> WAITING ──promotion──> RUNNING ──finish──> FINISHED ──time──> forgotten
      │          └────────finish (never ran)───────────────┘
      └────────────────────────────> RUNNING if a slot is free and nobody waits

Several gateways can share one queue. Each knows by heart the requests that it holds, and `poll` makes Redis agree with
that: what a wiped Redis has forgotten is written again, what nobody holds any more is dropped.
"""

import asyncio
import contextlib
import enum
import hmac
import itertools
import json
import logging
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from kvrelay.control import queue_policy
from kvrelay.control.script import Script, Scripts
from kvrelay.errors import AlreadyExists, ResourceExhausted, Unavailable
from kvrelay.request import QueueStatus

__all__ = ["Admission", "ExistingRequest", "Outcome", "RequestQueue", "RequestState", "Verdict"]

_LOGGER = logging.getLogger(__name__)
# So that the same key may authenticate other things without one being taken for the other.
_MAC_PURPOSE = b"kvrelay request v1\0"
_GRACE_SECONDS = 3.0  # longer than any command is under way
_RESTORED_AT_ONCE = 256


class RequestState(enum.StrEnum):
    """Where a request is on its way."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Outcome(enum.StrEnum):
    """How a request ended. After FAILED and WITHDRAWN the same id and body may enter again, for nothing is replayed."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"
    WITHDRAWN = "withdrawn"  # before it ran


class Verdict(enum.Enum):
    """What `RequestQueue.enter` decided."""

    RUNNING = enum.auto()
    WAITING = enum.auto()
    EXISTING = enum.auto()


@dataclass(frozen=True, slots=True)
class ExistingRequest:
    """A request that entered before, with the same id and body.

    Attributes:
        gateway_id: who runs it or has run it.
        outcome: None unless it is finished.
    """

    state: RequestState
    gateway_id: str
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True)
class Admission:
    """The answer to `RequestQueue.enter`; `existing` is set for EXISTING alone."""

    verdict: Verdict
    existing: ExistingRequest | None = None


@dataclass(slots=True)
class _Held:
    """A request of this gateway, as Redis knows it. Its state is None until Redis has answered its entry."""

    digest: str
    rank: str
    state: RequestState | None = None


class RequestQueue:
    """One gateway's access to the queue; every operation is one round trip to Redis, shared with others.

    What is found in Redis and does not belong there is put aside and logged.

    Args:
        cluster_key: the secret that all processes of the cluster share; to others the digests in Redis tell nothing.
        gateway_id: unique among the gateways. A restarted gateway with the id of a dead one inherits nothing, and what
            that one had finished may run again, for its responses are lost.
        max_running: requests of all gateways that may run at once.
        max_waiting: requests of all gateways that may wait.
        replay_seconds: how long a finished request's id is remembered.
        lease_seconds: requests of a gateway that does not poll for so long are dropped by the others.
    """

    def __init__(
        self,
        redis: Redis,
        cluster_key: bytes,
        gateway_id: str,
        *,
        max_running: int,
        max_waiting: int,
        replay_seconds: float = 60.0,
        lease_seconds: float = 3.0,
    ) -> None:
        self._cluster_key = cluster_key
        self._gateway_id = gateway_id
        self._start = secrets.token_hex(8)
        self._max_running = max_running
        self._max_waiting = max_waiting
        # A poll on its way may name a request that has just finished; the record tells that it must not come back.
        self._remember_ms = int(max(replay_seconds, 2 * _GRACE_SECONDS) * 1000)
        self._lease_ms = int(lease_seconds * 1000)
        scripts = Scripts(redis)
        self._enter, self._finish, self._poll, self._restore = (
            scripts.load("queue", name) for name in ("enter", "finish", "poll", "restore")
        )
        self._status = scripts.load("status")
        self._held: dict[str, _Held] = {}
        self._joined = False
        self._joining = asyncio.Lock()
        self._window = itertools.count()

    async def enter(
        self, request_id: str, body_digest: str, priority: int, deadline_unix: float | None, now: float
    ) -> Admission:
        """Admits a request, or says what became of it before.

        Every id that was told RUNNING or WAITING must be given to `finish` once. If `enter` raises, the request is
        not held; what may be left of it in Redis goes by itself.

        Args:
            body_digest: equal for equal requests. Redis gets it keyed.
            priority: higher first.
            deadline_unix: seconds of Unix time; among equal priorities earlier first, None last.
            now: seconds of Unix time; among equals earlier first.

        Raises:
            AlreadyExists: the id was used for another body.
            ResourceExhausted: the waiting room is full; reason QUEUE_FULL, and when to try again.
            Unavailable: Redis cannot be reached.
        """
        digest = _keyed(body_digest, self._cluster_key)
        if request_id in self._held:
            return self._existing(self._held[request_id], digest)
        held = _Held(digest, queue_policy.rank(priority, deadline_unix, now))
        self._held[request_id] = held
        with contextlib.ExitStack() as unless_entered:
            unless_entered.callback(self._held.pop, request_id, None)
            verdict, *details = await self._ask_to_enter(request_id, held)
            admission = self._admission(held, verdict, details)
            if admission.verdict is not Verdict.EXISTING:
                unless_entered.pop_all()
        return admission

    async def finish(self, request_id: str, outcome: Outcome) -> list[str]:
        """Ends a request, waiting or running; an id that is not held is passed over.

        Returns:
            The ids of this gateway that may run now.

        Raises:
            Unavailable: Redis cannot be reached. The request is not held any more, and its slot becomes free later.
        """
        held = self._held.pop(request_id, None)
        if held is None:
            return []
        if held.state is not RequestState.RUNNING:
            outcome = Outcome.WITHDRAWN
        promoted = await self._call(
            self._finish,
            *(self._gateway_id, request_id, held.digest, held.rank, outcome, self._remember_ms, self._max_running),
            self._start,
        )
        return self._note_promoted(promoted[0])

    async def poll(self) -> list[str]:
        """Makes Redis agree with what this gateway holds; to be called two to four times a second.

        Returns:
            The ids of this gateway that may run now.

        Raises:
            Unavailable: Redis cannot be reached.
        """
        if not self._joined:
            await self._join()
        return await self._reconcile(_GRACE_SECONDS)

    async def status(self) -> QueueStatus:
        """Raises: Unavailable if Redis cannot be reached."""
        waiting, running = await self._status()
        return QueueStatus(waiting, running, self._max_running + self._max_waiting)

    async def _ask_to_enter(self, request_id: str, held: _Held) -> list[Any]:
        if not self._joined:
            await self._join()
        limits = (self._max_running, self._max_waiting)
        arguments = (self._gateway_id, request_id, held.digest, held.rank, *limits, self._start)
        reply = await self._call(self._enter, *arguments)
        if reply[0] == "unknown_gateway":
            # Redis was wiped: what runs must be counted again before anything new is admitted.
            await self._reconcile(_GRACE_SECONDS)
            reply = await self._call(self._enter, *arguments)
        return reply

    def _admission(self, held: _Held, verdict: str, details: list[Any]) -> Admission:
        match verdict:
            case "running" | "waiting":
                # A promotion may have overtaken the reply.
                if held.state is None:
                    held.state = RequestState(verdict)
                return Admission(Verdict.RUNNING if held.state is RequestState.RUNNING else Verdict.WAITING)
            case "existing":
                state, gateway_id, outcome = details
                existing = ExistingRequest(RequestState(state), gateway_id, Outcome(outcome) if outcome else None)
                return Admission(Verdict.EXISTING, existing)
            case "conflict":
                raise _id_reused()
            case "full":
                now, finishes = details
                delay = queue_policy.retry_after([int(time) / 1000 for time in finishes], now / 1000)
                message = f"The queue is full: {self._max_waiting} requests wait, which is the most."
                raise ResourceExhausted(message, reason="QUEUE_FULL", retry_after=delay)
        raise Unavailable("The queue state is being rebuilt; try again.", reason="REDIS_UNAVAILABLE", retry_after=1.0)

    def _existing(self, held: _Held, digest: str) -> Admission:
        if held.digest != digest:
            raise _id_reused()
        return Admission(Verdict.EXISTING, ExistingRequest(held.state or RequestState.WAITING, self._gateway_id))

    async def _join(self) -> None:
        """Drops what an earlier process of the same gateway id has left; nothing is entered before."""
        async with self._joining:
            if not self._joined:
                await self._reconcile(0.0)
                self._joined = True

    async def _reconcile(self, grace_seconds: float) -> list[str]:
        promoted, forgotten = await self._call(
            self._poll,
            *(self._gateway_id, self._max_running, self._lease_ms, int(grace_seconds * 1000), next(self._window)),
            *(json.dumps(self._ids(state)) for state in (RequestState.WAITING, RequestState.RUNNING)),
        )
        ids = self._note_promoted(promoted)
        if forgotten:
            ids += await self._restore_forgotten(forgotten)
        return ids

    async def _restore_forgotten(self, forgotten: Iterable[str]) -> list[str]:
        entries = [
            (request_id, held.digest, held.rank, held.state)
            for request_id in forgotten
            if (held := self._held.get(request_id)) and held.state
        ]
        _LOGGER.warning("Redis has forgotten %d requests; they are written again", len(entries))
        # What runs comes first, for only then it shows which slots are free.
        entries.sort(key=lambda entry: entry[3] is not RequestState.RUNNING)
        promoted: list[str] = []
        for first in range(0, len(entries), _RESTORED_AT_ONCE):
            part = json.dumps(entries[first : first + _RESTORED_AT_ONCE])
            is_last = int(first + _RESTORED_AT_ONCE >= len(entries))
            reply = await self._call(self._restore, self._gateway_id, self._max_running, is_last, part)
            promoted += self._note_promoted(reply[0])
        return promoted

    def _ids(self, state: RequestState) -> list[str]:
        return [request_id for request_id, held in self._held.items() if held.state is state]

    def _note_promoted(self, request_ids: Iterable[str]) -> list[str]:
        """Those that the caller must be told of: each once, and none whose entry has not been answered yet."""
        told: list[str] = []
        for request_id in request_ids:
            held = self._held.get(request_id)
            if held is not None and held.state is not RequestState.RUNNING:
                if held.state is RequestState.WAITING:
                    told.append(request_id)
                held.state = RequestState.RUNNING
        return told

    async def _call(self, script: Script, *arguments: str | int) -> list[Any]:
        reply: list[Any] = await script(*arguments)
        for key in reply[0]:
            _LOGGER.error("%r in Redis was malformed; it has been put aside", key)
        return reply[1:]


def _keyed(body_digest: str, cluster_key: bytes) -> str:
    return hmac.digest(cluster_key, _MAC_PURPOSE + body_digest.encode(), "sha256").hex()


def _id_reused() -> AlreadyExists:
    return AlreadyExists("request_id: has been used for another request", reason="REQUEST_ID_REUSED")
