"""What both clients share: everything that is not input or output."""

import dataclasses
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypedDict, TypeVar

from kvrelay import wire
from kvrelay.errors import Internal, InvalidArgument
from kvrelay.request import Chunk, FinishReason, SamplingParams, Timings, TokenLogprobs, Usage
from kvrelay.v1 import inference_pb2

__all__ = [
    "HELD_BLOCKS",
    "LIST_MODELS",
    "STATUS",
    "BaseClient",
    "Completion",
    "GenerateOptions",
    "UnaryCall",
    "abort",
    "completion",
    "generate_request",
]

DEFAULT_TARGET = "localhost:50051"
_METADATA_KEY = re.compile(r"[0-9a-z_.-]+")
_METADATA_TEXT = re.compile(r"[ -~]*")

_Response = TypeVar("_Response")


class GenerateOptions(TypedDict, total=False):
    """Keywords of `generate` and `complete`. None means the same as leaving it out.

    The sampling parameters are those of `kvrelay.v1.SamplingParams`; `stop` may be one string. The others:

    Attributes:
        token_ids: the prompt as tokens.
        messages: the prompt as a chat; each message is a mapping with role and content.
        model: may be left out while one model is served.
        sampling: where parameters come from that have no keyword of their own.
        cache_salt: cached prefixes are shared only among equal salts.
        priority: higher first.
        resume_after_seq: reconnect to the request of this request_id; the chunks after this seq are sent again.
        request_id: one id runs once; made by the client if left out.
    """

    token_ids: Iterable[int] | None
    messages: Iterable[Mapping[str, str]] | None
    model: str | None
    sampling: SamplingParams | None
    cache_salt: str | None
    priority: int | None
    resume_after_seq: int | None
    request_id: str | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    logprobs: int | None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. logprobs has one entry for each of token_ids if they were asked for, else none."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True)
class UnaryCall(Generic[_Response]):
    """The stub's method, what it sends, and what becomes of the answer."""

    method: str
    request: Any
    parse: Callable[[Any], _Response]


LIST_MODELS = UnaryCall("ListModels", inference_pb2.ListModelsRequest(), wire.models_from_proto)
STATUS = UnaryCall("GetClusterStatus", inference_pb2.GetClusterStatusRequest(), wire.cluster_status_from_proto)
HELD_BLOCKS = UnaryCall("ListHeldBlocks", inference_pb2.ListHeldBlocksRequest(), wire.held_blocks_from_proto)


def abort(request_id: str) -> UnaryCall[None]:
    return UnaryCall("Abort", wire.abort_request_to_proto(request_id), lambda response: None)


class BaseClient:
    """Where the server is, and what every call is given."""

    def __init__(self, target: str | None = None, *, timeout: float | None = None) -> None:
        """Connects with the first call.

        Args:
            target: host:port; the environment's KVRELAY_TARGET if left out, else localhost:50051.
            timeout: seconds that a call may take unless it says otherwise; None sets no limit.
        """
        self.target = target or os.environ.get("KVRELAY_TARGET") or DEFAULT_TARGET
        self._timeout = timeout
        self._closed = False

    def _call_settings(self, timeout: float | None = None, metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
        """What each call is given beside its request. Raises RuntimeError once the client is closed."""
        if self._closed:
            raise RuntimeError("the client is closed")
        return {"timeout": self._timeout if timeout is None else timeout, "metadata": _metadata(metadata or {})}


def generate_request(
    prompt: str | None,
    *,
    token_ids: Iterable[int] | None = None,
    messages: Iterable[Mapping[str, str]] | None = None,
    model: str | None = None,
    sampling: SamplingParams | None = None,
    cache_salt: str | None = None,
    priority: int | None = None,
    resume_after_seq: int | None = None,
    request_id: str | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    **parameters: Any,
) -> inference_pb2.GenerateRequest:
    """Raises InvalidArgument for a value that fits no field, and TypeError for a keyword that nobody knows."""
    parameters["stop"] = (stop,) if isinstance(stop, str) else stop and tuple(stop)
    parameters["stop_token_ids"] = stop_token_ids and tuple(stop_token_ids)
    given = {name: value for name, value in parameters.items() if value is not None}
    return wire.generate_request_to_proto(
        prompt=prompt,
        token_ids=token_ids,
        messages=messages,
        sampling=dataclasses.replace(sampling or SamplingParams(), **given),
        model=model or "",
        cache_salt=cache_salt or "",
        priority=priority,
        resume_after_seq=resume_after_seq,
        # Made here rather than by the server, so that the caller can abort before the first chunk.
        request_id=request_id or uuid.uuid4().hex,
    )


def completion(chunks: Sequence[Chunk]) -> Completion:
    """Joins the chunks of one request. Raises Internal if the last one is missing."""
    last = chunks[-1] if chunks else None
    if last is None or last.finish_reason is None:
        raise Internal("the stream ended without a finish reason")
    return Completion(
        request_id=last.request_id,
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token_id for chunk in chunks for token_id in chunk.token_ids),
        logprobs=tuple(logprobs for chunk in chunks for logprobs in chunk.logprobs),
        finish_reason=last.finish_reason,
        usage=last.usage or Usage(),
        timings=last.timings or Timings(),
    )


def _metadata(metadata: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Checked here because the sync and the asyncio channel refuse bad metadata each in its own way."""
    entries = tuple((key.lower(), value) for key, value in metadata.items())
    for key, value in entries:
        if not _METADATA_KEY.fullmatch(key) or key.endswith("-bin") or not _METADATA_TEXT.fullmatch(value):
            raise InvalidArgument.field("metadata", f"{key!a} needs a name of 0-9 a-z _ . - and a value in ASCII")
    return entries
