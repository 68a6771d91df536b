"""The gateway's connections: one to each start of each worker, known to be up or down without being asked."""

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from typing import Protocol

import grpc
from grpc import aio

from kvrelay.control.directory import WorkerDirectory
from kvrelay.control.membership import WorkerEntry
from kvrelay.control.registry import WorkerRecord
from kvrelay.errors import Internal, KvrelayError, Unavailable
from kvrelay.request import WorkerRole, WorkerState
from kvrelay.rpc import is_being_cancelled, open_channel, translated
from kvrelay.v1 import worker_pb2, worker_pb2_grpc

__all__ = ["Connection", "Fleet", "TokenSink"]

log = logging.getLogger(__name__)

RECONNECT_SECONDS = 0.1
ANSWER_SECONDS = 0.5
# Of all connections and, as far as chance allows, of a former gateway of this name: what still arrives of a connection
# that was given up names no call of another.
_HANDLES = itertools.count(secrets.randbits(32))


class TokenSink(Protocol):
    """Where the tokens of one sequence go."""

    def take(self, tokens: worker_pb2.SequenceTokens) -> None:
        """Tokens have come."""

    async def wait_for(self, num_tokens: int) -> None:
        """Until it has had so many tokens, or wants no more."""


class Connection:
    """One start of one worker.

    Args:
        on_change: called when it comes up or goes down.
    """

    def __init__(self, record: WorkerRecord, gateway_id: str, on_change: Callable[[], None]) -> None:
        self.record = record
        self._gateway_id = gateway_id
        self._on_change = on_change
        self._channel = open_channel(record.address)
        self._prefill = worker_pb2_grpc.PrefillServiceStub(self._channel)
        self._decode = worker_pb2_grpc.DecodeServiceStub(self._channel)
        self._worker = worker_pb2_grpc.WorkerServiceStub(self._channel)
        self._calls: dict[int, tuple[TokenSink, asyncio.Future[None]]] = {}
        self._up = False
        watch = self._read_frames if record.role is WorkerRole.DECODE else self._watch_channel
        self._watcher = asyncio.create_task(watch(), name=f"connection to {record.worker_id}")

    @property
    def up(self) -> bool:
        return self._up

    @property
    def start(self) -> tuple[str, int]:
        """Which start of which worker it leads to."""
        return self.record.worker_id, self.record.epoch

    async def close(self) -> None:
        """Ends all calls."""
        self._watcher.cancel()
        await asyncio.wait([self._watcher])
        self._set_up(False)
        await self._channel.close(None)

    async def status(self, timeout: float) -> worker_pb2.GetStatusResponse:
        """Raises: KvrelayError if the worker does not answer."""
        self._require_up()
        with translated():
            return await self._worker.GetStatus(worker_pb2.GetStatusRequest(), timeout=timeout)

    @contextlib.asynccontextmanager
    async def prefill(
        self, sequence: worker_pb2.SequenceSpec, timeout: float | None, announce_last_chunk: bool = False
    ) -> AsyncIterator[AsyncIterator[worker_pb2.PrefillResponse]]:
        """A Prefill call's responses. Leaving the context frees what the worker still holds for it.

        Raises:
            Unavailable: the worker was lost.
            KvrelayError: what the worker said.
        """
        request = worker_pb2.PrefillRequest(
            sequence=sequence,
            worker_epoch=self.record.epoch,
            announce_last_chunk=announce_last_chunk,
            gateway_id=self._gateway_id,
        )
        with self._blamed("prefill"):
            self._require_up()
            call = self._prefill.Prefill(request, timeout=timeout)
        try:
            yield self._responses(call)
        finally:
            call.cancel()

    async def _responses(
        self, call: "aio.UnaryStreamCall[worker_pb2.PrefillRequest, worker_pb2.PrefillResponse]"
    ) -> AsyncIterator[worker_pb2.PrefillResponse]:
        with self._blamed("prefill"):
            try:
                async for response in call:
                    yield response
            except asyncio.CancelledError:
                if is_being_cancelled():
                    raise
                raise Unavailable("the connection was closed") from None

    async def decode(
        self, sequence: worker_pb2.SequenceSpec, ticket: bytes, timeout: float | None, sink: TokenSink
    ) -> worker_pb2.DecodeResponse:
        """Decodes to the end, when the sink has had all tokens. Without a ticket it computes the prompt, too.

        Raises:
            Unavailable: the worker was lost.
            KvrelayError: what the worker said.
        """
        handle = next(_HANDLES) % (1 << 32)
        request = worker_pb2.DecodeRequest(
            sequence=sequence,
            ticket=ticket,
            gateway_id=self._gateway_id,
            handle=handle,
            worker_epoch=self.record.epoch,
        )
        with self._blamed("decode"):
            self._require_up()
            call = self._decode.Decode(request, timeout=timeout)
        lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._calls[handle] = (sink, lost)
        answer = asyncio.create_task(_all_of_it(call, sink))
        try:
            with self._blamed("decode"):
                await asyncio.wait((answer, lost), return_when=asyncio.FIRST_COMPLETED)
                if lost.done():
                    lost.result()
                # The end of the frames may overtake the answer of a worker that drains.
                await asyncio.wait((answer,), timeout=ANSWER_SECONDS)
                # gRPC cancels the calls of a channel that is closed, which is not this task's own cancellation.
                if not answer.done() or answer.cancelled():
                    raise Unavailable("the stream of tokens broke")
                return answer.result()
        finally:
            answer.cancel()
            call.cancel()
            del self._calls[handle]

    def _require_up(self) -> None:
        """A call of a channel that is closed is an error of gRPC's own; of frames that do not come, none at all."""
        if not self._up:
            raise Unavailable("the connection is down")

    @contextlib.contextmanager
    def _blamed(self, stage: str) -> Iterator[None]:
        """Errors name the stage and the worker."""
        try:
            with translated():
                yield
        except Unavailable as error:
            reason = "WORKER_DRAINING" if error.reason == "DRAINING" else "WORKER_LOST"
            raise Unavailable(
                f"{stage} worker {self.record.worker_id} was lost; the request can be sent again",
                reason=reason,
                metadata={"stage": stage, "worker": self.record.worker_id},
                retry_after=1.0,
            ) from error
        except KvrelayError as error:
            error.metadata.update(stage=stage, worker=self.record.worker_id)
            raise

    async def _read_frames(self) -> None:
        """Keeps the stream of frames open; the connection is up while it stands."""
        request = worker_pb2.StreamFramesRequest(gateway_id=self._gateway_id, worker_epoch=self.record.epoch)
        while True:
            try:
                async for frame in self._decode.StreamFrames(request):
                    self._set_up(True)
                    for tokens in frame.sequences:
                        self._deliver(tokens)
            except aio.AioRpcError as error:
                log.debug("frames of %s: %s", self.record.worker_id, error.code())
            except Exception:
                log.exception("frames of %s cannot be read", self.record.worker_id)
            self._set_up(False)
            await asyncio.sleep(RECONNECT_SECONDS)

    def _deliver(self, tokens: worker_pb2.SequenceTokens) -> None:
        sink, lost = self._calls.get(tokens.handle, (None, None))
        if sink is None or lost is None or lost.done():
            return
        try:
            sink.take(tokens)
        except Exception:  # which is one request's own
            log.exception("tokens of %s cannot be taken", self.record.worker_id)
            lost.set_exception(Internal("the gateway failed to take the request's tokens"))

    async def _watch_channel(self) -> None:
        state = self._channel.get_state(try_to_connect=True)
        while True:
            self._set_up(state is grpc.ChannelConnectivity.READY)
            await self._channel.wait_for_state_change(state)
            state = self._channel.get_state(try_to_connect=True)

    def _set_up(self, up: bool) -> None:
        if up == self._up:
            return
        self._up = up
        log.info("%s is %s", self.record.worker_id, "up" if up else "down")
        if not up:
            for _, lost in self._calls.values():
                if not lost.done():
                    lost.set_result(None)
        self._on_change()


