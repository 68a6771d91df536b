from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ChecksumMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHECKSUM_MODE_UNSPECIFIED: _ClassVar[ChecksumMode]
    CHECKSUM_MODE_FULL: _ClassVar[ChecksumMode]
    CHECKSUM_MODE_SAMPLED: _ClassVar[ChecksumMode]
    CHECKSUM_MODE_OFF: _ClassVar[ChecksumMode]
CHECKSUM_MODE_UNSPECIFIED: ChecksumMode
CHECKSUM_MODE_FULL: ChecksumMode
CHECKSUM_MODE_SAMPLED: ChecksumMode
CHECKSUM_MODE_OFF: ChecksumMode

class KvLayout(_message.Message):
    __slots__ = ("version", "model_digest", "dtype", "block_size", "num_layers", "num_kv_heads", "head_dim")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    version: int
    model_digest: bytes
    dtype: str
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    def __init__(self, version: _Optional[int] = ..., model_digest: _Optional[bytes] = ..., dtype: _Optional[str] = ..., block_size: _Optional[int] = ..., num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ...) -> None: ...

class KvTicket(_message.Message):
    __slots__ = ("request_id", "worker_id", "epoch", "block_ids", "generations")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    worker_id: str
    epoch: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_id: _Optional[str] = ..., worker_id: _Optional[str] = ..., epoch: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ...) -> None: ...

class SignedTicket(_message.Message):
    __slots__ = ("ticket", "mac")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    mac: bytes
    def __init__(self, ticket: _Optional[bytes] = ..., mac: _Optional[bytes] = ...) -> None: ...

class PairRequest(_message.Message):
    __slots__ = ("decode_worker_id", "decode_epoch", "layout", "protocol_version", "transports", "shared_pool")
    DECODE_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    DECODE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    SHARED_POOL_FIELD_NUMBER: _ClassVar[int]
    decode_worker_id: str
    decode_epoch: int
    layout: KvLayout
    protocol_version: int
    transports: _containers.RepeatedScalarFieldContainer[str]
    shared_pool: bytes
    def __init__(self, decode_worker_id: _Optional[str] = ..., decode_epoch: _Optional[int] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., protocol_version: _Optional[int] = ..., transports: _Optional[_Iterable[str]] = ..., shared_pool: _Optional[bytes] = ...) -> None: ...

class PairResponse(_message.Message):
    __slots__ = ("prefill_worker_id", "prefill_epoch", "layout", "protocol_version", "transports", "shared_pool")
    PREFILL_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    PREFILL_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    SHARED_POOL_FIELD_NUMBER: _ClassVar[int]
    prefill_worker_id: str
    prefill_epoch: int
    layout: KvLayout
    protocol_version: int
    transports: _containers.RepeatedScalarFieldContainer[str]
    shared_pool: bytes
    def __init__(self, prefill_worker_id: _Optional[str] = ..., prefill_epoch: _Optional[int] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., protocol_version: _Optional[int] = ..., transports: _Optional[_Iterable[str]] = ..., shared_pool: _Optional[bytes] = ...) -> None: ...

class ExportRequest(_message.Message):
    __slots__ = ("transport",)
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    transport: str
    def __init__(self, transport: _Optional[str] = ...) -> None: ...

class ExportResponse(_message.Message):
    __slots__ = ("nixl", "cuda_ipc")
    NIXL_FIELD_NUMBER: _ClassVar[int]
    CUDA_IPC_FIELD_NUMBER: _ClassVar[int]
    nixl: NixlExport
    cuda_ipc: CudaIpcExport
    def __init__(self, nixl: _Optional[_Union[NixlExport, _Mapping]] = ..., cuda_ipc: _Optional[_Union[CudaIpcExport, _Mapping]] = ...) -> None: ...

class NixlExport(_message.Message):
    __slots__ = ("metadata", "base_address", "num_blocks", "device_index", "on_gpu")
    METADATA_FIELD_NUMBER: _ClassVar[int]
    BASE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_INDEX_FIELD_NUMBER: _ClassVar[int]
    ON_GPU_FIELD_NUMBER: _ClassVar[int]
    metadata: bytes
    base_address: int
    num_blocks: int
    device_index: int
    on_gpu: bool
    def __init__(self, metadata: _Optional[bytes] = ..., base_address: _Optional[int] = ..., num_blocks: _Optional[int] = ..., device_index: _Optional[int] = ..., on_gpu: _Optional[bool] = ...) -> None: ...

class CudaIpcExport(_message.Message):
    __slots__ = ("host_id", "device_uuid", "handle", "offset", "size", "num_blocks")
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    DEVICE_UUID_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    host_id: str
    device_uuid: str
    handle: bytes
    offset: int
    size: int
    num_blocks: int
    def __init__(self, host_id: _Optional[str] = ..., device_uuid: _Optional[str] = ..., handle: _Optional[bytes] = ..., offset: _Optional[int] = ..., size: _Optional[int] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class ProbeRequest(_message.Message):
    __slots__ = ("num_bytes",)
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_bytes: int
    def __init__(self, num_bytes: _Optional[int] = ...) -> None: ...

class ProbeResponse(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("ticket", "skip_blocks", "transport", "checksum", "decode_worker_id")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    SKIP_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    skip_blocks: int
    transport: str
    checksum: ChecksumMode
    decode_worker_id: str
    def __init__(self, ticket: _Optional[bytes] = ..., skip_blocks: _Optional[int] = ..., transport: _Optional[str] = ..., checksum: _Optional[_Union[ChecksumMode, str]] = ..., decode_worker_id: _Optional[str] = ...) -> None: ...

class PullResponse(_message.Message):
    __slots__ = ("ready", "complete")
    READY_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    ready: ReadyBlocks
    complete: PrefillComplete
    def __init__(self, ready: _Optional[_Union[ReadyBlocks, _Mapping]] = ..., complete: _Optional[_Union[PrefillComplete, _Mapping]] = ...) -> None: ...

class ReadyBlocks(_message.Message):
    __slots__ = ("first", "count", "checksums", "data", "followed_at_once")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    FOLLOWED_AT_ONCE_FIELD_NUMBER: _ClassVar[int]
    first: int
    count: int
    checksums: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    followed_at_once: bool
    def __init__(self, first: _Optional[int] = ..., count: _Optional[int] = ..., checksums: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ..., followed_at_once: _Optional[bool] = ...) -> None: ...

class PrefillComplete(_message.Message):
    __slots__ = ("first_token_id", "seconds_since_done")
    FIRST_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    SECONDS_SINCE_DONE_FIELD_NUMBER: _ClassVar[int]
    first_token_id: int
    seconds_since_done: float
    def __init__(self, first_token_id: _Optional[int] = ..., seconds_since_done: _Optional[float] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("ticket",)
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    def __init__(self, ticket: _Optional[bytes] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
