"""For nouns whose fields are named as those of their message."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from google.protobuf.message import Message

__all__ = ["fields", "mirror"]

_Noun = TypeVar("_Noun")


def mirror(noun: Callable[..., _Noun], proto: Message, **converted: object) -> _Noun:
    """A noun whose fields are the proto's; those that need more than copying are given converted."""
    names = [field.name for field in proto.DESCRIPTOR.fields if field.name not in converted]
    return noun(**converted, **{name: getattr(proto, name) for name in names})


def fields(noun: Any, **converted: object) -> dict[str, Any]:
    """The fields of a noun by name, to build its message from; those given as keywords are converted already."""
    return {field.name: converted.get(field.name, getattr(noun, field.name)) for field in dataclasses.fields(noun)}
