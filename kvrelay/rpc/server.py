"""Servers, alike in every process: health, reflection, limits and a drain."""

import asyncio
import contextlib
import errno
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvrelay.errors import ConfigurationError, KvrelayError
from kvrelay.rpc.interceptor import Calls, Interceptor, Parser

__all__ = ["MAX_REQUEST_BYTES", "Server", "Service", "deadline_of"]

MAX_REQUEST_BYTES = 4 << 20
GOODBYE_SECONDS = 0.5

_SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # else two servers could share a port unknowingly
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 250),  # shorter than our channels' keepalive_time
    # Only identity: a small compressed message could otherwise unfold to any size before its length is known.
    ("grpc.compression_enabled_algorithms_bitset", 1),
)


@dataclass(frozen=True, slots=True)
class Service:
    """One gRPC service of a server.

    Attributes:
        name: the full name, such as kvrelay.v1.InferenceService.
        add_to_server: the generated add_XServicer_to_server.
        servicer: implements the service.
        work: the methods that a draining server refuses and waits for; None means all. The others answer to the end.
        parsers: by method, what makes a request of its bytes where protobuf's own parser shows too little; may raise
            `kvrelay.errors`.
    """

    name: str
    add_to_server: Callable[[Any, grpc.aio.Server], None]
    servicer: object
    work: Collection[str] | None = None
    parsers: Mapping[str, Parser] = field(default_factory=dict)


class Server:
    """A gRPC server with health, reflection, translated errors and a drain.

    Health starts as NOT_SERVING, for each service and for "" alike.
    """

    def __init__(
        self, host: str, port: int, services: Sequence[Service], *, max_message_bytes: int = MAX_REQUEST_BYTES
    ) -> None:
        """Binds nothing yet.

        Args:
            port: 0 takes a free one.
            max_message_bytes: a longer request is answered RESOURCE_EXHAUSTED.
        """
        self._host, self._port, self._services = host, port, tuple(services)
        self._max_message_bytes = max_message_bytes
        self._calls = Calls({service.name: service.work for service in services})
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in its stubs
        self._server: grpc.aio.Server | None = None

    async def start(self) -> int:
        """Binds, starts to answer, and returns the port.

        Raises:
            ConfigurationError: the port is in use or the address is not this machine's.
        """
        _check_address(self._host, self._port)
        parsers = {f"/{each.name}/{method}": each.parsers[method] for each in self._services for method in each.parsers}
        server = grpc.aio.server(
            interceptors=[Interceptor(self._calls, self._max_message_bytes, parsers)],
            # The transport's limit is the higher one, so that the interceptor can answer.
            options=[*_SERVER_OPTIONS, ("grpc.max_receive_message_length", 4 * self._max_message_bytes)],
        )
        for service in self._services:
            service.add_to_server(service.servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [service.name for service in self._services]
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        await self.set_serving(False)
        try:
            self._port = server.add_insecure_port(_address(self._host, self._port))
        except RuntimeError as error:
            raise _cannot_listen(self._host, self._port, error) from error
        await server.start()
        self._server = server
        return self._port

    async def set_serving(self, serving: bool) -> None:
        """Sets what health checks are told, for every service and for ""."""
        statuses = health_pb2.HealthCheckResponse
        for name in ("", *(service.name for service in self._services)):
            await self._health.set(name, statuses.SERVING if serving else statuses.NOT_SERVING)

    async def drain(self, grace: float, *, until: Callable[[], Awaitable[object]] | None = None) -> None:
        """Refuses new work, lets the running end, and stops.

        Args:
            grace: seconds; what runs longer ends with `Unavailable`, reason DRAINING.
            until: what else to wait for within the grace, such as the last lease's end.
        """
        self._calls.refuse_work()
        await self.set_serving(False)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace):
                await self._calls.wait_for_work()
                if until is not None:
                    await until()
        await self.stop()

    async def fence(self, error: KvrelayError) -> None:
        """Ends the calls in progress with this error, and those that come before `unfence`. Waits until they have."""
        await self._calls.fence(error)

    def unfence(self) -> None:
        """Calls may begin again."""
        self._calls.unfence()

    async def stop(self) -> None:
        """Ends all calls with `Unavailable`, reason DRAINING, and closes the port."""
        await self._calls.end_all()
        if self._server is not None:
            # Nothing runs any more; a grace makes gRPC say goodbye to its peers instead of reporting an error to them.
            await self._server.stop(GOODBYE_SECONDS)


def deadline_of(context: Any) -> float | None:
    """When a gRPC call must have ended, on the clock of `time.monotonic`; None if it may last."""
    remaining: float | None = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_address(host: str, port: int) -> None:
    """Raises ConfigurationError with the reason, which gRPC would only write to stderr."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        problems = [problem for address in addresses if (problem := _bind_problem(*address))]
    except (OSError, OverflowError, UnicodeError) as error:
        raise _cannot_listen(host, port, error) from error
    in_use = [problem for problem in problems if problem.errno == errno.EADDRINUSE]
    if in_use or len(problems) == len(addresses):
        raise _cannot_listen(host, port, (in_use or problems)[0])


def _bind_problem(family: int, kind: int, protocol: int, _name: str, address: Any) -> OSError | None:
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            return error
    return None


def _cannot_listen(host: str, port: int, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"{_address(host, port)}: cannot listen here: {getattr(error, 'strerror', None) or error}"
    )
