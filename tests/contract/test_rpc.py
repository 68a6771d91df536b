"""The server and its interceptor, over a real socket."""

import asyncio
import logging
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvrelay import errors, rpc
from kvrelay.errors import ConfigurationError, FieldViolation, Internal, KvrelayError, Unavailable
from kvrelay.v1 import inference_pb2
from tests.contract.rpc_kit import NAME, NOT_SERVING, SERVING, Running, running
from tests.patience import SOON

__all__ = ["running"]

ERROR_CLASSES = [KvrelayError, *KvrelayError.__subclasses__()]


def same(left: KvrelayError, right: KvrelayError) -> bool:
    return type(left) is type(right) and vars(left) == vars(right)


def warnings(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


# Errors


@pytest.mark.parametrize("error_class", ERROR_CLASSES, ids=lambda cls: cls.__name__)
async def test_every_error_comes_back_as_it_was_raised(running: Running, error_class: type[KvrelayError]) -> None:
    raised = error_class(
        "ein Fehler: \u4e2d\u6587 100%\n",
        reason="A_REASON",
        metadata={"worker": "decode-1"},
        violations=[FieldViolation("top_p", "is 2; the most is 1"), FieldViolation("seed", "is odd")],
        retry_after=0.25,
    )
    running.servicer.fail_with(raised)
    with pytest.raises(KvrelayError) as caught, rpc.translated():
        await running.stub.Abort(inference_pb2.AbortRequest())
    assert same(caught.value, raised)


async def test_an_error_within_a_stream_follows_what_was_sent(running: Running) -> None:
    running.servicer.count = 3
    running.servicer.fail_with(Unavailable("the worker is gone", reason="WORKER_LOST"))
    call: Any = running.stub.Generate(inference_pb2.GenerateRequest())
    assert [(await call.read()).seq for _ in range(3)] == [1, 2, 3]
    with pytest.raises(Unavailable) as caught, rpc.translated():
        await call.read()
    assert caught.value.reason == "WORKER_LOST"


@pytest.mark.parametrize("method", ["Abort", "Generate"])
async def test_a_defect_gives_the_client_an_incident_and_the_log_the_rest(
    running: Running, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    running.servicer.fail_with(ValueError("secret"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.channel.unary_unary(f"/{NAME}/{method}", None, None)(b"")
    error = rpc.error_from_rpc(caught.value)
    assert isinstance(error, Internal)
    assert "secret" not in repr(caught.value) + repr(list(caught.value.trailing_metadata()))
    assert "ValueError" not in repr(caught.value)
    [record] = [record for record in caplog.records if error.metadata["incident"] in record.getMessage()]
    assert record.exc_info is not None
    assert "secret" in str(record.exc_info[1])


async def test_a_cancellation_that_the_client_did_not_ask_for_is_a_defect(running: Running) -> None:
    running.servicer.fail_with(asyncio.CancelledError("secret"))
    with pytest.raises(Internal, match="incident"), rpc.translated():
        await running.stub.Abort(inference_pb2.AbortRequest(), timeout=5)


async def test_an_error_too_long_for_the_trailers_is_clipped(running: Running) -> None:
    violations = [FieldViolation("model", "x" * 9000)]
    running.servicer.fail_with(errors.NotFound("\u4e2d" * 9000, reason="NO_MODEL", violations=violations))
    with pytest.raises(errors.NotFound) as caught, rpc.translated():
        await running.stub.Abort(inference_pb2.AbortRequest())
    assert caught.value.message.startswith("\u4e2d" * 100)
    assert caught.value.reason == "NO_MODEL"


async def test_a_status_without_details_becomes_the_class_of_its_code() -> None:
    metadata = grpc.aio.Metadata(("grpc-status-details-bin", b"\xff"))
    bare = grpc.aio.AioRpcError(grpc.StatusCode.OUT_OF_RANGE, grpc.aio.Metadata(), metadata, "past the end", None)
    assert same(rpc.error_from_rpc(bare), errors.OutOfRange("past the end"))


# Bad messages


@pytest.mark.parametrize("method", ["Abort", "Generate"])
@pytest.mark.parametrize("message", [b"\x0a\x02\xff\xfe", b"\x0a\x7f", b"\xff\xff\xff"], ids=["utf8", "cut", "noise"])
async def test_a_malformed_message_is_an_invalid_argument(running: Running, method: str, message: bytes) -> None:
    with pytest.raises(errors.InvalidArgument, match="malformed") as caught:
        await running.send(f"/{NAME}/{method}", message)
    assert [violation.field for violation in caught.value.violations] == ["request"]


async def test_a_malformed_message_to_reflection_is_an_invalid_argument(running: Running) -> None:
    method = f"/{reflection_pb2.DESCRIPTOR.package}.ServerReflection/ServerReflectionInfo"
    stream = running.channel.stream_stream(method, None, None)(iter([b"\xff"]))
    with pytest.raises(errors.InvalidArgument), rpc.translated():
        await stream.read()


@pytest.mark.parametrize("method", ["Abort", "Generate"])
async def test_a_large_message_is_refused_with_both_numbers(running: Running, method: str) -> None:
    message = inference_pb2.AbortRequest(request_id="x" * (5 << 20)).SerializeToString()
    with pytest.raises(errors.ResourceExhausted) as caught:
        await running.send(f"/{NAME}/{method}", message)
    assert caught.value.reason == "MESSAGE_TOO_LARGE"
    assert caught.value.metadata == {"size": str(len(message)), "limit": str(4 << 20)}
    assert str(len(message)) in caught.value.message


async def test_a_message_over_the_limit_of_the_transport_is_refused_by_it(running: Running) -> None:
    with pytest.raises(errors.ResourceExhausted):
        await running.send(f"/{NAME}/Abort", bytes(17 << 20))


async def test_a_compressed_message_is_refused_before_it_unfolds(running: Running) -> None:
    bomb = inference_pb2.AbortRequest(request_id="x" * (3 << 20))
    with pytest.raises(errors.Unimplemented), rpc.translated():
        await running.stub.Abort(bomb, compression=grpc.Compression.Gzip)


@pytest.mark.parametrize("method", [f"/{NAME}/Nothing", "/nobody.v1.Service/Do"])
async def test_a_method_that_nobody_implements(running: Running, method: str) -> None:
    with pytest.raises(errors.Unimplemented):
        await running.send(method, b"")


async def test_bad_messages_harm_nobody_else(running: Running) -> None:
    running.servicer.count = 2
    for _ in range(20):
        with pytest.raises(errors.InvalidArgument):
            await running.send(f"/{NAME}/Generate", b"\xff")
    assert await running.seqs() == [1, 2]


# Clients that leave


async def test_a_client_that_leaves_ends_the_handler(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    running.servicer.count = 1
    running.servicer.ending = asyncio.Event().wait
    call = running.stub.Generate(inference_pb2.GenerateRequest())
    await call.read()
    await running.servicer.running.wait()
    call.cancel()
    async with asyncio.timeout(SOON):
        await running.servicer.cleaned_up.wait()
    assert not warnings(caplog)


async def test_a_client_that_leaves_while_the_handler_sends(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    running.servicer.count = 1_000_000
    call = running.stub.Generate(inference_pb2.GenerateRequest())
    await call.read()
    call.cancel()
    async with asyncio.timeout(SOON):
        await running.servicer.cleaned_up.wait()
    assert not warnings(caplog)


async def test_a_deadline_ends_the_handler(running: Running) -> None:
    running.servicer.ending = asyncio.Event().wait
    with pytest.raises(errors.DeadlineExceeded), rpc.translated():
        await running.stub.Generate(inference_pb2.GenerateRequest(), timeout=0.1).read()
    async with asyncio.timeout(SOON):
        await running.servicer.cleaned_up.wait()


# Health and reflection


async def test_health_follows_set_serving(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    assert [await running.health_of(name) for name in ("", NAME)] == [NOT_SERVING, NOT_SERVING]
    watch = running.health.Watch(health_pb2.HealthCheckRequest(service=NAME))
    assert (await watch.read()).status == NOT_SERVING
    await running.server.set_serving(True)
    assert [await running.health_of(name) for name in ("", NAME)] == [SERVING, SERVING]
    assert (await watch.read()).status == SERVING
    with pytest.raises(errors.NotFound), rpc.translated():
        await running.health_of("nobody.v1.Service")
    assert not warnings(caplog)


async def test_reflection_describes_every_service(running: Running) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(running.channel)
    request = reflection_pb2.ServerReflectionRequest
    requests = [request(list_services=""), request(file_containing_symbol=NAME)]
    listed, described = [answer async for answer in stub.ServerReflectionInfo(iter(requests))]
    names = {service.name for service in listed.list_services_response.service}
    assert names == {NAME, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert described.file_descriptor_response.file_descriptor_proto


# Drain


async def test_a_drain_refuses_work_and_lets_the_running_end(running: Running) -> None:
    release = asyncio.Event()
    running.servicer.count, running.servicer.ending = 1, release.wait
    await running.server.set_serving(True)
    old = asyncio.create_task(running.seqs())
    await running.servicer.running.wait()
    drain = asyncio.create_task(running.server.drain(10))
    watch = running.health.Watch(health_pb2.HealthCheckRequest())
    while (await watch.read()).status != NOT_SERVING:
        pass

    with pytest.raises(Unavailable) as caught, rpc.translated():
        await running.seqs()
    assert caught.value.reason == "DRAINING"
    assert await running.health_of(NAME) == NOT_SERVING
    assert not drain.done()
    running.servicer.ending = lambda: asyncio.sleep(0)
    await running.stub.Abort(inference_pb2.AbortRequest())  # is no work, and may end some
    release.set()
    assert await old == [1]
    await drain
    with pytest.raises(Unavailable), rpc.translated():
        await running.health_of("")


async def test_what_outlasts_the_grace_ends_with_draining(running: Running) -> None:
    running.servicer.count, running.servicer.ending = 1, asyncio.Event().wait
    call = running.stub.Generate(inference_pb2.GenerateRequest())
    await call.read()
    await running.server.drain(0.05)
    with pytest.raises(Unavailable) as caught, rpc.translated():
        await call.read()
    assert caught.value.reason == "DRAINING"
    assert running.servicer.cleaned_up.is_set()


async def test_calls_that_are_no_work_do_not_hold_up_a_drain(running: Running) -> None:
    running.servicer.ending = asyncio.Event().wait
    abort = asyncio.ensure_future(running.stub.Abort(inference_pb2.AbortRequest()))
    watch = running.health.Watch(health_pb2.HealthCheckRequest())
    await watch.read()
    async with asyncio.timeout(SOON):
        await running.server.drain(3600)
    with pytest.raises(Unavailable), rpc.translated():
        await abort


async def test_a_drain_waits_for_what_it_is_told_within_the_grace(running: Running) -> None:
    released = asyncio.Event()
    drain = asyncio.create_task(running.server.drain(3600, until=released.wait))
    watch = running.health.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == NOT_SERVING
    assert not drain.done()
    released.set()
    async with asyncio.timeout(SOON):
        await drain


# A fence


async def test_a_fence_ends_the_calls_and_refuses_others_until_it_is_lifted(running: Running) -> None:
    """Also those that come while handlers clean up, and those that no drain refuses."""
    running.servicer.count, running.servicer.ending = 1, asyncio.Event().wait
    call = running.stub.Generate(inference_pb2.GenerateRequest())
    await call.read()
    fence = asyncio.create_task(running.server.fence(Unavailable("begins anew", reason="FENCED")))
    await running.servicer.cleaned_up.wait()
    running.servicer.ending = lambda: asyncio.sleep(0)
    with pytest.raises(Unavailable) as caught, rpc.translated():
        await call.read()
    assert caught.value.reason == "FENCED"
    for _ in range(2):
        for refused in (running.seqs(), running.send(f"/{NAME}/Abort", b"")):
            with pytest.raises(Unavailable) as caught, rpc.translated():
                await refused
            assert caught.value.reason == "FENCED"
        await fence
    running.server.unfence()
    assert await running.seqs() == [1]


# Addresses


async def test_a_port_in_use_is_a_configuration_error(running: Running) -> None:
    with pytest.raises(ConfigurationError, match=rf"127.0.0.1:{running.port}.*in use"):
        await rpc.Server("127.0.0.1", running.port, []).start()


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 0), ("no-such-host.invalid", 0)])
async def test_an_address_that_cannot_be_bound_is_a_configuration_error(host: str, port: int) -> None:
    with pytest.raises(ConfigurationError, match=f"{host}:{port}: cannot listen"):
        await rpc.Server(host, port, []).start()