async def _all_of_it(
    call: "aio.UnaryUnaryCall[worker_pb2.DecodeRequest, worker_pb2.DecodeResponse]", sink: TokenSink
) -> worker_pb2.DecodeResponse:
    """The answer may overtake the last frames, which come by another stream."""
    response = await call
    await sink.wait_for(response.completion_tokens)
    return response


class Fleet:
    """Follows the registry: connects to workers that come, lets go of those that left.

    Args:
        model_id: workers that serve another model are passed over.
        roles: of which a worker each must be up for a request to be served.
    """

    def __init__(
        self,
        directory: WorkerDirectory,
        gateway_id: str,
        model_id: str,
        roles: Collection[WorkerRole] = (WorkerRole.PREFILL, WorkerRole.DECODE),
    ) -> None:
        self._directory = directory
        self._gateway_id = gateway_id
        self._model_id = model_id
        self._roles = frozenset(roles)
        self._connections: dict[str, Connection] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        directory.on_change(self._follow)

    def connection(self, worker_id: str) -> Connection:
        """Raises: Unavailable if the worker has just left."""
        connection = self._connections.get(worker_id)
        if connection is None:
            raise Unavailable(f"worker {worker_id} has left", reason="WORKER_LOST", retry_after=1.0)
        return connection

    def connections(self) -> Mapping[str, Connection]:
        return self._connections

    def entries(self) -> list[WorkerEntry]:
        """The workers that are up, as the registry last saw them."""
        entries = self._directory.snapshot()
        return [entries[name] for name, connection in self._connections.items() if connection.up and name in entries]

    @property
    def ready(self) -> bool:
        """Whether a request could be served: one worker of each role that is needed is up."""
        return {entry.record.role for entry in self.entries()} >= self._roles

    async def wait_for_change(self) -> None:
        """Until a worker comes, goes, or is up or down."""
        await self._changed.wait()

    async def close(self) -> None:
        for worker_id in list(self._connections):
            self._let_go(worker_id)
        await asyncio.gather(*self._closing)

    def _follow(self) -> None:
        snapshot = self._directory.snapshot()
        wanted = {worker_id: entry for worker_id, entry in snapshot.items() if self._wants(entry)}
        for worker_id, connection in list(self._connections.items()):
            if worker_id not in wanted or wanted[worker_id].record.epoch != connection.record.epoch:
                self._let_go(worker_id)
        for worker_id, entry in wanted.items():
            if worker_id not in self._connections:
                self._connections[worker_id] = Connection(entry.record, self._gateway_id, self._notify)
        self._notify()

    def _wants(self, entry: WorkerEntry) -> bool:
        # The calls of a worker that is stuck end with its connection, and their requests go on elsewhere.
        return entry.record.model.id == self._model_id and entry.load.state is not WorkerState.STUCK

    def _let_go(self, worker_id: str) -> None:
        task = asyncio.create_task(self._connections.pop(worker_id).close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
