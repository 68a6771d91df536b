"""Lua scripts: what Redis does in one step; those that are due at the same time go in one round trip.

The scripts lie in the folder `scripts`; they alone know the names of the keys. All keys begin with `kvrelay:`, and a
script finds some of them by itself, so Redis must be one server (or primary), not a cluster.
"""

import asyncio
import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from kvrelay.control.connection import redis_errors_as_unavailable

__all__ = ["Script", "Scripts"]

_CALLS_AT_ONCE = 128  # so that Redis serves others in between


class Scripts:
    """Calls scripts, one pipeline at a time: what is called while one is under way goes with the next.

    A call that is cancelled may still be carried out. When Redis fails, everything that is due fails, so nobody waits
    longer than for two pipelines.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._due: deque[_Call] = deque()
        self._sender: asyncio.Task[None] | None = None

    def load(self, *names: str) -> "Script":
        """A script made of files of the folder `scripts`, named without suffix and joined in this order."""
        return Script(self, "\n".join(_read(name) for name in names))

    async def call(self, script: "Script", arguments: Sequence[str | int]) -> Any:
        """The script's reply.

        Raises:
            Unavailable: Redis did not answer or refused.
        """
        call = _Call(script, arguments)
        self._due.append(call)
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send_due(), name="Redis scripts")
        with redis_errors_as_unavailable():
            return await call.reply

    async def _send_due(self) -> None:
        while self._due:
            calls = [self._due.popleft() for _ in range(min(len(self._due), _CALLS_AT_ONCE))]
            calls = [call for call in calls if not call.reply.done()]
            try:
                replies = await self._send(calls)
            except Exception as error:
                # Whatever it is belongs to the callers; they would wait for ever if it ended here.
                calls += self._due
                self._due.clear()
                replies = [error] * len(calls)
            for call, reply in zip(calls, replies, strict=True):
                call.settle(reply)

    async def _send(self, calls: "list[_Call]") -> list[Any]:
        """The replies, among them the errors of single calls."""
        replies = await self._pipeline(calls)
        unknown = [index for index, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unknown:
            for text in {calls[index].script.text for index in unknown}:
                await self._redis.script_load(text)
            repeated = await self._pipeline([calls[index] for index in unknown])
            for index, reply in zip(unknown, repeated, strict=True):
                replies[index] = reply
        return replies

    async def _pipeline(self, calls: "list[_Call]") -> list[Any]:
        async with self._redis.pipeline(transaction=False) as pipeline:
            for call in calls:
                pipeline.evalsha(call.script.digest, 0, *call.arguments)
            return list(await pipeline.execute(raise_on_error=False))


class Script:
    """A script that can be called; the server knows it by its digest.

    Attributes:
        digest: SHA-1, as Redis defines it.
    """

    def __init__(self, scripts: Scripts, text: str) -> None:
        self._scripts = scripts
        self.text = text
        self.digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    async def __call__(self, *arguments: str | int) -> Any:
        """As `Scripts.call`."""
        return await self._scripts.call(self, arguments)


@dataclass(frozen=True, slots=True)
class _Call:
    script: Script
    arguments: Sequence[str | int]
    reply: asyncio.Future[Any] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def settle(self, reply: Any) -> None:
        if self.reply.done():
            return
        if isinstance(reply, Exception):
            self.reply.set_exception(reply)
        else:
            self.reply.set_result(reply)


def _read(name: str) -> str:
    return resources.files("kvrelay.control").joinpath("scripts", f"{name}.lua").read_text("utf-8")
