"""The cluster as a client sees it."""

from kvrelay.request import (
    ClusterStatus,
    GatewayStatus,
    HeldBlocks,
    LinkStatus,
    Model,
    QueueStatus,
    WorkerRole,
    WorkerState,
    WorkerStatus,
)
from kvrelay.v1 import inference_pb2
from kvrelay.wire.mirror import fields, mirror

__all__ = [
    "cluster_status_from_proto",
    "gateway_status_to_proto",
    "held_blocks_from_proto",
    "held_blocks_to_proto",
    "models_from_proto",
    "models_to_proto",
    "queue_status_to_proto",
    "worker_status_to_proto",
]

_ROLES = {inference_pb2.WorkerRole.Value(f"WORKER_ROLE_{role.name}"): role for role in WorkerRole}
_STATES = {inference_pb2.WorkerState.Value(f"WORKER_STATE_{state.name}"): state for state in WorkerState}
_ROLES_BACK = {role: value for value, role in _ROLES.items()}
_STATES_BACK = {state: value for value, state in _STATES.items()}


def models_to_proto(models: tuple[Model, ...]) -> inference_pb2.ListModelsResponse:
    return inference_pb2.ListModelsResponse(models=[inference_pb2.Model(**fields(model)) for model in models])


def models_from_proto(proto: inference_pb2.ListModelsResponse) -> tuple[Model, ...]:
    return tuple(mirror(Model, model) for model in proto.models)


def cluster_status_from_proto(proto: inference_pb2.GetClusterStatusResponse) -> ClusterStatus:
    return ClusterStatus(
        workers=tuple(map(_worker_status_from_proto, proto.workers)),
        gateways=tuple(mirror(GatewayStatus, gateway) for gateway in proto.gateways),
        queue=mirror(QueueStatus, proto.queue),
    )


def _worker_status_from_proto(proto: inference_pb2.WorkerStatus) -> WorkerStatus:
    return mirror(
        WorkerStatus,
        proto,
        role=_ROLES.get(proto.role, WorkerRole.UNSPECIFIED),
        state=_STATES.get(proto.state, WorkerState.UNSPECIFIED),
        links=tuple(mirror(LinkStatus, link) for link in proto.links),
    )


def worker_status_to_proto(status: WorkerStatus) -> inference_pb2.WorkerStatus:
    links = [inference_pb2.LinkStatus(**fields(link)) for link in status.links]
    role, state = _ROLES_BACK[status.role], _STATES_BACK[status.state]
    return inference_pb2.WorkerStatus(**fields(status, role=role, state=state, links=links))


def gateway_status_to_proto(status: GatewayStatus) -> inference_pb2.GatewayStatus:
    return inference_pb2.GatewayStatus(**fields(status))


def queue_status_to_proto(status: QueueStatus) -> inference_pb2.QueueStatus:
    return inference_pb2.QueueStatus(**fields(status))


def held_blocks_to_proto(held: HeldBlocks) -> inference_pb2.HeldBlocks:
    return inference_pb2.HeldBlocks(**fields(held))


def held_blocks_from_proto(proto: inference_pb2.ListHeldBlocksResponse) -> tuple[HeldBlocks, ...]:
    return tuple(
        mirror(
            HeldBlocks,
            held,
            block_ids=tuple(held.block_ids),
            lease_seconds=held.lease_seconds if held.HasField("lease_seconds") else None,
        )
        for held in proto.held
    )
