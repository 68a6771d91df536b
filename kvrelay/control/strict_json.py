"""JSON -> dataclasses, strictly: what does not have the declared type is refused, never converted.

A field that this version does not know is passed over, so that a newer process may say more.
"""

import dataclasses
import enum
import functools
import json
import types
import typing
from typing import Any, TypeVar

__all__ = ["from_json"]

_Value = TypeVar("_Value")


def from_json(kind: type[_Value], value: object) -> _Value:
    """A `kind` made of what `json.loads` returned: a dataclass of scalars, enums, such dataclasses, and tuples of one.

    Raises:
        ValueError: naming the field that is missing or has another type, or by the dataclass's own check.
    """
    return typing.cast(_Value, _decode(kind, value, kind.__name__))


def _decode(kind: Any, value: object, place: str) -> object:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (inner,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
        return None if value is None else _decode(inner, value, place)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{place}: not a list")
        inner = typing.get_args(kind)[0]
        return tuple(_decode(inner, each, f"{place}[{index}]") for index, each in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, place)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(value)
    # bool is a subclass of int, but no number is meant by it.
    if type(value) is not kind:
        raise ValueError(f"{place}: {json.dumps(value)[:64]} is not of type {kind.__name__}")
    return value


def _decode_dataclass(kind: Any, value: object, place: str) -> object:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: not an object")
    hints = _hints(kind)
    fields: dict[str, object] = {}
    for field in dataclasses.fields(kind):
        if field.name in value:
            fields[field.name] = _decode(hints[field.name], value[field.name], f"{place}.{field.name}")
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"{place}.{field.name}: missing")
    return kind(**fields)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)
