"""Recorded traces: what is read, and which line of a malformed one is named."""

import json
from pathlib import Path

import pytest

from kvrelay.bench.traces import Shape, read_trace
from kvrelay.errors import ConfigurationError

MOONCAKE = {"timestamp": 27482, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 48]}
JSONL = {"timestamp": 1.5, "input_tokens": 30, "output_tokens": 5}


def write(folder: Path, *lines: object) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_mooncake(tmp_path: Path) -> None:
    later = {"timestamp": 30482, "input_length": 3, "output_length": 1, "hash_ids": [46], "type": "chat"}
    assert read_trace(write(tmp_path, MOONCAKE, later), "mooncake") == [
        Shape(1100, 52, 0.0, (46, 47, 48)),
        Shape(3, 1, 3.0, (46,)),
    ]


def test_jsonl(tmp_path: Path) -> None:
    recorded = {"timestamp": 2, "token_ids": [4, 5, 6], "output_tokens": 7}
    assert read_trace(write(tmp_path, JSONL, "", recorded), "jsonl") == [
        Shape(30, 5, 0.0),
        Shape(3, 7, 0.5, token_ids=(4, 5, 6)),
    ]


def test_requests_come_in_the_order_of_their_timestamps(tmp_path: Path) -> None:
    path = write(tmp_path, *({**JSONL, "timestamp": time, "output_tokens": time} for time in (7, 3, 5)))
    assert [(shape.timestamp, shape.output_tokens) for shape in read_trace(path, "jsonl")] == [(0, 3), (2, 5), (4, 7)]


def test_without_all_timestamps_there_are_none(tmp_path: Path) -> None:
    path = write(tmp_path, JSONL, {"input_tokens": 1, "output_tokens": 2})
    assert [shape.timestamp for shape in read_trace(path, "jsonl")] == [None, None]


def test_fewer_hash_ids_than_blocks(tmp_path: Path) -> None:
    path = write(tmp_path, {**MOONCAKE, "hash_ids": [1]}, {**MOONCAKE, "hash_ids": []})
    assert [shape.hash_ids for shape in read_trace(path, "mooncake")] == [(1,), ()]


MALFORMED = {
    "no JSON": ("{", "not valid JSON"),
    "deep JSON": ("[" * 100_000, "not valid JSON"),
    "no object": ("[1]", "not a JSON object"),
    "no timestamp": ({**MOONCAKE, "timestamp": None}, "timestamp: None is not a number"),
    "a timestamp of text": ({**MOONCAKE, "timestamp": "0"}, "timestamp: '0' is not a number"),
    "an endless timestamp": ({**MOONCAKE, "timestamp": float("inf")}, "timestamp: inf is not a number"),
    "a negative timestamp": ({**MOONCAKE, "timestamp": -1}, "timestamp: -1 is not a number of at least 0"),
    "another format": (JSONL, "input_length: missing"),
    "no input": ({**MOONCAKE, "input_length": 0}, "input_length: 0 is not a whole number of at least 1"),
    "a fraction": ({**MOONCAKE, "output_length": 1.5}, "output_length: 1.5 is not a whole number"),
    "a boolean": ({**MOONCAKE, "output_length": True}, "output_length: True is not a whole number"),
    "hash ids of text": ({**MOONCAKE, "hash_ids": ["a"]}, "hash_ids: 'a' is not a whole number"),
    "a negative hash id": ({**MOONCAKE, "hash_ids": [-1]}, "hash_ids: -1 is not a whole number"),
    "a huge hash id": ({**MOONCAKE, "hash_ids": [2**64]}, "is not a whole number"),
    "one hash id": ({**MOONCAKE, "hash_ids": 5}, "hash_ids: not a list"),
    "too many hash ids": ({**MOONCAKE, "input_length": 512}, "hash_ids: 3 ids, but 512 tokens are 1 blocks of 512"),
}


@pytest.mark.parametrize(("line", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_line_is_named(line: object, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path, MOONCAKE, "", line, MOONCAKE)
    with pytest.raises(ConfigurationError) as raised:
        read_trace(path, "mooncake")
    assert str(raised.value).startswith(f"{path}:3: ")
    assert reason in str(raised.value)


def test_prompts_given_twice(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=":1: input_tokens: token_ids are given already"):
        read_trace(write(tmp_path, {**JSONL, "token_ids": [1]}), "jsonl")


def test_a_file_with_nothing_in_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no request in it"):
        read_trace(write(tmp_path, "", " "), "jsonl")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        read_trace(path, "jsonl")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_trace(tmp_path / "none", "jsonl")
