"""The cluster as a whole: what the registry says, completed by what the workers themselves answer."""

import asyncio
import dataclasses

from gateway.admission import Admission
from gateway.fleet import Connection, Fleet
from kvrelay import wire
from kvrelay.control.directory import WorkerDirectory
from kvrelay.control.membership import WorkerEntry
from kvrelay.errors import KvrelayError
from kvrelay.request import GatewayStatus, LinkStatus, Model, WorkerState, WorkerStatus
from kvrelay.rpc import is_being_cancelled
from kvrelay.v1 import inference_pb2, worker_pb2

__all__ = ["ClusterView"]

ANSWER_SECONDS = 1.0


class ClusterView:
    """Answers the questions about the cluster."""

    def __init__(self, directory: WorkerDirectory, fleet: Fleet, admission: Admission) -> None:
        self._directory = directory
        self._fleet = fleet
        self._admission = admission

    def models(self) -> tuple[Model, ...]:
        """The models that can be asked for, with what the least of their workers can take."""
        found: dict[str, Model] = {}
        for entry in self._fleet.entries():
            model = entry.record.model
            least = min(model.context_length, found[model.id].context_length if model.id in found else 1 << 31)
            found[model.id] = Model(model.id, model.architecture, least, model.vocab_size)
        return tuple(found.values()) if self._fleet.ready else ()

    async def status(self) -> inference_pb2.GetClusterStatusResponse:
        """Raises: Unavailable if Redis, which has the queue, cannot be reached."""
        workers = [
            answer.status if answer is not None else wire.worker_status_to_proto(_silent(entry))
            for entry, answer in await self._ask_workers()
        ]
        gateways = [
            GatewayStatus(record.gateway_id, record.address, record.pid)
            for record in self._directory.gateways().values()
        ]
        return inference_pb2.GetClusterStatusResponse(
            workers=workers,
            gateways=[wire.gateway_status_to_proto(gateway) for gateway in gateways],
            queue=wire.queue_status_to_proto(await self._admission.status()),
        )

    async def held_blocks(self) -> inference_pb2.ListHeldBlocksResponse:
        """Of the workers that answer."""
        answers = [answer for _, answer in await self._ask_workers() if answer is not None]
        return inference_pb2.ListHeldBlocksResponse(held=[entry for answer in answers for entry in answer.held])

    async def _ask_workers(self) -> list[tuple[WorkerEntry, worker_pb2.GetStatusResponse | None]]:
        """Every worker of the registry, with its answer if it gives one."""
        entries = [entry for _, entry in sorted(self._directory.snapshot().items())]
        connections = self._fleet.connections()
        answers = await asyncio.gather(*(_ask(connections.get(entry.record.worker_id)) for entry in entries))
        return list(zip(entries, answers, strict=True))


async def _ask(connection: Connection | None) -> worker_pb2.GetStatusResponse | None:
    if connection is None:
        return None
    try:
        return await connection.status(ANSWER_SECONDS)
    except KvrelayError:
        return None
    except asyncio.CancelledError:
        if is_being_cancelled():
            raise
        return None


def _silent(entry: WorkerEntry) -> WorkerStatus:
    """A worker that does not answer, as its last heartbeat showed it."""
    record, load = entry.record, entry.load
    return WorkerStatus(
        id=record.worker_id,
        role=record.role,
        pid=record.pid,
        address=record.address,
        epoch=record.epoch,
        state=WorkerState.UNREACHABLE,
        running=load.running,
        waiting=load.waiting,
        blocks_total=load.blocks_total,
        blocks_free=load.blocks_free,
        blocks_held=load.blocks_total - load.blocks_free,
        memory_bytes=0,
        links=tuple(LinkStatus(**dataclasses.asdict(link)) for link in load.links),
    )
