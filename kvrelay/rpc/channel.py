"""Channels to other processes, and their errors as `kvrelay.errors`."""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from kvrelay import wire
from kvrelay.errors import KvrelayError, Unavailable, error_for_code

__all__ = [
    "MAX_RESPONSE_BYTES",
    "STATUS_DETAILS_KEY",
    "error_from_rpc",
    "is_being_cancelled",
    "open_channel",
    "open_sync_channel",
    "translated",
]

MAX_RESPONSE_BYTES = 64 << 20
STATUS_DETAILS_KEY = "grpc-status-details-bin"
# What gRPC itself says, in code and text, of calls that have come to a server which stops before it looks at them.
_DROPPED = "CANCELLED"

_CHANNEL_OPTIONS = (
    # While calls are active, a peer that falls silent is noticed after two times the first plus the second.
    ("grpc.keepalive_time_ms", 500),
    ("grpc.keepalive_timeout_ms", 1500),
    ("grpc.http2.ping_timeout_ms", 1500),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.min_reconnect_backoff_ms", 2000),  # the time that one attempt may take, despite its name
    # A new channel connects at once, whatever backoff an older one to the same address is in.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)


def is_being_cancelled() -> bool:
    """Whether a CancelledError is of the current task, and not of the call that it waits for.

    gRPC cancels the calls of a channel that is closed, too.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    return [*_CHANNEL_OPTIONS, ("grpc.max_receive_message_length", max_message_bytes)]


def open_channel(target: str, *, max_message_bytes: int = MAX_RESPONSE_BYTES) -> grpc.aio.Channel:
    """A channel that notices a silent peer within about two seconds and tries to reconnect every second.

    Args:
        max_message_bytes: a longer response fails the call with RESOURCE_EXHAUSTED.
    """
    return grpc.aio.insecure_channel(target, options=_channel_options(max_message_bytes))


def open_sync_channel(target: str, *, max_message_bytes: int = MAX_RESPONSE_BYTES) -> grpc.Channel:
    """As `open_channel`, for callers without an event loop."""
    return grpc.insecure_channel(target, options=_channel_options(max_message_bytes))


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Calls made inside raise `kvrelay.errors` instead of `grpc.RpcError`; a plain `with`, in async code too."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_from_rpc(error) from error


def error_from_rpc(error: grpc.RpcError) -> KvrelayError:
    """The error that the server raised, else the class for the code with gRPC's message.

    Args:
        error: of a sync or an asyncio call.
    """
    call: Any = error  # sync and asyncio errors share these methods, but no type that declares them
    code: grpc.StatusCode = call.code()
    for key, value in call.trailing_metadata() or ():
        if key == STATUS_DETAILS_KEY:
            with contextlib.suppress(DecodeError):
                status = status_pb2.Status.FromString(value)
                if status.code == code.value[0]:
                    return wire.error_from_status(status)
    if code is grpc.StatusCode.CANCELLED and call.details() == _DROPPED:
        return Unavailable("the server stopped before it took the call up")
    return error_for_code(code.name)(call.details() or "")
