"""A request on its way to the workers, and its tokens on their way back."""

from collections.abc import Sequence

from kvrelay.request import Chunk, FinishReason, Request, Sampling, Timings, Token, TokenLogprobs, Usage
from kvrelay.v1 import inference_pb2, worker_pb2
from kvrelay.wire.mirror import fields, mirror

__all__ = [
    "chunk_from_proto",
    "chunk_to_proto",
    "finish_reason_from_proto",
    "finish_reason_to_proto",
    "logprobs_from_proto",
    "logprobs_to_proto",
    "request_from_proto",
    "request_to_proto",
    "timings_from_proto",
    "timings_to_proto",
    "token_from_proto",
    "tokens_from_proto",
    "usage_from_proto",
    "usage_to_proto",
]

_FINISH_REASONS = {
    None: inference_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: inference_pb2.FINISH_REASON_ABORT,
}
_FINISH_REASONS_BACK = {value: reason for reason, value in _FINISH_REASONS.items()}


def request_to_proto(request: Request, traceparent: str = "") -> worker_pb2.SequenceSpec:
    sampling = request.sampling
    return worker_pb2.SequenceSpec(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        sampling=worker_pb2.Sampling(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=sampling.seed,
            stop_token_ids=sorted(sampling.stop_token_ids),
            logprobs=sampling.logprobs,
        ),
        cache_salt=request.cache_salt,
        traceparent=traceparent,
        completion_token_ids=request.completion_token_ids,
    )


def request_from_proto(proto: worker_pb2.SequenceSpec) -> Request:
    sampling = proto.sampling
    return Request(
        request_id=proto.request_id,
        prompt_token_ids=tuple(proto.prompt_token_ids),
        sampling=Sampling(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=sampling.seed,
            stop_token_ids=frozenset(sampling.stop_token_ids),
            logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        ),
        cache_salt=proto.cache_salt,
        completion_token_ids=tuple(proto.completion_token_ids),
    )


def logprobs_to_proto(logprobs: TokenLogprobs) -> inference_pb2.TokenLogprobs:
    return inference_pb2.TokenLogprobs(
        chosen=inference_pb2.TokenLogprob(token_id=logprobs.token_id, logprob=logprobs.logprob),
        top=[inference_pb2.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in logprobs.top],
    )


def logprobs_from_proto(proto: inference_pb2.TokenLogprobs) -> TokenLogprobs:
    top = tuple((entry.token_id, entry.logprob) for entry in proto.top)
    return TokenLogprobs(proto.chosen.token_id, proto.chosen.logprob, top)


def token_from_proto(proto: worker_pb2.FirstToken) -> Token:
    logprobs = logprobs_from_proto(proto.logprobs) if proto.HasField("logprobs") else None
    return Token(proto.token_id, logprobs)


def tokens_from_proto(proto: worker_pb2.SequenceTokens) -> Sequence[Token]:
    if not proto.logprobs:
        return [Token(token_id) for token_id in proto.token_ids]
    logprobs = map(logprobs_from_proto, proto.logprobs)
    return [Token(token_id, entry) for token_id, entry in zip(proto.token_ids, logprobs, strict=True)]


def finish_reason_to_proto(reason: FinishReason | None) -> inference_pb2.FinishReason:
    return _FINISH_REASONS[reason]


def finish_reason_from_proto(value: inference_pb2.FinishReason) -> FinishReason | None:
    """None for UNSPECIFIED and for values that this version does not know."""
    return _FINISH_REASONS_BACK.get(value)


def usage_to_proto(usage: Usage) -> inference_pb2.Usage:
    return inference_pb2.Usage(**fields(usage))


def usage_from_proto(proto: inference_pb2.Usage) -> Usage:
    return mirror(Usage, proto)


def timings_to_proto(timings: Timings) -> inference_pb2.Timings:
    return inference_pb2.Timings(**fields(timings))


def timings_from_proto(proto: inference_pb2.Timings) -> Timings:
    return mirror(Timings, proto)


def chunk_to_proto(chunk: Chunk) -> inference_pb2.GenerateResponse:
    return inference_pb2.GenerateResponse(
        request_id=chunk.request_id,
        seq=chunk.seq,
        text=chunk.text,
        token_ids=chunk.token_ids,
        logprobs=[logprobs_to_proto(entry) for entry in chunk.logprobs],
        finish_reason=finish_reason_to_proto(chunk.finish_reason),
        usage=None if chunk.usage is None else usage_to_proto(chunk.usage),
        timings=None if chunk.timings is None else timings_to_proto(chunk.timings),
    )


def chunk_from_proto(proto: inference_pb2.GenerateResponse) -> Chunk:
    return Chunk(
        request_id=proto.request_id,
        seq=proto.seq,
        text=proto.text,
        token_ids=tuple(proto.token_ids),
        logprobs=tuple(map(logprobs_from_proto, proto.logprobs)),
        finish_reason=finish_reason_from_proto(proto.finish_reason),
        usage=usage_from_proto(proto.usage) if proto.HasField("usage") else None,
        timings=timings_from_proto(proto.timings) if proto.HasField("timings") else None,
    )
