"""The client for threads."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from kvrelay import rpc, wire
from kvrelay.client.shared import (
    HELD_BLOCKS,
    LIST_MODELS,
    STATUS,
    BaseClient,
    Completion,
    GenerateOptions,
    UnaryCall,
    abort,
    completion,
    generate_request,
)
from kvrelay.errors import Unavailable
from kvrelay.request import Chunk, ClusterStatus, HeldBlocks, Model
from kvrelay.v1.inference_pb2_grpc import InferenceServiceStub

__all__ = ["Client", "Stream"]

_Response = TypeVar("_Response")


class Stream:
    """The chunks of one request as they come. Closing it, or dropping it before its end, cancels the request.

    Attributes:
        request_id: as sent, so that another thread may abort by it.
    """

    def __init__(self, call: Any, request_id: str) -> None:
        self._call = call
        self._closed = False
        self._has_all = False
        self.request_id = request_id

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        """Raises `kvrelay.errors`; StopIteration after the last chunk and once the stream is closed."""
        if self._closed:
            raise StopIteration
        try:
            chunk = wire.chunk_from_proto(next(self._call))
        except grpc.RpcError as error:
            if self._closed:  # by another thread, while this one waited
                raise StopIteration from None
            raised = rpc.error_from_rpc(error)
            if self._has_all and isinstance(raised, Unavailable):  # the connection broke, but nothing is missing
                raise StopIteration from None
            raise raised from error
        self._has_all = chunk.finish_reason is not None
        return chunk

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Cancels the request if it still runs. From any thread."""
        self._closed = True
        self._call.cancel()


class Client(BaseClient):
    """A connection to a cluster, for any number of threads. Use it as a context manager, or close it.

    Every method raises `kvrelay.errors`: `Unavailable` at once if nobody listens, `DeadlineExceeded` after the timeout.
    """

    def __init__(self, target: str | None = None, *, timeout: float | None = None) -> None:
        super().__init__(target, timeout=timeout)
        self._channel = rpc.open_sync_channel(self.target)
        self._stub = InferenceServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what runs, and disconnects."""
        self._closed = True
        self._channel.close()

    def generate(
        self,
        prompt: str | None = None,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> "Stream":
        """Starts a request and streams its chunks; leaving the loop early cancels it.

        Args:
            prompt: text, unless token_ids or messages are given.
            timeout: seconds for the whole stream.
            metadata: gRPC metadata, such as a traceparent.
            options: see `GenerateOptions`.
        """
        request = generate_request(prompt, **options)
        return Stream(self._stub.Generate(request, **self._call_settings(timeout, metadata)), request.request_id)

    def complete(
        self,
        prompt: str | None = None,
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """As `generate`, but returns when all is there."""
        with self.generate(prompt, timeout=timeout, metadata=metadata, **options) as stream:
            return completion(list(stream))

    def abort(self, request_id: str) -> None:
        """Ends a request; its stream closes with `FinishReason.ABORT`. Raises NotFound if the id is not known."""
        self._run(abort(request_id))

    def list_models(self) -> tuple[Model, ...]:
        """The models that the cluster serves."""
        return self._run(LIST_MODELS)

    def status(self) -> ClusterStatus:
        """Workers, gateways and the queue."""
        return self._run(STATUS)

    def held_blocks(self) -> tuple[HeldBlocks, ...]:
        """Every KV block that is held on any worker, by whom and why."""
        return self._run(HELD_BLOCKS)

    def _run(self, call: UnaryCall[_Response]) -> _Response:
        with rpc.translated():
            return call.parse(getattr(self._stub, call.method)(call.request, **self._call_settings()))
