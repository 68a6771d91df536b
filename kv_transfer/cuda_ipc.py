"""The transport between GPUs of one host: the decode worker maps the prefill worker's pool and copies on the device.

Needs one GPU for both, or two with peer access (NVLink or PCIe). No GPU has run this yet: what is tested is who may
offer and open a pool, and that no block outside of it is named.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch

from kv_transfer.blocks import contiguous_runs
from kv_transfer.threads import run_to_end
from kv_transfer.transport import TransferFailed, check_fetch
from kvrelay.engine.kv_cache import KvCache
from kvrelay.errors import FailedPrecondition
from kvrelay.host import host_id
from kvrelay.v1 import kv_pb2

__all__ = ["HANDLE_BYTES", "CudaIpcReceiver", "check_export", "export_pool"]

HANDLE_BYTES = 64
_LAZY_ENABLE_PEER_ACCESS = 1


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


def export_pool(cache: KvCache) -> kv_pb2.CudaIpcExport:
    """What processes of this host need to map the pool.

    Raises:
        FailedPrecondition: the pool is not in a GPU's memory, or of an allocator that cannot share it; reason
            CUDA_IPC_UNAVAILABLE.
    """
    if cache.device.type != "cuda":
        raise _unavailable("the KV pool is not in a GPU's memory")
    driver, handle = _driver(), _Handle()
    address, base, size = cache.block_address(0, 0), ctypes.c_uint64(), ctypes.c_size_t()
    with torch.cuda.device(cache.device):
        _call(driver.cuMemGetAddressRange_v2, ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
        _call(driver.cuIpcGetMemHandle, ctypes.byref(handle), base)
    return kv_pb2.CudaIpcExport(
        host_id=host_id(),
        device_uuid=_uuid(cache.device.index or 0),
        handle=ctypes.string_at(ctypes.byref(handle), HANDLE_BYTES),
        offset=address - base.value,
        size=size.value,
        num_blocks=cache.num_blocks,
    )


def check_export(export: kv_pb2.CudaIpcExport, block_bytes: int) -> None:
    """Whether an export can be opened by this process, as far as that can be told without a GPU.

    Raises:
        FailedPrecondition: it cannot; reason CUDA_IPC_UNAVAILABLE.
    """
    if export.host_id != host_id():
        raise _unavailable("the prefill worker is on another host")
    if len(export.handle) != HANDLE_BYTES:
        raise _unavailable(f"a handle of {len(export.handle)} bytes")
    if export.num_blocks == 0 or export.offset + export.num_blocks * block_bytes > export.size:
        raise _unavailable("the pool does not fit into its allocation")


class CudaIpcReceiver:
    """Copies from another process's pool into the own. `open_pool` makes one."""

    name = "cuda_ipc"
    usable = True

    def __init__(self, base: int, export: kv_pb2.CudaIpcExport, device: int, cache: KvCache) -> None:
        """Takes over `base`, where the allocation is mapped; its memory is that of GPU `device`."""
        self._base = base
        self._cache = cache
        self._num_source_blocks = export.num_blocks
        self._stream = torch.cuda.Stream(cache.device)  # type: ignore[no-untyped-call]
        memory = _Memory(base + export.offset, (export.num_blocks, cache.layout.block_bytes))
        self._source = torch.as_tensor(memory, device=f"cuda:{device}")

    @classmethod
    def open_pool(cls, export: kv_pb2.CudaIpcExport, cache: KvCache) -> "CudaIpcReceiver":
        """Maps the pool that a prefill worker exports.

        Raises:
            FailedPrecondition: it cannot be mapped; reason CUDA_IPC_UNAVAILABLE.
        """
        if cache.device.type != "cuda":
            raise _unavailable("this worker's KV pool is not in a GPU's memory")
        check_export(export, cache.layout.block_bytes)
        device, own = _device(export.device_uuid), cache.device.index or 0
        if device != own and not torch.cuda.can_device_access_peer(own, device):
            raise _unavailable("the two GPUs have no access to each other")
        base = ctypes.c_uint64()
        with torch.cuda.device(cache.device):
            handle = _Handle.from_buffer_copy(export.handle)
            _call(_driver().cuIpcOpenMemHandle_v2, ctypes.byref(base), handle, _LAZY_ENABLE_PEER_ACCESS)
        return cls(base.value, export, device, cache)

    async def receive(self, source_block_ids: Sequence[int], destination_block_ids: Sequence[int], data: bytes) -> None:
        check_fetch(source_block_ids, self._num_source_blocks, data)
        await run_to_end(functools.partial(self._copy, source_block_ids, destination_block_ids))

    async def probe(self, num_bytes: int) -> int:
        count = max(1, min(self._num_source_blocks, num_bytes // self._cache.layout.block_bytes))
        return await run_to_end(functools.partial(self._copy_to_scratch, count))

    def close(self) -> None:
        del self._source
        with torch.cuda.device(self._cache.device):
            _driver().cuIpcCloseMemHandle(ctypes.c_uint64(self._base))

    def _copy(self, source_block_ids: Sequence[int], destination_block_ids: Sequence[int]) -> None:
        try:
            with torch.cuda.stream(self._stream):
                for run in contiguous_runs(source_block_ids, destination_block_ids):
                    source, destination = source_block_ids[run.start], destination_block_ids[run.start]
                    count = run.stop - run.start
                    target = self._cache.block_bytes[destination : destination + count]
                    target.copy_(self._source[source : source + count], non_blocking=True)
            self._stream.synchronize()
        except RuntimeError as error:
            raise TransferFailed(f"the pool cannot be copied: {error}", reason="CUDA_IPC_FAILED") from error

    def _copy_to_scratch(self, count: int) -> int:
        with torch.cuda.stream(self._stream):
            scratch = torch.empty_like(self._cache.block_bytes[:count])
            scratch.copy_(self._source[:count], non_blocking=True)
        self._stream.synchronize()
        return scratch.numel()


class _Memory:
    """Device memory as torch takes it."""

    def __init__(self, address: int, shape: tuple[int, int]) -> None:
        self.__cuda_array_interface__ = {"data": (address, True), "shape": shape, "typestr": "|u1", "version": 3}


def _device(uuid: str) -> int:
    for index in range(torch.cuda.device_count()):
        if _uuid(index) == uuid:
            return index
    raise _unavailable("the prefill worker's GPU is not visible here")


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise _unavailable("there is no CUDA driver") from error


def _call(function: Any, *arguments: Any) -> None:
    code = function(*arguments)
    if code != 0:
        raise _unavailable(f"{function.__name__} answers {code}")


def _unavailable(problem: str) -> FailedPrecondition:
    return FailedPrecondition(f"CUDA IPC cannot be used: {problem}", reason="CUDA_IPC_UNAVAILABLE")
