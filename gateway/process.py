"""One gateway process: its parts, put together, from the first check to the drain."""

import asyncio
import contextlib
import logging
import os

from gateway.admission import Admission
from gateway.disaggregation import Disaggregation
from gateway.dispatch import Dispatch
from gateway.fleet import Fleet
from gateway.pacing import Pacer
from gateway.relay import Relay
from gateway.request_bytes import generate_request_from_bytes
from gateway.requests import Requests
from gateway.response_log import ResponseHistory
from gateway.service import InferenceService
from gateway.status import ClusterView
from gateway.tokens import Tokenizer, TokenizerPool
from kvrelay.control.connection import connect
from kvrelay.control.directory import WorkerDirectory
from kvrelay.control.registration import Registration
from kvrelay.control.registry import GatewayRecord
from kvrelay.control.request_queue import RequestQueue
from kvrelay.engine.checkpoint import model_name, resolve_checkpoint
from kvrelay.errors import Unavailable
from kvrelay.lifetime import StopRequest, settle
from kvrelay.rpc import Server, Service
from kvrelay.settings import GatewaySettings, Settings
from kvrelay.v1 import inference_pb2_grpc

__all__ = ["run_gateway"]

log = logging.getLogger(__name__)

# With two cores 64 streams get a response each every 0.2 s. docs/performance.md has what responses cost the gateway.
RESPONSES_PER_SECOND_AND_CORE = 160.0


async def run_gateway(settings: Settings, cluster_key: bytes) -> int:
    """Serves until SIGTERM or SIGINT, then drains. Answers the process's exit code.

    Raises:
        ConfigurationError: before anything was served.
    """
    stopping = StopRequest()
    path = resolve_checkpoint(settings.engine.model)
    tokenizer = Tokenizer(path, settings.engine.context_length)
    model_id = model_name(settings.engine)
    gateway_id = settings.worker.id_of("gateway")
    limits = settings.gateway
    async with contextlib.AsyncExitStack() as cleanup:
        redis = await connect(settings.cluster.redis)
        cleanup.push_async_callback(redis.aclose)
        lease_seconds, interval = settings.cluster.heartbeat_lease_seconds, settings.cluster.heartbeat_seconds
        directory = WorkerDirectory(redis, cluster_key, lease_seconds=lease_seconds, interval=interval)
        disaggregation = Disaggregation(limits.disaggregation)
        fleet = Fleet(directory, gateway_id, model_id, disaggregation.roles)
        cleanup.push_async_callback(fleet.close)
        queue = RequestQueue(
            redis,
            cluster_key,
            gateway_id,
            max_running=limits.max_running,
            max_waiting=limits.max_waiting,
            replay_seconds=limits.replay_seconds,
        )
        admission = Admission(queue)
        pool = TokenizerPool(tokenizer)
        cleanup.callback(pool.close)
        dispatch = Dispatch(fleet, limits.worker_wait_seconds, disaggregation)
        relay = Relay(tokenizer, pool, admission, dispatch, limits.max_failures)
        requests = Requests(ResponseHistory(limits.replay_seconds, limits.replay_requests), _pacer(limits))
        service = InferenceService(relay, requests, ClusterView(directory, fleet, admission), model_id)
        server = Server(settings.cluster.host, limits.port, [_service(service)])
        port = await server.start()
        cleanup.push_async_callback(server.stop)
        admission.start()
        cleanup.push_async_callback(admission.stop)
        await directory.start()
        cleanup.push_async_callback(directory.stop)
        registration = Registration(redis, cluster_key, lease_seconds=lease_seconds, interval=interval)
        address = settings.cluster.address(port)
        try:
            await registration.start(GatewayRecord(gateway_id, address, os.getpid()), stopping)
        except Unavailable:
            return 0  # it was stopped as it waited for Redis
        cleanup.push_async_callback(registration.withdraw)
        log.info("%s serves %s at %s", gateway_id, model_id, address)
        settle()
        readiness = asyncio.create_task(_follow_readiness(fleet, server), name="readiness")
        await stopping.wait()
        readiness.cancel()
        await server.drain(settings.worker.drain_seconds)
    return 0


def _pacer(limits: GatewaySettings) -> Pacer:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Pacer(limits.responses_per_second or RESPONSES_PER_SECOND_AND_CORE * cores)


def _service(service: InferenceService) -> Service:
    add = inference_pb2_grpc.add_InferenceServiceServicer_to_server
    parsers = {"Generate": generate_request_from_bytes}
    return Service("kvrelay.v1.InferenceService", add, service, work=("Generate",), parsers=parsers)


async def _follow_readiness(fleet: Fleet, server: Server) -> None:
    """Ready is who could serve a request now."""
    while True:
        await server.set_serving(fleet.ready)
        await fleet.wait_for_change()
