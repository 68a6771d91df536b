"""Workers whose model a test plays: engines, leases, services and sockets are real."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

from kvrelay.control.membership import WorkerEntry
from kvrelay.control.registry import ModelInfo, WorkerLoad, WorkerRecord
from kvrelay.engine.async_engine import AsyncEngine
from kvrelay.engine.block_pool import BlockPool
from kvrelay.engine.engine import Engine
from kvrelay.engine.kv_cache import KvCache
from kvrelay.engine.kv_layout import KvLayout
from kvrelay.engine.limits import Limits
from kvrelay.engine.scheduler import Scheduler
from kvrelay.engine.sequence import Chunk
from kvrelay.request import Token, WorkerRole, WorkerState
from kvrelay.rpc import Server
from kvrelay.settings import EngineSettings, Settings, TransferSettings
from kvrelay.worker import Part, Resources

__all__ = ["EPOCH", "KEY", "Directory", "played_worker"]

W = TypeVar("W", bound=Part)

EPOCH = 1
KEY = b"k" * 32
NUM_BLOCKS = 64
LAYOUT = KvLayout(b"m" * 32, "float32", block_size=16, num_layers=1, num_kv_heads=1, head_dim=8)
MODEL = ModelInfo("model", "llama", 64, 128, LAYOUT.block_size, LAYOUT.model_digest.hex())
# Less than a block, so that a KV cache that does not come over is computed elsewhere.
MAX_BATCHED_TOKENS = 8


@dataclass
class PlayedModel:
    """Each of its steps takes so long; all its tokens are the same."""

    step_seconds: float
    overlaps = False

    def launch(self, chunks: Sequence[Chunk]) -> "PlayedStep":
        time.sleep(self.step_seconds)
        return PlayedStep(sum(chunk.samples for chunk in chunks))


@dataclass
class PlayedStep:
    num_tokens: int

    def tokens(self) -> list[Token]:
        return [Token(5)] * self.num_tokens


@dataclass
class Directory:
    """Knows the workers that a test puts into it."""

    entries: dict[str, WorkerEntry] = field(default_factory=dict)

    def snapshot(self) -> Mapping[str, WorkerEntry]:
        return self.entries

    def on_change(self, listener: Callable[[], None]) -> None:
        """Nothing changes while workers use it."""

    async def wait_for(self, predicate: Callable[[Mapping[str, WorkerEntry]], bool], timeout: float) -> None:
        if not predicate(self.entries):
            raise TimeoutError


@contextlib.asynccontextmanager
async def played_worker(
    kind: Callable[[Resources], W],
    role: WorkerRole,
    directory: Directory,
    *,
    max_num_sequences: int = 8,
    step_seconds: float = 0.0,
    lease_seconds: float = 30.0,
) -> AsyncIterator[W]:
    """Registered in the directory under the name of its role."""
    limits = Limits(
        max_num_sequences, MAX_BATCHED_TOKENS, MODEL.context_length, LAYOUT.block_size, evicts=role is WorkerRole.DECODE
    )
    engine = AsyncEngine(Engine(Scheduler(BlockPool(NUM_BLOCKS), limits), PlayedModel(step_seconds)))
    settings = Settings(
        transfer=TransferSettings(lease_seconds=lease_seconds, transport="grpc"),
        engine=EngineSettings(max_batched_tokens=MAX_BATCHED_TOKENS),
    )
    cache = KvCache(LAYOUT, NUM_BLOCKS, torch.device("cpu"))
    runner: Any = SimpleNamespace(layout=LAYOUT, cache=cache)
    followed: Any = directory
    worker = kind(Resources(role.value, settings, KEY, engine, runner, followed))
    server = Server("127.0.0.1", 0, worker.services)
    port = await server.start()
    engine.start()
    worker.begin(EPOCH)
    record = WorkerRecord(role.value, role, f"127.0.0.1:{port}", 1, MODEL, epoch=EPOCH)
    load = WorkerLoad(WorkerState.READY, 0, 0, NUM_BLOCKS, NUM_BLOCKS, 0)
    directory.entries[role.value] = WorkerEntry(record, load, 0.0)
    try:
        yield worker
    finally:
        await server.stop()
        await worker.stop()
        await asyncio.to_thread(engine.stop)
        cache.close()
