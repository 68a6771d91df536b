import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from kvrelay import wire
from kvrelay.errors import InvalidArgument, KvrelayError
from kvrelay.request import FinishReason, Request, Sampling, SamplingParams, Timings, TokenLogprobs, Usage
from kvrelay.v1 import inference_pb2, worker_pb2


def test_sampling_params_survive_the_round_trip_and_unset_differs_from_zero() -> None:
    params = SamplingParams(max_tokens=1, temperature=0.0, top_k=0, seed=2**64 - 1, stop=("a",), stop_token_ids=(2,))
    proto = wire.sampling_params_to_proto(params)
    again = wire.sampling_params_from_proto(inference_pb2.SamplingParams.FromString(proto.SerializeToString()))
    assert again == params
    assert wire.sampling_params_from_proto(inference_pb2.SamplingParams()) == SamplingParams()


@pytest.mark.parametrize("logprobs", [None, 0, 5])
def test_a_request_survives_the_round_trip(logprobs: int | None) -> None:
    sampling = Sampling(
        max_tokens=3,
        temperature=0.5,
        top_p=0.25,
        top_k=4,
        min_p=0.125,
        seed=2**63,
        stop_token_ids=frozenset({9, 1}),
        logprobs=logprobs,
    )
    request = Request("r", (1, 2, 3), sampling, cache_salt="s")
    proto = wire.request_to_proto(request, traceparent="00-1")
    assert proto.traceparent == "00-1"
    assert wire.request_from_proto(worker_pb2.SequenceSpec.FromString(proto.SerializeToString())) == request


def test_answers_survive_the_round_trip() -> None:
    logprobs = TokenLogprobs(1, -0.5, ((2, -0.25), (3, -4.0)))
    assert wire.logprobs_from_proto(wire.logprobs_to_proto(logprobs)) == logprobs
    assert wire.usage_from_proto(wire.usage_to_proto(Usage(1, 2, 3))) == Usage(1, 2, 3)
    timings = Timings(*(number / 8 for number in range(8)))
    assert wire.timings_from_proto(wire.timings_to_proto(timings)) == timings
    for reason in (None, *FinishReason):
        assert wire.finish_reason_from_proto(wire.finish_reason_to_proto(reason)) is reason


def test_a_first_token_has_log_probabilities_only_if_they_came() -> None:
    assert wire.token_from_proto(worker_pb2.FirstToken(token_id=4)).logprobs is None
    logprobs = TokenLogprobs(4, -1.0)
    proto = worker_pb2.FirstToken(token_id=4, logprobs=wire.logprobs_to_proto(logprobs))
    assert wire.token_from_proto(proto).logprobs == logprobs


def test_a_value_that_does_not_fit_names_its_field_and_shows_little_of_it() -> None:
    with pytest.raises(InvalidArgument) as caught:
        wire.generate_request_to_proto(model="\ud800" * 10_000)
    [violation] = caught.value.violations
    assert violation.field == "model"
    assert len(violation.description) < 300
    assert violation.description.isascii()


@pytest.mark.parametrize("seconds", [0.0, 0.029, 1.5, 3600.0])
def test_a_retry_time_survives_to_the_millisecond(seconds: float) -> None:
    status = wire.error_to_status(KvrelayError("later", retry_after=seconds))
    assert wire.error_from_status(status).retry_after == seconds


def test_a_status_of_another_make_is_still_an_error() -> None:
    unknown = any_pb2.Any()
    unknown.Pack(error_details_pb2.DebugInfo(detail="d"))
    error = wire.error_from_status(status_pb2.Status(code=12345, message="m", details=[unknown]))
    assert type(error) is KvrelayError
    assert (error.message, error.reason, error.retry_after) == ("m", "UNKNOWN", None)
