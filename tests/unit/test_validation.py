"""Every bad request is refused with the field, the value's problem and the limit; every good one is parsed."""

import math
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
from google.protobuf.message import DecodeError

from gateway.chat_template import ChatMessage
from gateway.request_bytes import generate_request_from_bytes
from gateway.tokens import ChatPrompt, TextPrompt, TokenPrompt
from gateway.validation import GenerateCall, parse_generate, parse_request_id, resolve
from kvrelay.errors import InvalidArgument, NotFound
from kvrelay.request import Sampling, SamplingParams
from kvrelay.v1 import inference_pb2

VOCAB_SIZE = 100
CONTEXT_LENGTH = 32
MAX_UINT32, MAX_UINT64 = 2**32 - 1, 2**64 - 1


def request(**fields: Any) -> inference_pb2.GenerateRequest:
    if not {"text", "token_ids", "chat"} & fields.keys():
        fields["text"] = "Once"
    return inference_pb2.GenerateRequest(**fields)


def sampling(**fields: Any) -> inference_pb2.GenerateRequest:
    return request(sampling=inference_pb2.SamplingParams(**fields))


def tokens(*ids: int) -> inference_pb2.GenerateRequest:
    return request(token_ids=inference_pb2.TokenIds(ids=ids))


def chat(*roles: str) -> inference_pb2.GenerateRequest:
    messages = [inference_pb2.ChatMessage(role=role, content="hi") for role in roles]
    return request(chat=inference_pb2.Chat(messages=messages))


def parse(proto: inference_pb2.GenerateRequest) -> GenerateCall:
    return parse_generate(proto, model="demo", vocab_size=VOCAB_SIZE, context_length=CONTEXT_LENGTH)


