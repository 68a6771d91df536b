"""What a client sends: building the messages from Python values, and reading the sampling parameters back."""

import reprlib
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.message import Message

from kvrelay.errors import InvalidArgument
from kvrelay.request import SamplingParams
from kvrelay.v1 import inference_pb2

__all__ = [
    "abort_request_to_proto",
    "generate_request_to_proto",
    "sampling_params_from_proto",
    "sampling_params_to_proto",
]

_OPTIONAL_SCALARS = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos", "logprobs")


def sampling_params_to_proto(params: SamplingParams) -> inference_pb2.SamplingParams:
    """Raises InvalidArgument if a value does not fit its proto field."""
    proto = inference_pb2.SamplingParams()
    for name in _OPTIONAL_SCALARS:
        _set(proto, name, getattr(params, name))
    _extend(proto.stop, "stop", params.stop)
    _extend(proto.stop_token_ids, "stop_token_ids", params.stop_token_ids)
    return proto


def sampling_params_from_proto(proto: inference_pb2.SamplingParams) -> SamplingParams:
    scalars = {name: getattr(proto, name) for name in _OPTIONAL_SCALARS if proto.HasField(name)}
    return SamplingParams(stop=tuple(proto.stop), stop_token_ids=tuple(proto.stop_token_ids), **scalars)


def generate_request_to_proto(
    *,
    prompt: str | None = None,
    token_ids: Iterable[int] | None = None,
    messages: Iterable[Mapping[str, str]] | None = None,
    sampling: SamplingParams | None = None,
    model: str = "",
    cache_salt: str = "",
    priority: int | None = None,
    resume_after_seq: int | None = None,
    request_id: str = "",
) -> inference_pb2.GenerateRequest:
    """Raises InvalidArgument for more than one of prompt, token_ids and messages, or a value that fits no field."""
    if sum(given is not None for given in (prompt, token_ids, messages)) > 1:
        raise InvalidArgument.field("prompt", "give one of prompt, token_ids and messages, not several")
    proto = inference_pb2.GenerateRequest(sampling=sampling_params_to_proto(sampling or SamplingParams()))
    _set(proto, "request_id", request_id)
    _set(proto, "model", model)
    _set(proto, "cache_salt", cache_salt)
    _set(proto, "priority", priority)
    _set(proto, "resume_after_seq", resume_after_seq)
    _set(proto, "text", prompt, called="prompt")
    if token_ids is not None:
        proto.token_ids.SetInParent()  # an empty list is a prompt too, and the server's to refuse
        _extend(proto.token_ids.ids, "token_ids", token_ids)
    if messages is not None:
        proto.chat.SetInParent()
        for position, message in enumerate(messages):
            _add_message(proto.chat, f"messages[{position}]", message)
    return proto


def abort_request_to_proto(request_id: str) -> inference_pb2.AbortRequest:
    """Raises InvalidArgument if the id is no text."""
    proto = inference_pb2.AbortRequest()
    _set(proto, "request_id", request_id)
    return proto


def _add_message(chat: inference_pb2.Chat, field: str, message: Mapping[str, str]) -> None:
    proto = chat.messages.add()
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        raise InvalidArgument.field(field, "needs role and content, and nothing else")
    for name, value in message.items():
        _set(proto, name, value, called=f"{field}.{name}")


def _set(proto: Message, name: str, value: object, *, called: str = "") -> None:
    """Sets a scalar field unless the value is None."""
    if value is None:
        return
    try:
        setattr(proto, name, value)
    except (TypeError, ValueError) as error:
        raise _does_not_fit(called or name, value) from error


def _extend(repeated: Any, name: str, values: Iterable[object]) -> None:
    try:
        repeated.extend(values)
    except (TypeError, ValueError) as error:
        raise InvalidArgument.field(name, "holds a value that does not fit the field's type") from error


def _does_not_fit(field: str, value: object) -> InvalidArgument:
    shown = reprlib.repr(value).encode("ascii", "backslashreplace").decode()
    return InvalidArgument.field(field, f"{shown} does not fit the field's type")
