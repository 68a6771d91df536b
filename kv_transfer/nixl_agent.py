"""This process's NIXL agent, with the KV pool registered: the only place that touches NIXL's bindings.

The bindings themselves, and not the Python API around them, which has its progress thread spin on a core; here the
thread sleeps until UCX has something to do. Nothing of the API that pickles (descriptor lists) is used: metadata is
parsed by NIXL's own C++, and comes only from workers that the cluster's key has signed for.
"""

import contextlib
import functools
import importlib
import importlib.util
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from kvrelay.engine.kv_cache import KvCache
from kvrelay.errors import FailedPrecondition
from kvrelay.v1 import kv_pb2

__all__ = ["MAX_METADATA_BYTES", "NixlAgent", "NixlFailed", "NixlTimedOut", "nixl_problem"]

MAX_METADATA_BYTES = 64 << 10
TRANSFER_SECONDS = 5.0
WAKE_MICROSECONDS = 100_000  # of the progress thread, which a packet wakes too
POLL_SECONDS = (1e-5, 1e-3)  # the first pause between looks, which doubles until the last
Range = tuple[int, int]  # address, bytes


class NixlFailed(Exception):
    """A transfer ended without having brought its bytes."""


class NixlTimedOut(NixlFailed):
    """A transfer was given up, and the agent closed."""


@functools.cache
def nixl_problem() -> str | None:
    """Why this process has no NIXL; None if it is installed."""
    if importlib.util.find_spec("nixl") is None:
        return "nixl is not installed here (pip install nixl)"
    return None


class NixlAgent:
    """Lets other processes read the own pool, or reads one other's registered memory into it. Thread-safe.

    A transfer that is given up costs the agent: UCX still writes what comes late, even after the transfer was released
    and the peer disconnected. So each link has an agent of its own.

    Raises:
        FailedPrecondition: NIXL cannot be loaded, or not register the pool; reason NIXL_UNAVAILABLE.
    """

    def __init__(self, cache: KvCache) -> None:
        self.cache = cache
        self._lock = threading.Lock()
        try:
            self._bindings: Any = importlib.import_module("nixl._bindings")
            self._agent = self._bindings.nixlAgent(f"kvrelay-{uuid.uuid4().hex}", self._config())
            self._backend = self._agent.createBackend("UCX", {})
            on_gpu = cache.device.type == "cuda"
            self.segment = self._bindings.VRAM_SEG if on_gpu else self._bindings.DRAM_SEG
            self.device_index = (cache.device.index or 0) if on_gpu else 0
            self._register(cache.block_bytes.data_ptr(), cache.block_bytes.numel())
        except Exception as error:  # whatever the bindings raise: they have a class for each of NIXL's codes
            raise unavailable(f"the agent does not start: {error}") from error

    @contextlib.contextmanager
    def registered(self, address: int, num_bytes: int) -> Iterator[None]:
        """Inside, the agent may read into this memory."""
        described = self._register(address, num_bytes)
        try:
            yield
        finally:
            with self._lock:
                if self._agent is not None:
                    self._agent.deregisterMem(described, [self._backend])

    def _register(self, address: int, num_bytes: int) -> Any:
        described = self._bindings.nixlRegDList(self.segment, [(address, num_bytes, self.device_index, "")])
        self._agent.registerMem(described, [self._backend])
        return described

    def export(self) -> kv_pb2.NixlExport:
        """What others need to read the pool."""
        return kv_pb2.NixlExport(
            metadata=self._agent.getLocalMD(),
            base_address=self.cache.block_bytes.data_ptr(),
            num_blocks=self.cache.num_blocks,
            device_index=self.device_index,
            on_gpu=self.cache.device.type == "cuda",
        )

    def meet(self, metadata: bytes) -> str:
        """Makes another agent known; answers its name.

        Raises:
            FailedPrecondition: the metadata is malformed, or too long; reason NIXL_UNAVAILABLE.
        """
        if not 0 < len(metadata) <= MAX_METADATA_BYTES:
            raise unavailable(f"{len(metadata)} bytes of metadata; at most {MAX_METADATA_BYTES} are taken")
        try:
            name = self._agent.loadRemoteMD(metadata)
        except Exception as error:
            raise unavailable(f"the prefill worker's agent cannot be reached: {error}") from error
        return name.decode() if isinstance(name, bytes) else str(name)

    def close(self) -> None:
        """Ends the agent, with its threads and connections. Nothing is written by it afterwards."""
        with self._lock:
            self._agent = None

    def read(
        self,
        peer: str,
        source: Sequence[Range],
        destination: Sequence[Range],
        source_segment: Any,
        source_device_index: int,
    ) -> None:
        """Reads ranges of a peer's memory into own ones of the same lengths; blocks until they are there.

        Raises:
            NixlFailed: the destination's content is undefined, but nothing is written any more.
            NixlTimedOut: so it is, and the agent is closed.
        """
        bindings = self._bindings
        local = bindings.nixlXferDList(self.segment, [(*each, self.device_index) for each in destination])
        remote = bindings.nixlXferDList(source_segment, [(*each, source_device_index) for each in source])
        # One at a time, so that nobody else is inside when the agent must be closed.
        with self._lock:
            if self._agent is None:
                raise NixlTimedOut("the agent is closed")
            try:
                self._transfer(peer, local, remote)
            except NixlTimedOut:
                self._agent = None
                raise
            except Exception as error:
                raise NixlFailed(str(error)) from error

    def segment_of(self, export: kv_pb2.NixlExport) -> Any:
        return self._bindings.VRAM_SEG if export.on_gpu else self._bindings.DRAM_SEG

    def _transfer(self, peer: str, local: Any, remote: Any) -> None:
        handle = self._agent.createXferReq(self._bindings.NIXL_READ, local, remote, peer, b"", [self._backend])
        ends, (pause, longest) = time.monotonic() + TRANSFER_SECONDS, POLL_SECONDS
        status = self._agent.postXferReq(handle, b"")
        while status == self._bindings.NIXL_IN_PROG:
            if time.monotonic() > ends:
                raise NixlTimedOut(f"nothing came within {TRANSFER_SECONDS:g} s")
            time.sleep(pause)
            pause = min(2 * pause, longest)
            status = self._agent.getXferStatus(handle)
        self._agent.releaseXferReq(handle)
        if status != self._bindings.NIXL_SUCCESS:
            raise NixlFailed(str(status))

    def _config(self) -> Any:
        config = self._bindings.nixlAgentConfig()
        config.useProgThread = True
        config.useListenThread = False
        config.pthrDelay = WAKE_MICROSECONDS
        config.syncMode = self._bindings.NIXL_THREAD_SYNC_STRICT
        return config


def unavailable(problem: str) -> FailedPrecondition:
    return FailedPrecondition(f"NIXL cannot be used: {problem}", reason="NIXL_UNAVAILABLE")
