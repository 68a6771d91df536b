"""A prefill and a decode worker that compute nothing: real services, real frames, tokens out of thin air.

What a gateway costs can be measured beside them, because they take little of the machine themselves. As a real worker
does, the decode worker sends one frame per step with one token of each of its sequences.

    python -m benchmarks.scripted_workers --redis URL --key-file FILE --model ID [--steps-per-second 50]
"""

import argparse
import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.workloads import VOCAB_SIZE
from kvrelay.control.cluster_key import load_cluster_key
from kvrelay.control.connection import connect
from kvrelay.control.registration import Registration
from kvrelay.control.registry import ModelInfo, WorkerLoad, WorkerRecord
from kvrelay.lifetime import StopRequest
from kvrelay.request import WorkerRole, WorkerState
from kvrelay.rpc import Server, Service
from kvrelay.settings import ClusterSettings
from kvrelay.v1 import inference_pb2, worker_pb2, worker_pb2_grpc

__all__ = ["main"]

HOST = "127.0.0.1"
CONTEXT_LENGTH, BLOCK_SIZE, NUM_BLOCKS = 4096, 16, 1 << 16


def token_at(index: int) -> int:
    """Any token will do that is not special."""
    return 16 + (index * 31) % (VOCAB_SIZE // 16)


class ScriptedPrefill(worker_pb2_grpc.PrefillServiceServicer):
    """Every prompt is done at once."""

    async def Prefill(
        self, request: worker_pb2.PrefillRequest, context: Any
    ) -> AsyncIterator[worker_pb2.PrefillResponse]:
        yield worker_pb2.PrefillResponse(admitted=worker_pb2.Admitted(ticket=b"scripted"))
        yield worker_pb2.PrefillResponse(first_token=worker_pb2.FirstToken(token_id=token_at(0)))


@dataclass(slots=True)
class _Sequence:
    handle: int
    max_tokens: int
    num_tokens: int = 1  # the first one is the prefill worker's
    finished: asyncio.Event = field(default_factory=asyncio.Event)


class ScriptedDecode(worker_pb2_grpc.DecodeServiceServicer):
    """Every sequence gets one token a step.

    Args:
        steps_per_second: 0 makes a step whenever the gateway has taken the frame before.
    """

    def __init__(self, steps_per_second: float) -> None:
        self._seconds_per_step = 1 / steps_per_second if steps_per_second else 0.0
        self._sequences: dict[int, _Sequence] = {}
        self._arrival = asyncio.Event()

    async def Decode(self, request: worker_pb2.DecodeRequest, context: Any) -> worker_pb2.DecodeResponse:
        sequence = _Sequence(request.handle, request.sequence.sampling.max_tokens)
        self._sequences[request.handle] = sequence
        self._arrival.set()
        try:
            await sequence.finished.wait()
        finally:
            self._sequences.pop(request.handle, None)
        reason = inference_pb2.FINISH_REASON_LENGTH
        return worker_pb2.DecodeResponse(finish_reason=reason, completion_tokens=sequence.max_tokens)

    async def StreamFrames(
        self, request: worker_pb2.StreamFramesRequest, context: Any
    ) -> AsyncIterator[worker_pb2.StreamFramesResponse]:
        yield worker_pb2.StreamFramesResponse()
        clock = asyncio.get_running_loop().time
        due = clock()
        while True:
            while not self._sequences:
                self._arrival.clear()
                await self._arrival.wait()
                due = clock()
            due = max(due + self._seconds_per_step, clock())
            await asyncio.sleep(due - clock())
            yield self._step()

    def _step(self) -> worker_pb2.StreamFramesResponse:
        frame = worker_pb2.StreamFramesResponse()
        for sequence in list(self._sequences.values()):
            index = sequence.num_tokens
            frame.sequences.add(handle=sequence.handle, first_index=index, token_ids=[token_at(index)])
            sequence.num_tokens += 1
            if sequence.num_tokens >= sequence.max_tokens:
                del self._sequences[sequence.handle]
                sequence.finished.set()
        return frame


def _load() -> WorkerLoad:
    return WorkerLoad(
        WorkerState.READY, running=0, waiting=0, blocks_total=NUM_BLOCKS, blocks_free=NUM_BLOCKS, waiting_tokens=0
    )


async def _serve(arguments: argparse.Namespace) -> None:
    stopping = StopRequest()
    key = load_cluster_key(arguments.key_file)
    model = ModelInfo(arguments.model, "scripted", CONTEXT_LENGTH, VOCAB_SIZE, BLOCK_SIZE, "00")
    prefill = Service(
        "kvrelay.v1.PrefillService", worker_pb2_grpc.add_PrefillServiceServicer_to_server, ScriptedPrefill()
    )
    decode = Service(
        "kvrelay.v1.DecodeService",
        worker_pb2_grpc.add_DecodeServiceServicer_to_server,
        ScriptedDecode(arguments.steps_per_second),
    )
    cluster = ClusterSettings()
    roles: Sequence[tuple[WorkerRole, Service]] = ((WorkerRole.PREFILL, prefill), (WorkerRole.DECODE, decode))
    async with contextlib.AsyncExitStack() as cleanup:
        redis = await connect(arguments.redis)
        cleanup.push_async_callback(redis.aclose)
        for role, service in roles:
            server = Server(HOST, 0, [service])
            port = await server.start()
            cleanup.push_async_callback(server.stop)
            registration = Registration(
                redis, key, _load, lease_seconds=cluster.heartbeat_lease_seconds, interval=cluster.heartbeat_seconds
            )
            await registration.start(WorkerRecord(f"scripted-{role.value}", role, f"{HOST}:{port}", os.getpid(), model))
            cleanup.push_async_callback(registration.withdraw)
        await stopping.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redis", required=True)
    parser.add_argument("--key-file", type=Path, required=True)
    parser.add_argument("--model", required=True, help="name of the model that the gateway serves")
    parser.add_argument("--steps-per-second", type=float, default=50.0, help="0: as fast as they are taken")
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
