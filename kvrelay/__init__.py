"""kvrelay serves language models over gRPC, with prefill and decode on separate workers. Here is the client's side."""

from typing import TYPE_CHECKING, Any

from kvrelay.errors import (
    AlreadyExists,
    Cancelled,
    ConfigurationError,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    Internal,
    InvalidArgument,
    KvrelayError,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from kvrelay.request import FinishReason, SamplingParams

if TYPE_CHECKING:
    from kvrelay.client import AsyncClient, Client

__all__ = [
    "AlreadyExists",
    "AsyncClient",
    "Cancelled",
    "Client",
    "ConfigurationError",
    "DeadlineExceeded",
    "FailedPrecondition",
    "FieldViolation",
    "FinishReason",
    "Internal",
    "InvalidArgument",
    "KvrelayError",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "ResourceExhausted",
    "SamplingParams",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
]


def __getattr__(name: str) -> Any:
    # Loaded when asked for: the engine does without gRPC, and runs where it is not installed.
    if name in ("AsyncClient", "Client"):
        from kvrelay import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
