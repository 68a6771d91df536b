"""The exceptions of kvrelay, each with its gRPC status code.

KvrelayError
 ├─ InvalidArgument       a field of the request is wrong; names each field
 ├─ Unauthenticated
 ├─ PermissionDenied
 ├─ NotFound
 ├─ AlreadyExists         the request id has been used for something else
 ├─ FailedPrecondition    the system is not in the state that the call needs
 ├─ OutOfRange
 ├─ ResourceExhausted     try again later; says when
 ├─ Unavailable           a worker or Redis is gone, or the server drains; another try may work
 ├─ DeadlineExceeded
 ├─ Cancelled
 ├─ Unimplemented
 └─ Internal              a defect; says where, never the Python text

ConfigurationError stands apart: it never crosses a wire, it ends the process with exit code 2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "AlreadyExists",
    "Cancelled",
    "ConfigurationError",
    "DeadlineExceeded",
    "FailedPrecondition",
    "FieldViolation",
    "Internal",
    "InvalidArgument",
    "KvrelayError",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "ResourceExhausted",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "error_for_code",
]


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request and what is wrong with its value."""

    field: str
    description: str


class KvrelayError(Exception):
    """Base of all errors that cross a wire.

    Attributes:
        code: name of the gRPC status code, as in `grpc.StatusCode`.
        message: for the user; names no internals.
        reason: a stable word for programs, in UPPER_SNAKE_CASE (google.rpc.ErrorInfo.reason).
        metadata: what else a program may want to know, such as the stage and the worker.
        violations: the fields that are wrong (google.rpc.BadRequest).
        retry_after: seconds to wait before another try (google.rpc.RetryInfo).
    """

    code = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[FieldViolation] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.code
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after = retry_after


class InvalidArgument(KvrelayError):
    code = "INVALID_ARGUMENT"

    @classmethod
    def field(cls, field: str, description: str) -> "InvalidArgument":
        """An error about one field."""
        return cls(f"{field}: {description}", violations=[FieldViolation(field, description)])


class Unauthenticated(KvrelayError):
    code = "UNAUTHENTICATED"


class PermissionDenied(KvrelayError):
    code = "PERMISSION_DENIED"


class NotFound(KvrelayError):
    code = "NOT_FOUND"


class AlreadyExists(KvrelayError):
    code = "ALREADY_EXISTS"


class FailedPrecondition(KvrelayError):
    code = "FAILED_PRECONDITION"


class OutOfRange(KvrelayError):
    code = "OUT_OF_RANGE"


class ResourceExhausted(KvrelayError):
    code = "RESOURCE_EXHAUSTED"


class Unavailable(KvrelayError):
    code = "UNAVAILABLE"


class DeadlineExceeded(KvrelayError):
    code = "DEADLINE_EXCEEDED"


class Cancelled(KvrelayError):
    code = "CANCELLED"


class Unimplemented(KvrelayError):
    code = "UNIMPLEMENTED"


class Internal(KvrelayError):
    code = "INTERNAL"


_BY_CODE: dict[str, type[KvrelayError]] = {cls.code: cls for cls in KvrelayError.__subclasses__()}


def error_for_code(code: str) -> type[KvrelayError]:
    """The class for a gRPC status code's name; KvrelayError itself for a code that kvrelay does not use."""
    return _BY_CODE.get(code, KvrelayError)


class ConfigurationError(Exception):
    """A setting, a checkpoint or a machine that cannot work. Ends the process with exit code 2."""
