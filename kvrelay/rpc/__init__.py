"""Every process's gRPC is built here, so that options, errors and draining are the same everywhere.

A handler is an async function or an async generator that raises `kvrelay.errors` and knows nothing of gRPC statuses.
A caller wraps its calls in `translated()` and catches `kvrelay.errors`.
"""

from kvrelay.rpc.channel import (
    MAX_RESPONSE_BYTES,
    error_from_rpc,
    is_being_cancelled,
    open_channel,
    open_sync_channel,
    translated,
)
from kvrelay.rpc.server import MAX_REQUEST_BYTES, Server, Service, deadline_of

__all__ = [
    "MAX_REQUEST_BYTES",
    "MAX_RESPONSE_BYTES",
    "Server",
    "Service",
    "deadline_of",
    "error_from_rpc",
    "is_being_cancelled",
    "open_channel",
    "open_sync_channel",
    "translated",
]
