"""The public API. Each method parses, asks others, and answers; errors are raised, the interceptor translates them."""

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from gateway.relay import Relay
from gateway.requests import CancelHandle, Requests
from gateway.response_log import ResponseLog
from gateway.status import ClusterView
from gateway.validation import GenerateCall, parse_generate, parse_request_id
from kvrelay import telemetry, wire
from kvrelay.errors import DeadlineExceeded
from kvrelay.rpc import deadline_of
from kvrelay.v1 import inference_pb2, inference_pb2_grpc

__all__ = ["InferenceService"]


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Serves clients. A request runs in a task of its own; the calls of clients only read its log.

    Args:
        model_id: the name of the model that is served.
    """

    def __init__(self, relay: Relay, requests: Requests, view: ClusterView, model_id: str) -> None:
        self._relay = relay
        self._requests = requests
        self._view = view
        self._model_id = model_id

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        tokenizer = self._relay.tokenizer
        call = parse_generate(
            request,
            model=self._model_id,
            vocab_size=tokenizer.vocab_size,
            context_length=tokenizer.context_length,
        )
        log = self._requests.find(call) or self._begin(call, context)
        async with contextlib.aclosing(log.read(call.resume_after_seq or 0)) as chunks:
            async for chunk in chunks:
                yield wire.chunk_to_proto(chunk)

    def _begin(self, call: GenerateCall, context: Any) -> ResponseLog:
        deadline = deadline_of(context)
        if deadline is not None and deadline <= time.monotonic():
            raise DeadlineExceeded("the deadline had passed when the request came")
        trace_context = telemetry.context_from(dict(context.invocation_metadata() or ()))

        async def run(call: GenerateCall, log: ResponseLog, handle: CancelHandle) -> None:
            await self._relay.run(call, log, handle, trace_context, deadline)

        return self._requests.begin(call, run)

    async def Abort(self, request: inference_pb2.AbortRequest, context: Any) -> inference_pb2.AbortResponse:
        self._requests.abort(parse_request_id(request.request_id))
        return inference_pb2.AbortResponse()

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        return wire.models_to_proto(self._view.models())

    async def GetClusterStatus(
        self, request: inference_pb2.GetClusterStatusRequest, context: Any
    ) -> inference_pb2.GetClusterStatusResponse:
        return await self._view.status()

    async def ListHeldBlocks(
        self, request: inference_pb2.ListHeldBlocksRequest, context: Any
    ) -> inference_pb2.ListHeldBlocksResponse:
        return await self._view.held_blocks()