BAD = {
    "no prompt": (inference_pb2.GenerateRequest(), "prompt", "one of"),
    "empty text": (request(text=""), "text", "empty"),
    "no token ids": (tokens(), "token_ids", "empty"),
    "no messages": (chat(), "chat.messages", "from 1 to 4096"),
    "too many messages": (chat(*["user"] * 4097), "chat.messages", "4097"),
    "a message without a role": (chat("system", "user", ""), "chat.messages[2].role", "must be given"),
    "token id outside the vocabulary": (tokens(1, 100, 2), "token_ids", "100.*0 to 99.*position 1"),
    "largest token id": (tokens(MAX_UINT32), "token_ids", str(MAX_UINT32)),
    "prompt fills the context": (tokens(*[1] * 32), "token_ids", "32 tokens; the context has 32.*31"),
    "max_tokens 0": (sampling(max_tokens=0), "sampling.max_tokens", "at least 1"),
    "temperature NaN": (sampling(temperature=math.nan), "sampling.temperature", "nan"),
    "temperature infinite": (sampling(temperature=math.inf), "sampling.temperature", "inf"),
    "temperature negative": (sampling(temperature=-0.5), "sampling.temperature", "-0.5"),
    "top_p 0": (sampling(top_p=0), "sampling.top_p", "above 0"),
    "top_p above 1": (sampling(top_p=1.5), "sampling.top_p", "at most 1"),
    "top_p NaN": (sampling(top_p=math.nan), "sampling.top_p", "nan"),
    "top_p negative": (sampling(top_p=-1), "sampling.top_p", "-1"),
    "min_p negative": (sampling(min_p=-0.1), "sampling.min_p", "-0.1"),
    "min_p above 1": (sampling(min_p=1.1), "sampling.min_p", "from 0 to 1"),
    "min_p NaN": (sampling(min_p=math.nan), "sampling.min_p", "nan"),
    "stop id outside the vocabulary": (sampling(stop_token_ids=[1, 100]), "sampling.stop_token_ids[1]", "0 to 99"),
    "too many stop ids": (sampling(stop_token_ids=[1] * 1025), "sampling.stop_token_ids", "at most 1024"),
    "empty stop string": (sampling(stop=["a", ""]), "sampling.stop[1]", "0 bytes"),
    "too many stop strings": (sampling(stop=["a"] * 17), "sampling.stop", "17 strings; at most 16"),
    "stop string too long": (sampling(stop=["é" * 129]), "sampling.stop[0]", "258 bytes.*256"),
    "logprobs above 20": (sampling(logprobs=21), "sampling.logprobs", "at most 20"),
    "request id too long": (request(request_id="a" * 129), "request_id", "129 characters; at most 128"),
    "request id with other characters": (request(request_id="a/b"), "request_id", "'a/b'"),
    "request id with a newline": (request(request_id="a\n"), "request_id", re.escape(r"'a\n'")),
    "request id of letters that are not ASCII": (request(request_id="é"), "request_id", "other than"),
    "cache salt too long": (request(cache_salt="é" * 129), "cache_salt", "258 bytes; at most 256"),
    "priority too high": (request(priority=1001), "priority", "-1000 to 1000"),
    "priority too low": (request(priority=-1001), "priority", "-1000 to 1000"),
    "resumes nothing": (request(resume_after_seq=1), "resume_after_seq", "request_id"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_is_named(case: str) -> None:
    proto, where, problem = BAD[case]
    with pytest.raises(InvalidArgument) as caught:
        parse(proto)
    [violation] = caught.value.violations
    assert violation.field == where
    assert re.search(problem, violation.description)
    assert caught.value.message == f"{where}: {violation.description}"


def test_all_bad_values_are_named_at_once() -> None:
    proto = request(request_id="a b", text="", sampling=inference_pb2.SamplingParams(top_p=0, stop=[""], max_tokens=0))
    with pytest.raises(InvalidArgument) as caught:
        parse(proto)
    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["request_id", "sampling.max_tokens", "sampling.top_p", "sampling.stop[0]", "text"]
    assert caught.value.message.endswith("and 2 more")


def test_an_answer_stays_small_whatever_is_wrong() -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(sampling(stop_token_ids=[MAX_UINT32] * 1024))
    assert len(caught.value.violations) == 8


def test_another_model_is_not_found() -> None:
    with pytest.raises(NotFound, match="'gpt-5' is not served here; 'demo' is"):
        parse(request(model="gpt-5"))
    assert parse(request(model="demo")).model == parse(request()).model == "demo"


GOOD = {
    "one below the context": tokens(*[1] * 31),
    "largest token id of the vocabulary": tokens(0, 99),
    "max_tokens at its largest": sampling(max_tokens=MAX_UINT32),
    "temperature tiny and huge": sampling(temperature=1e-45, seed=MAX_UINT64, top_k=MAX_UINT32),
    "temperature huge": sampling(temperature=3e38),
    "bounds": sampling(top_p=1, min_p=1, logprobs=20, stop=["é" * 128] * 16, stop_token_ids=[0, 99]),
    "lower bounds": sampling(top_p=1e-30, min_p=0, logprobs=0, temperature=0, max_tokens=1),
    "identity": request(request_id="aZ09._:-" * 16, cache_salt="s" * 256, priority=-1000),
    "control bytes": request(text="\x00\x1b[2J"),
    "chat": chat("system", "user", "assistant", "anything"),
}


@pytest.mark.parametrize("case", GOOD)
def test_a_value_at_its_limit_passes(case: str) -> None:
    parse(GOOD[case])


def test_prompts() -> None:
    assert parse(request(text="a")).prompt == TextPrompt("a")
    assert parse(tokens(5, 6)).prompt == TokenPrompt((5, 6))
    assert parse(chat("user")).prompt == ChatPrompt((ChatMessage("user", "hi"),))


def test_identity() -> None:
    call = parse(request(request_id="mine", cache_salt="s", priority=3, resume_after_seq=0))
    assert (call.request_id, call.cache_salt, call.priority) == ("mine", "s", 3)
    assert call.resume_after_seq == 0
    nameless = [parse(request()) for _ in range(2)]
    assert nameless[0].request_id != nameless[1].request_id
    assert nameless[0].resume_after_seq is None
    assert parse_request_id(nameless[0].request_id) == nameless[0].request_id


def test_the_digest_is_that_of_the_body() -> None:
    body = {"text": "a", "cache_salt": "s"}
    digest = parse(request(**body)).body_digest
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert parse(request(**body, request_id="x", resume_after_seq=7)).body_digest == digest
    others = [
        request(text="b", cache_salt="s"),
        request(text="a", cache_salt="t"),
        request(**body, sampling=inference_pb2.SamplingParams(temperature=0)),
        request(**body, sampling=inference_pb2.SamplingParams()),
        request(**body, priority=0),
    ]
    assert len({digest, *(parse(other).body_digest for other in others)}) == 6


@pytest.mark.parametrize("request_id", ["", "a b", "x" * 129])
def test_an_id_that_no_request_can_have(request_id: str) -> None:
    with pytest.raises(InvalidArgument, match="request_id: "):
        parse_request_id(request_id)


@dataclass
class Defaults:
    vocab_size: int = VOCAB_SIZE
    eos_token_ids: frozenset[int] = frozenset({1, 2})
    default_sampling: SamplingParams = field(
        default_factory=lambda: SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.1)
    )


def sampling_of(defaults: Defaults, num_prompt_tokens: int = 10, **fields: Any) -> Sampling:
    call = parse(sampling(**fields))
    return resolve(call, [3] * num_prompt_tokens, defaults, CONTEXT_LENGTH, lambda: 42).sampling


def test_what_is_unset_comes_from_the_checkpoint() -> None:
    expected = Sampling(
        max_tokens=22, temperature=0.8, top_p=0.9, top_k=20, min_p=0.1, seed=42, stop_token_ids=frozenset({1, 2})
    )
    assert sampling_of(Defaults()) == expected


def test_what_the_checkpoint_leaves_open_too_has_a_default() -> None:
    bare = Defaults(eos_token_ids=frozenset(), default_sampling=SamplingParams())
    assert sampling_of(bare) == Sampling(max_tokens=22, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, seed=42)


def test_zero_is_not_unset() -> None:
    found = sampling_of(Defaults(), temperature=0, top_k=0, min_p=0, seed=0, logprobs=0, ignore_eos=False)
    assert (found.temperature, found.top_k, found.min_p, found.seed, found.logprobs) == (0.0, 0, 0.0, 0, 0)
    assert sampling_of(Defaults()).logprobs is None


def test_what_the_client_sets_wins() -> None:
    found = sampling_of(
        Defaults(), max_tokens=5, temperature=0.5, top_p=0.25, top_k=7, seed=MAX_UINT64, ignore_eos=True
    )
    assert (found.max_tokens, found.temperature, found.top_p, found.top_k) == (5, 0.5, 0.25, 7)
    assert (found.seed, found.stop_token_ids) == (MAX_UINT64, frozenset())


def test_stop_ids_join_the_end_of_sequence() -> None:
    assert sampling_of(Defaults(), stop_token_ids=[7]).stop_token_ids == {1, 2, 7}
    assert sampling_of(Defaults(), stop_token_ids=[7], ignore_eos=True).stop_token_ids == {7}


def test_extremes_become_what_they_mean() -> None:
    found = sampling_of(Defaults(), max_tokens=MAX_UINT32, top_k=MAX_UINT32, temperature=1e-45)
    assert (found.max_tokens, found.top_k, found.temperature) == (22, 0, 0.0)
    assert sampling_of(Defaults(), num_prompt_tokens=31).max_tokens == 1


def test_a_seed_is_drawn_for_each_request() -> None:
    call = parse(request())
    seeds = {resolve(call, [3], Defaults(), CONTEXT_LENGTH).sampling.seed for _ in range(4)}
    assert len(seeds) == 4
    assert all(0 <= seed <= MAX_UINT64 for seed in seeds)


@pytest.mark.parametrize(
    ("proto", "token_ids", "where", "problem"),
    [
        (request(text="x" * 40), [3] * 40, "text", "40 tokens; the context has 32.*31"),
        (chat("user"), [3] * 32, "chat", "32 tokens; the context has 32"),
        (request(text=" "), [], "text", "at least one token"),
        (request(text="<new>"), [3, 100], "text", "token id 100"),
    ],
)
def test_a_prompt_that_is_wrong_once_tokenized(
    proto: inference_pb2.GenerateRequest, token_ids: list[int], where: str, problem: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        resolve(parse(proto), token_ids, Defaults(), CONTEXT_LENGTH)
    [violation] = caught.value.violations
    assert violation.field == where
    assert re.search(problem, violation.description)


def test_the_request_that_workers_get() -> None:
    found = resolve(parse(request(request_id="r", cache_salt="s")), [3, 4], Defaults(), CONTEXT_LENGTH)
    assert (found.request_id, found.prompt_token_ids, found.cache_salt) == ("r", (3, 4), "s")


def test_two_prompts_are_seen_in_the_bytes() -> None:
    text, ids = request(text="a"), tokens(1, 2)
    both = text.SerializeToString() + ids.SerializeToString()
    with pytest.raises(InvalidArgument, match="prompt: text and token_ids are both given"):
        generate_request_from_bytes(both)
    unknown = bytes([0xFB, 0x01, 0x1A, 0x01, 0x61, 0xFC, 0x01])  # a group that nobody knows, with a field 3 in it
    for data in (text.SerializeToString(), text.SerializeToString() * 2, ids.SerializeToString() + unknown):
        assert generate_request_from_bytes(data) == inference_pb2.GenerateRequest.FromString(data)


@pytest.mark.parametrize("data", [b"\x1a\x05a", b"\x1a\x02\xff\xfe", b"\xff" * 20])
def test_malformed_bytes_are_the_parsers_affair(data: bytes) -> None:
    with pytest.raises(DecodeError):
        generate_request_from_bytes(data)


def test_every_field_is_walked_over() -> None:
    proto = request(
        request_id="r", model="m", priority=-5, cache_salt="s", resume_after_seq=2**63,
        sampling=inference_pb2.SamplingParams(temperature=0.5, seed=1), chat=inference_pb2.Chat(),
    )  # fmt: skip
    data = proto.SerializeToString() + bytes([0xA1, 0x06]) + bytes(8) + bytes([0xA5, 0x06]) + bytes(4)
    with pytest.raises(InvalidArgument):
        generate_request_from_bytes(data + request(text="a").SerializeToString())
    assert generate_request_from_bytes(data).request_id == "r"
