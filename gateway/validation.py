"""Parses what a client sent, once, into types that cannot hold a bad value; all that is wrong is said at once."""

import hashlib
import math
import re
import secrets
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from gateway.chat_template import ChatMessage
from gateway.tokens import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from kvrelay import wire
from kvrelay.errors import FieldViolation, InvalidArgument, NotFound
from kvrelay.request import Request, Sampling, SamplingParams
from kvrelay.v1 import inference_pb2

__all__ = ["GenerateCall", "ModelDefaults", "parse_generate", "parse_request_id", "resolve"]

MAX_REQUEST_ID = 128
MAX_CACHE_SALT_BYTES = 256
MAX_MESSAGES = 4096
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_BYTES = 256
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGPROBS = 20
MAX_PRIORITY = 1000
MAX_VIOLATIONS = 8  # reported at once; the trailers of a response have little room
LOWEST_TEMPERATURE = 1e-5  # below this, logits divided by it may overflow, and the likeliest token is drawn anyway

Number = TypeVar("Number", int, float)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]+")


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """A GenerateRequest without a wrong value. Only `parse_generate` makes one.

    Attributes:
        request_id: the client's, or a new one.
        model: never empty.
        resume_after_seq: None unless the client reconnects.
        body_digest: SHA-256 in hexadecimal of all but request_id and resume_after_seq; equal for equal requests. It
            tells who guesses the body that the guess is right, so it stays in this process.
    """

    request_id: str
    model: str
    prompt: Prompt
    sampling: SamplingParams
    cache_salt: str
    priority: int
    resume_after_seq: int | None
    body_digest: str


class ModelDefaults(Protocol):
    """What a checkpoint adds to a request; see `gateway.tokens.Tokenizer`."""

    vocab_size: int
    eos_token_ids: frozenset[int]
    default_sampling: SamplingParams


def parse_generate(
    proto: inference_pb2.GenerateRequest, *, model: str, vocab_size: int, context_length: int
) -> GenerateCall:
    """Parses a request.

    Args:
        model: name of the one model that is served.
        vocab_size: of that model.
        context_length: how many tokens prompt and completion may have together.

    Raises:
        NotFound: the request names another model.
        InvalidArgument: with a violation for each wrong field.
    """
    if proto.model not in ("", model):
        raise NotFound(f"model: {_shown(proto.model)} is not served here; {model!r} is", reason="MODEL_NOT_FOUND")
    violations = _Violations()
    _check_identity(proto, violations)
    _check_sampling(proto.sampling, vocab_size, violations)
    prompt = _parse_prompt(proto, vocab_size, context_length, violations)
    violations.raise_if_any()
    return GenerateCall(
        request_id=proto.request_id or uuid.uuid4().hex,
        model=model,
        prompt=prompt,
        sampling=wire.sampling_params_from_proto(proto.sampling),
        cache_salt=proto.cache_salt,
        priority=proto.priority,
        resume_after_seq=proto.resume_after_seq if proto.HasField("resume_after_seq") else None,
        body_digest=_body_digest(proto),
    )


def parse_request_id(request_id: str) -> str:
    """Returns the id that a client gives to name a request it made before.

    Raises:
        InvalidArgument: it is empty or no request can have it.
    """
    violations = _Violations()
    if not request_id:
        violations.add("request_id", "must be given")
    _check_request_id(request_id, violations)
    violations.raise_if_any()
    return request_id


