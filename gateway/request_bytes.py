"""Finds two prompts in a serialized request, which a parsed one cannot show: of a oneof the parser keeps the last.

The encoding is that of https://protobuf.dev/programming-guides/encoding/.
"""

from collections.abc import Iterator
from itertools import islice

from kvrelay.errors import InvalidArgument
from kvrelay.v1 import inference_pb2

__all__ = ["generate_request_from_bytes"]

MAX_FIELDS = 64  # looked at; a request has ten, and a forged one with millions would keep the event loop busy
_VARINT, _FIXED64, _LENGTH_DELIMITED, _START_GROUP, _END_GROUP, _FIXED32 = range(6)
_PROMPT_FIELDS = {
    field.number: field.name for field in inference_pb2.GenerateRequest.DESCRIPTOR.oneofs_by_name["prompt"].fields
}


def generate_request_from_bytes(data: bytes) -> inference_pb2.GenerateRequest:
    """Deserializes a GenerateRequest.

    Raises:
        google.protobuf.message.DecodeError: the bytes are no such message.
        InvalidArgument: there are two kinds of prompt.
    """
    request = inference_pb2.GenerateRequest.FromString(data)
    prompts = sorted(set(islice(_field_numbers(data), MAX_FIELDS)) & _PROMPT_FIELDS.keys())
    if len(prompts) > 1:
        names = " and ".join(_PROMPT_FIELDS[number] for number in prompts)
        raise InvalidArgument.field("prompt", f"{names} are both given; give one")
    return request


def _field_numbers(data: bytes) -> Iterator[int]:
    """The numbers of the fields of a message that has been found valid."""
    position = depth = 0
    while position < len(data):
        tag, position = _read_varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        depth += (wire_type == _START_GROUP) - (wire_type == _END_GROUP)
        if depth == 0:
            yield number
        if wire_type == _VARINT:
            _, position = _read_varint(data, position)
        elif wire_type == _LENGTH_DELIMITED:
            length, position = _read_varint(data, position)
            position += length
        else:
            position += {_FIXED64: 8, _FIXED32: 4}.get(wire_type, 0)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Returns the number and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position
