"""What every process says of itself: its services by reflection, and their health."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvrelay import rpc
from kvrelay.request import WorkerRole
from tests.e2e.cluster import Cluster

GATEWAY = {"kvrelay.v1.InferenceService"}
SERVICES = {
    WorkerRole.PREFILL: {"kvrelay.v1.PrefillService", "kvrelay.v1.KvService", "kvrelay.v1.WorkerService"},
    WorkerRole.DECODE: {"kvrelay.v1.DecodeService", "kvrelay.v1.KvService", "kvrelay.v1.WorkerService"},
}


def test_every_process_tells_its_services_and_their_health(cluster: Cluster) -> None:
    status = cluster.status()
    processes = {worker.address: SERVICES[worker.role] for worker in status.workers}
    assert [gateway.address for gateway in status.gateways] == [cluster.target]
    for address, services in {cluster.target: GATEWAY, **processes}.items():
        with rpc.open_sync_channel(address) as channel:
            assert reflected(channel) == services | {
                "grpc.health.v1.Health",
                "grpc.reflection.v1alpha.ServerReflection",
            }
            for service in services:
                assert service.rsplit(".", 1)[1].encode() in described(channel, service)
            health = health_pb2_grpc.HealthStub(channel)
            for service in ("", *services):
                request = health_pb2.HealthCheckRequest(service=service)
                assert health.Check(request, timeout=10).status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.RpcError) as caught:
                health.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=10)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def ask_reflection(channel: grpc.Channel, **question: str) -> reflection_pb2.ServerReflectionResponse:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = iter([reflection_pb2.ServerReflectionRequest(**question)])
    answer: reflection_pb2.ServerReflectionResponse = next(stub.ServerReflectionInfo(requests, timeout=10))
    return answer


def reflected(channel: grpc.Channel) -> set[str]:
    services = ask_reflection(channel, list_services="").list_services_response.service
    return {service.name for service in services}


def described(channel: grpc.Channel, symbol: str) -> bytes:
    answer = ask_reflection(channel, file_containing_symbol=symbol)
    return b"".join(answer.file_descriptor_response.file_descriptor_proto)