def resolve(
    call: GenerateCall,
    prompt_token_ids: Sequence[int],
    defaults: ModelDefaults,
    context_length: int,
    draw_seed: Callable[[], int] = lambda: secrets.randbits(64),
) -> Request:
    """Decides all that the client and the checkpoint leave open.

    Args:
        prompt_token_ids: the call's prompt, tokenized.
        draw_seed: gives an unsigned 64-bit number where the client gave none.

    Raises:
        InvalidArgument: the prompt has no tokens, unknown tokens, or leaves no room for a completion.
    """
    violations = _Violations()
    _check_token_ids(prompt_token_ids, _prompt_field(call.prompt), defaults.vocab_size, context_length, violations)
    violations.raise_if_any()
    asked, default = call.sampling, defaults.default_sampling
    room = context_length - len(prompt_token_ids)
    temperature = _first_set(asked.temperature, default.temperature, 1.0)
    top_k = _first_set(asked.top_k, default.top_k, 0)
    eos_token_ids = frozenset() if asked.ignore_eos else defaults.eos_token_ids
    sampling = Sampling(
        max_tokens=min(_first_set(asked.max_tokens, None, room), room),
        temperature=temperature if temperature >= LOWEST_TEMPERATURE else 0.0,
        top_p=_first_set(asked.top_p, default.top_p, 1.0),
        top_k=top_k if top_k < defaults.vocab_size else 0,
        min_p=_first_set(asked.min_p, default.min_p, 0.0),
        seed=draw_seed() if asked.seed is None else asked.seed,
        stop_token_ids=frozenset(asked.stop_token_ids) | eos_token_ids,
        logprobs=asked.logprobs,
    )
    return Request(call.request_id, tuple(prompt_token_ids), sampling, call.cache_salt)


