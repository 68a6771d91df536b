"""Recorded traffic: one JSON object a line, in kvrelay's own format or in Mooncake's.

kvrelay:  {"timestamp": seconds, "input_tokens": n, "output_tokens": n}, or with "token_ids": [...] in the place of
          input_tokens. The timestamp may be left out.
Mooncake: {"timestamp": milliseconds, "input_length": n, "output_length": n, "hash_ids": [...]}; each hash id stands for
          a block of 512 prompt tokens, the last one for what is left. As published with "Mooncake: Trading More Storage
          for Less Computation" (FAST 2025).

Other keys are passed over.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrelay.errors import ConfigurationError

__all__ = ["FORMATS", "HASH_BLOCK_TOKENS", "Shape", "read_trace"]

HASH_BLOCK_TOKENS = 512
_LARGEST_ID = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Shape:
    """What a request is like before it has a prompt.

    Attributes:
        timestamp: seconds after the first request of its trace; None where nobody recorded it.
        hash_ids: equal ids stand for equal blocks of the prompt.
        token_ids: the prompt itself, where it was recorded.
    """

    input_tokens: int
    output_tokens: int
    timestamp: float | None = None
    hash_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()


def read_trace(path: Path, trace_format: str) -> list[Shape]:
    """Reads a trace, in the order of its timestamps.

    Args:
        trace_format: one of `FORMATS`.

    Raises:
        ConfigurationError: naming the file, the line and what is wrong there.
    """
    parse = FORMATS[trace_format]
    shapes = []
    for number, line in _lines(path):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("not a JSON object")
            shapes.append(parse(entry))
        except (ValueError, RecursionError) as error:
            reason = "not valid JSON" if isinstance(error, json.JSONDecodeError | RecursionError) else error
            raise ConfigurationError(f"{path}:{number}: {reason}") from None
    if not shapes:
        raise ConfigurationError(f"{path}: no request in it")
    return _from_the_first(shapes)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path}: not UTF-8: {error.reason}") from error


def _from_the_first(shapes: list[Shape]) -> list[Shape]:
    """With timestamps that begin at 0; as they are if not all have one."""
    times = [shape.timestamp for shape in shapes if shape.timestamp is not None]
    if len(times) < len(shapes):
        return [_with_timestamp(shape, None) for shape in shapes]
    first = min(times)
    pairs = sorted(zip(times, shapes, strict=True), key=lambda pair: pair[0])
    return [_with_timestamp(shape, time - first) for time, shape in pairs]


def _with_timestamp(shape: Shape, timestamp: float | None) -> Shape:
    return Shape(shape.input_tokens, shape.output_tokens, timestamp, shape.hash_ids, shape.token_ids)


def _parse_jsonl(entry: Mapping[str, Any]) -> Shape:
    token_ids = _ids(entry, "token_ids")
    if token_ids and "input_tokens" in entry:
        raise ValueError("input_tokens: token_ids are given already")
    return Shape(
        input_tokens=len(token_ids) or _count(entry, "input_tokens"),
        output_tokens=_count(entry, "output_tokens"),
        timestamp=_seconds(entry) if entry.get("timestamp") is not None else None,
        token_ids=token_ids,
    )


def _parse_mooncake(entry: Mapping[str, Any]) -> Shape:
    input_tokens, hash_ids = _count(entry, "input_length"), _ids(entry, "hash_ids")
    num_blocks = math.ceil(input_tokens / HASH_BLOCK_TOKENS)
    if len(hash_ids) > num_blocks:
        raise ValueError(
            f"hash_ids: {len(hash_ids)} ids, but {input_tokens} tokens are {num_blocks} blocks of {HASH_BLOCK_TOKENS}"
        )
    return Shape(input_tokens, _count(entry, "output_length"), _seconds(entry) / 1000, hash_ids)


FORMATS: dict[str, Callable[[Mapping[str, Any]], Shape]] = {"jsonl": _parse_jsonl, "mooncake": _parse_mooncake}


def _count(entry: Mapping[str, Any], key: str) -> int:
    value = _required(entry, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key}: {value!r} is not a whole number of at least 1")
    return value


def _seconds(entry: Mapping[str, Any]) -> float:
    value = _required(entry, "timestamp")
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e15:
        raise ValueError(f"timestamp: {value!r} is not a number of at least 0")
    return float(value)


def _ids(entry: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Empty where they are left out."""
    values = entry.get(key, [])
    if not isinstance(values, list):
        raise ValueError(f"{key}: not a list")
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LARGEST_ID:
            raise ValueError(f"{key}: {value!r} is not a whole number of at least 0")
    return tuple(values)


def _required(entry: Mapping[str, Any], key: str) -> Any:
    if key not in entry:
        raise ValueError(f"{key}: missing")
    return entry[key]
