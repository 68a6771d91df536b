"""Errors as google.rpc.Status with its standard details, and back."""

from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from kvrelay.errors import FieldViolation, KvrelayError, error_for_code

__all__ = ["error_from_status", "error_to_status"]

ERROR_DOMAIN = "kvrelay"


def error_to_status(error: KvrelayError) -> status_pb2.Status:
    """The error as google.rpc.Status with ErrorInfo and, where they apply, BadRequest and RetryInfo."""
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code), message=error.message)
    details: list[error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=error.metadata)
    ]
    if error.violations:
        fields = [
            error_details_pb2.BadRequest.FieldViolation(field=violation.field, description=violation.description)
            for violation in error.violations
        ]
        details.append(error_details_pb2.BadRequest(field_violations=fields))
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(error.retry_after * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def error_from_status(status: status_pb2.Status) -> KvrelayError:
    """The inverse of `error_to_status`; details of other kinds are passed over."""
    info, bad_request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    retry_after: float | None = None
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad_request)
        if detail.Unpack(retry):
            retry_after = retry.retry_delay.ToMilliseconds() / 1000
    code = code_pb2.Code.Name(status.code) if status.code in code_pb2.Code.values() else "UNKNOWN"
    return error_for_code(code)(
        status.message,
        reason=info.reason,
        metadata=info.metadata,
        violations=[FieldViolation(entry.field, entry.description) for entry in bad_request.field_violations],
        retry_after=retry_after,
    )
