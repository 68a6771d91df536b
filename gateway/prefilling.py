"""A prompt on its prefill worker, from the ticket to the end of what the ticket opens."""

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType

from gateway.reservation import Reservation
from kvrelay.errors import Internal
from kvrelay.v1 import worker_pb2

__all__ = ["Prefilling"]


class Prefilling:
    """A Prefill call that has brought its ticket, read to its end inside the context.

    The call lasts for as long as the worker holds the blocks, so any decode worker can take them over until then.

    Args:
        responses: those that follow the ticket.
        reservation: due with the next of them.

    Attributes:
        first_token: or the KvrelayError that came instead.
    """

    def __init__(
        self, ticket: bytes, responses: AsyncIterator[worker_pb2.PrefillResponse], reservation: Reservation
    ) -> None:
        self.ticket = ticket
        self.first_token: asyncio.Future[worker_pb2.FirstToken] = asyncio.get_running_loop().create_future()
        self._responses = responses
        self._reservation = reservation
        self._reading = asyncio.create_task(self._read())

    @property
    def held(self) -> bool:
        """Whether the ticket opens something, as far as is known here."""
        return not self._reading.done()

    def give_back(self) -> None:
        """Nobody comes for the ticket any more: the worker frees what it opens."""
        self._reading.cancel()

    async def __aenter__(self) -> "Prefilling":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._reading.cancel()
        await asyncio.wait([self._reading])
        if not self.first_token.cancel():
            self.first_token.exception()  # nobody misses it, if the decode worker failed first

    async def _read(self) -> None:
        error: Exception = Internal("the prefill worker ended its call without a token")
        try:
            async for response in self._responses:
                self._reservation.make_due()
                if response.HasField("first_token"):
                    self.first_token.set_result(response.first_token)
        except Exception as failure:  # after the first token it says no more than that nothing is held
            error = failure
        if not self.first_token.done():
            self.first_token.set_exception(error)
