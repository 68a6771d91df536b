from kvrelay.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SequenceSpec(_message.Message):
    __slots__ = ("request_id", "prompt_token_ids", "sampling", "cache_salt", "traceparent", "completion_token_ids")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: Sampling
    cache_salt: str
    traceparent: str
    completion_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., cache_salt: _Optional[str] = ..., traceparent: _Optional[str] = ..., completion_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop_token_ids", "logprobs")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: int
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[int] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("sequence", "worker_epoch", "announce_last_chunk", "gateway_id")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCE_LAST_CHUNK_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    sequence: SequenceSpec
    worker_epoch: int
    announce_last_chunk: bool
    gateway_id: str
    def __init__(self, sequence: _Optional[_Union[SequenceSpec, _Mapping]] = ..., worker_epoch: _Optional[int] = ..., announce_last_chunk: _Optional[bool] = ..., gateway_id: _Optional[str] = ...) -> None: ...

class PrefillResponse(_message.Message):
    __slots__ = ("admitted", "first_token", "last_chunk")
    ADMITTED_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    LAST_CHUNK_FIELD_NUMBER: _ClassVar[int]
    admitted: Admitted
    first_token: FirstToken
    last_chunk: LastChunk
    def __init__(self, admitted: _Optional[_Union[Admitted, _Mapping]] = ..., first_token: _Optional[_Union[FirstToken, _Mapping]] = ..., last_chunk: _Optional[_Union[LastChunk, _Mapping]] = ...) -> None: ...

class Admitted(_message.Message):
    __slots__ = ("ticket",)
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ticket: bytes
    def __init__(self, ticket: _Optional[bytes] = ...) -> None: ...

class LastChunk(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("token_id", "logprobs", "finish_reason", "cached_tokens", "prefill_queue", "prefill")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_QUEUE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprobs: _inference_pb2.TokenLogprobs
    finish_reason: _inference_pb2.FinishReason
    cached_tokens: int
    prefill_queue: float
    prefill: float
    def __init__(self, token_id: _Optional[int] = ..., logprobs: _Optional[_Union[_inference_pb2.TokenLogprobs, _Mapping]] = ..., finish_reason: _Optional[_Union[_inference_pb2.FinishReason, str]] = ..., cached_tokens: _Optional[int] = ..., prefill_queue: _Optional[float] = ..., prefill: _Optional[float] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("sequence", "ticket", "gateway_id", "handle", "worker_epoch")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    sequence: SequenceSpec
    ticket: bytes
    gateway_id: str
    handle: int
    worker_epoch: int
    def __init__(self, sequence: _Optional[_Union[SequenceSpec, _Mapping]] = ..., ticket: _Optional[bytes] = ..., gateway_id: _Optional[str] = ..., handle: _Optional[int] = ..., worker_epoch: _Optional[int] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("finish_reason", "completion_tokens", "transfer", "decode_queue", "first_decode_step", "ticket")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    DECODE_QUEUE_FIELD_NUMBER: _ClassVar[int]
    FIRST_DECODE_STEP_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    finish_reason: _inference_pb2.FinishReason
    completion_tokens: int
    transfer: float
    decode_queue: float
    first_decode_step: float
    ticket: bytes
    def __init__(self, finish_reason: _Optional[_Union[_inference_pb2.FinishReason, str]] = ..., completion_tokens: _Optional[int] = ..., transfer: _Optional[float] = ..., decode_queue: _Optional[float] = ..., first_decode_step: _Optional[float] = ..., ticket: _Optional[bytes] = ...) -> None: ...

class StreamFramesRequest(_message.Message):
    __slots__ = ("gateway_id", "worker_epoch")
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    worker_epoch: int
    def __init__(self, gateway_id: _Optional[str] = ..., worker_epoch: _Optional[int] = ...) -> None: ...

class StreamFramesResponse(_message.Message):
    __slots__ = ("sequences",)
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedCompositeFieldContainer[SequenceTokens]
    def __init__(self, sequences: _Optional[_Iterable[_Union[SequenceTokens, _Mapping]]] = ...) -> None: ...

class SequenceTokens(_message.Message):
    __slots__ = ("handle", "first_index", "token_ids", "logprobs", "local_prompt")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_PROMPT_FIELD_NUMBER: _ClassVar[int]
    handle: int
    first_index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TokenLogprobs]
    local_prompt: LocalPrompt
    def __init__(self, handle: _Optional[int] = ..., first_index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_inference_pb2.TokenLogprobs, _Mapping]]] = ..., local_prompt: _Optional[_Union[LocalPrompt, _Mapping]] = ...) -> None: ...

class LocalPrompt(_message.Message):
    __slots__ = ("cached_tokens", "prefill_queue", "prefill")
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_QUEUE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    cached_tokens: int
    prefill_queue: float
    prefill: float
    def __init__(self, cached_tokens: _Optional[int] = ..., prefill_queue: _Optional[float] = ..., prefill: _Optional[float] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("status", "held")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    status: _inference_pb2.WorkerStatus
    held: _containers.RepeatedCompositeFieldContainer[_inference_pb2.HeldBlocks]
    def __init__(self, status: _Optional[_Union[_inference_pb2.WorkerStatus, _Mapping]] = ..., held: _Optional[_Iterable[_Union[_inference_pb2.HeldBlocks, _Mapping]]] = ...) -> None: ...