class _Violations:
    """Collects what is wrong with a request."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def add(self, field: str, description: str) -> None:
        self._found.append(FieldViolation(field, description))

    def check(self, passed: bool, field: str, description: str) -> None:
        if not passed:
            self.add(field, description)

    def raise_if_any(self) -> None:
        if self._found:
            message = "; ".join(f"{violation.field}: {violation.description}" for violation in self._found[:3])
            more = f"; and {len(self._found) - 3} more" if len(self._found) > 3 else ""
            raise InvalidArgument(message + more, violations=self._found[:MAX_VIOLATIONS])


def _check_identity(proto: inference_pb2.GenerateRequest, violations: _Violations) -> None:
    _check_request_id(proto.request_id, violations)
    salt_bytes = len(proto.cache_salt.encode())
    violations.check(
        salt_bytes <= MAX_CACHE_SALT_BYTES, "cache_salt", f"{salt_bytes} bytes; at most {MAX_CACHE_SALT_BYTES}"
    )
    violations.check(
        abs(proto.priority) <= MAX_PRIORITY,
        "priority",
        f"{proto.priority} is not from -{MAX_PRIORITY} to {MAX_PRIORITY}",
    )
    if proto.HasField("resume_after_seq") and not proto.request_id:
        violations.add("resume_after_seq", "needs the request_id of the request to resume")


def _check_request_id(request_id: str, violations: _Violations) -> None:
    if len(request_id) > MAX_REQUEST_ID:
        violations.add("request_id", f"{len(request_id)} characters; at most {MAX_REQUEST_ID}")
    elif request_id and not _REQUEST_ID.fullmatch(request_id):
        violations.add("request_id", f"{_shown(request_id)} has characters other than A-Z a-z 0-9 . _ : -")


def _check_sampling(proto: inference_pb2.SamplingParams, vocab_size: int, violations: _Violations) -> None:
    if proto.HasField("max_tokens") and proto.max_tokens == 0:
        violations.add("sampling.max_tokens", "0; at least 1")
    if not (math.isfinite(proto.temperature) and proto.temperature >= 0):
        violations.add("sampling.temperature", f"{proto.temperature:g} is not a finite number of at least 0")
    if proto.HasField("top_p") and not 0 < proto.top_p <= 1:
        violations.add("sampling.top_p", f"{proto.top_p:g} is not above 0 and at most 1")
    if not 0 <= proto.min_p <= 1:
        violations.add("sampling.min_p", f"{proto.min_p:g} is not from 0 to 1")
    if proto.logprobs > MAX_LOGPROBS:
        violations.add("sampling.logprobs", f"{proto.logprobs}; at most {MAX_LOGPROBS}")
    _check_stops(proto, vocab_size, violations)


def _check_stops(proto: inference_pb2.SamplingParams, vocab_size: int, violations: _Violations) -> None:
    if len(proto.stop) > MAX_STOP_STRINGS:
        violations.add("sampling.stop", f"{len(proto.stop)} strings; at most {MAX_STOP_STRINGS}")
    for index, string in enumerate(proto.stop[:MAX_STOP_STRINGS]):
        num_bytes = len(string.encode())
        if not 1 <= num_bytes <= MAX_STOP_STRING_BYTES:
            violations.add(f"sampling.stop[{index}]", f"{num_bytes} bytes; from 1 to {MAX_STOP_STRING_BYTES}")
    if len(proto.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        violations.add("sampling.stop_token_ids", f"{len(proto.stop_token_ids)} ids; at most {MAX_STOP_TOKEN_IDS}")
    for index, token_id in enumerate(proto.stop_token_ids[:MAX_STOP_TOKEN_IDS]):
        if token_id >= vocab_size:
            violations.add(f"sampling.stop_token_ids[{index}]", _outside(token_id, vocab_size))


def _parse_prompt(
    proto: inference_pb2.GenerateRequest, vocab_size: int, context_length: int, violations: _Violations
) -> Prompt:
    match proto.WhichOneof("prompt"):
        case "text":
            violations.check(bool(proto.text), "text", "empty; a prompt has at least one character")
            return TextPrompt(proto.text)
        case "token_ids":
            _check_token_ids(proto.token_ids.ids, "token_ids", vocab_size, context_length, violations)
            return TokenPrompt(tuple(proto.token_ids.ids))
        case "chat":
            return _parse_chat(proto.chat, violations)
        case _:
            violations.add("prompt", "one of text, token_ids and chat must be given")
            return TextPrompt("")


def _parse_chat(chat: inference_pb2.Chat, violations: _Violations) -> ChatPrompt:
    if not 1 <= len(chat.messages) <= MAX_MESSAGES:
        violations.add("chat.messages", f"{len(chat.messages)} messages; from 1 to {MAX_MESSAGES}")
        return ChatPrompt(())
    for index, message in enumerate(chat.messages):
        violations.check(bool(message.role), f"chat.messages[{index}].role", "must be given")
    return ChatPrompt(tuple(ChatMessage(message.role, message.content) for message in chat.messages))


def _check_token_ids(
    token_ids: Sequence[int], field: str, vocab_size: int, context_length: int, violations: _Violations
) -> None:
    if not token_ids:
        violations.add(field, "empty; a prompt has at least one token")
    elif len(token_ids) >= context_length:
        most = context_length - 1
        violations.add(field, f"{len(token_ids)} tokens; the context has {context_length}, so a prompt at most {most}")
    elif (largest := max(token_ids)) >= vocab_size:
        position = list(token_ids).index(largest)
        violations.add(field, f"{_outside(largest, vocab_size)} (position {position})")


def _outside(token_id: int, vocab_size: int) -> str:
    return f"token id {token_id} is outside the vocabulary; ids are from 0 to {vocab_size - 1}"


def _prompt_field(prompt: Prompt) -> str:
    match prompt:
        case TextPrompt():
            return "text"
        case TokenPrompt():
            return "token_ids"
        case ChatPrompt():
            return "chat"


def _first_set(asked: Number | None, default: Number | None, otherwise: Number) -> Number:
    """Unset differs from 0."""
    if asked is not None:
        return asked
    return otherwise if default is None else default


def _shown(text: str) -> str:
    """A client's text, short and without control characters."""
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _body_digest(proto: inference_pb2.GenerateRequest) -> str:
    body = inference_pb2.GenerateRequest()
    body.CopyFrom(proto)
    body.ClearField("request_id")
    body.ClearField("resume_after_seq")
    return hashlib.sha256(body.SerializeToString(deterministic=True)).hexdigest()
