"""Detokenizers and stop strings: whatever the pieces, the whole is the same."""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gateway.detokenizer import CompletionText, Detokenizer, detokenizers
from gateway.stop_strings import StopScanner
from tests.unit import small_tokenizers

BYTE_LEVEL = small_tokenizers.byte_level()
BYTE_FALLBACK = small_tokenizers.byte_fallback()
BYTE_FALLBACK_WITHOUT_STRIP = small_tokenizers.byte_fallback(strip=False)
UNIGRAM = small_tokenizers.unigram()
Whole = TypeVar("Whole", str, list[int])
UNKNOWN_IDS = 3  # beyond the vocabulary, as a model with a padded embedding can emit them
FALLBACK_BYTES = range(3, 259)


def word_level() -> Tokenizer:
    """No decoder at all: tokens are joined by spaces."""
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "one": 1, "two": 2, "three": 3}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def word_end() -> Tokenizer:
    """As the first GPT: the end of a word is marked, so a space follows only when a token does."""
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "a": 1, "b</w>": 2, "c": 3, "d</w>": 4}, []))
    tokenizer.decoder = decoders.BPEDecoder()
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


TOKENIZERS = {
    "byte level": BYTE_LEVEL,
    "byte fallback": BYTE_FALLBACK,
    "byte fallback without strip": BYTE_FALLBACK_WITHOUT_STRIP,
    "unigram": UNIGRAM,
    "word level": word_level(),
    "word end": word_end(),
}
MAKERS: dict[str, Callable[[], Detokenizer]] = {name: detokenizers(each) for name, each in TOKENIZERS.items()}


def pieces_of(whole: Whole, cuts: Iterable[int]) -> list[Whole]:
    edges = [0, *sorted(cut % (len(whole) + 1) for cut in cuts), len(whole)]
    return [whole[start:end] for start, end in pairwise(edges)]


def decode_in_pieces(name: str, pieces: Iterable[Sequence[int]]) -> str:
    detokenizer = MAKERS[name]()
    return "".join([detokenizer.push(piece) for piece in pieces]) + detokenizer.flush()


def ids_of(tokenizer: Tokenizer, tokens: Iterable[str]) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in tokens]


def token_ids(name: str) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, TOKENIZERS[name].get_vocab_size() - 1 + UNKNOWN_IDS), max_size=40)


CUTS = st.lists(st.integers(0, 1000), max_size=20)


@pytest.mark.parametrize("name", ["byte level", "unigram", "word level", "word end"])
@given(data=st.data(), cuts=CUTS)
@settings(max_examples=60)
def test_pieces_of_any_tokens_give_what_decoding_at_once_gives(name: str, data: st.DataObject, cuts: list[int]) -> None:
    ids = data.draw(token_ids(name))
    assert decode_in_pieces(name, pieces_of(ids, cuts)) == TOKENIZERS[name].decode(ids)


@given(ids=st.lists(st.integers(2, 257), max_size=60), cuts=CUTS)
@settings(max_examples=80)
def test_any_bytes_give_what_decoding_at_once_gives(ids: list[int], cuts: list[int]) -> None:
    assert decode_in_pieces("byte level", pieces_of(ids, cuts)) == BYTE_LEVEL.decode(ids)


def spell(text: str, tokenizer: Tokenizer, as_bytes: Iterable[bool]) -> list[int]:
    """The text's characters as byte tokens or as tokens of their own, at will."""
    ids: list[int] = []
    for character, in_bytes in zip(text, as_bytes, strict=False):
        own = tokenizer.token_to_id(character.replace(" ", "▁"))
        ids += [own] if own is not None and not in_bytes else [3 + byte for byte in character.encode()]
    return ids


CHARACTERS = st.text(st.sampled_from("ab ▁é漢😀\ufffd"), max_size=20)


@pytest.mark.parametrize("name", ["byte fallback", "byte fallback without strip"])
@given(text=CHARACTERS, as_bytes=st.lists(st.booleans(), min_size=20, max_size=20), cuts=CUTS, data=st.data())
@settings(max_examples=60)
def test_byte_tokens_of_any_text_give_what_decoding_at_once_gives(
    name: str, text: str, as_bytes: list[bool], cuts: list[int], data: st.DataObject
) -> None:
    ids = spell(text, TOKENIZERS[name], as_bytes)
    special = data.draw(st.lists(st.integers(0, len(ids)), max_size=3))
    for position in special:
        ids.insert(position, 2)
    assert decode_in_pieces(name, pieces_of(ids, cuts)) == TOKENIZERS[name].decode(ids)


def decode_run_by_run(tokenizer: Tokenizer, ids: list[int]) -> str:
    """What the byte-fallback decoder gives, but valid characters of a run with an invalid byte stay what they are."""
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    data = b"".join(
        bytes([index - 3]) if index in FALLBACK_BYTES else tokens[index].replace("▁", " ").encode()
        for index in ids
        if index > 2 and index in tokens
    )
    text = re.sub(r"[\udc80-\udcff]", "\ufffd", data.decode(errors="surrogateescape"))
    return text.removeprefix(" ") if "Strip" in tokenizer.to_str() else text


@pytest.mark.parametrize("name", ["byte fallback", "byte fallback without strip"])
@given(data=st.data(), cuts=CUTS)
@settings(max_examples=80)
def test_invalid_bytes_leave_the_characters_around_them(name: str, data: st.DataObject, cuts: list[int]) -> None:
    ids = data.draw(token_ids(name))
    assert decode_in_pieces(name, pieces_of(ids, cuts)) == decode_run_by_run(TOKENIZERS[name], ids)


@pytest.mark.parametrize("name", ["byte level", "byte fallback"])
def test_text_comes_as_soon_as_its_character_is_whole(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    tokens = [f"<0x{byte:02X}>" for byte in "a漢😀".encode()] if name == "byte fallback" else byte_characters("a漢😀")
    detokenizer = MAKERS[name]()
    texts = [detokenizer.push([index]) for index in ids_of(tokenizer, tokens)]
    assert texts == ["a", "", "", "漢", "", "", "", "😀"]
    assert detokenizer.flush() == ""


def byte_characters(text: str) -> str:
    [(characters, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return characters


@pytest.mark.parametrize("name", ["byte level", "byte fallback", "byte fallback without strip"])
def test_real_text_comes_back(name: str) -> None:
    text = "<tool call>" + " ".join(small_tokenizers.TEXTS) + "漢字"
    ids = TOKENIZERS[name].encode(text).ids
    assert decode_in_pieces(name, ([index] for index in ids)) == TOKENIZERS[name].decode(ids) == text


def test_invalid_bytes_are_held_back_no_longer_than_they_could_become_valid() -> None:
    lead, letter = ids_of(BYTE_LEVEL, [byte_characters("😀")[0], "a"])
    detokenizer = MAKERS["byte level"]()
    assert [detokenizer.push([index]) for index in (lead, lead, letter)] == ["", "\ufffd", "\ufffda"]


def first_stop(text: str, stop: Sequence[str]) -> str | None:
    """Character by character, the plain way."""
    for end in range(1, len(text) + 1):
        found = [string for string in stop if text[:end].endswith(string)]
        if found:
            return text[: end - max(map(len, found))]
    return None


STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


@given(text=st.text("abc", max_size=40), stop=STOPS, cuts=CUTS)
@settings(max_examples=150)
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str], cuts: list[int]) -> None:
    scanner = StopScanner(stop)
    emitted = ""
    for piece in pieces_of(text, cuts):
        certain, matched = scanner.push(piece)
        emitted += certain
        assert matched == scanner.matched
    expected = first_stop(text, stop)
    assert scanner.matched == (expected is not None)
    assert emitted + scanner.flush() == (text if expected is None else expected)


@given(text=st.text("abc", max_size=40), stop=st.text("abc", min_size=1, max_size=4), cuts=CUTS)
@settings(max_examples=80)
def test_one_stop_string_splits_like_str_split(text: str, stop: str, cuts: list[int]) -> None:
    scanner = StopScanner([stop])
    emitted = "".join([scanner.push(piece)[0] for piece in pieces_of(text, cuts)]) + scanner.flush()
    assert emitted == text.split(stop)[0]


@given(text=st.text("abc", max_size=30), stop=STOPS)
@settings(max_examples=80)
def test_only_what_may_become_a_stop_string_is_held_back(text: str, stop: list[str]) -> None:
    scanner = StopScanner(stop)
    seen = emitted = ""
    for character in text:
        seen += character
        emitted += scanner.push(character)[0]
        if scanner.matched:
            return
        beginnings = (seen[-length:] for length in range(len(seen), 0, -1))
        held = next((end for end in beginnings if any(string.startswith(end) for string in stop)), "")
        assert emitted == seen.removesuffix(held)


def test_a_stop_string_across_tokens_cuts_text_and_tokens() -> None:
    ids = ids_of(BYTE_LEVEL, byte_characters("one END two"))
    completion = CompletionText(MAKERS["byte level"](), ["END"])
    first = completion.push(ids[:5])
    assert (first.text, first.stopped, first.num_tokens_used) == ("one ", False, 5)
    second = completion.push(ids[5:])
    assert (second.text, second.stopped, second.num_tokens_used) == ("", True, 2)
    assert completion.push(ids).num_tokens_used == 0
    assert completion.flush() == ""


def test_what_only_looked_like_a_stop_string_comes_at_the_end() -> None:
    ids = ids_of(BYTE_LEVEL, "EN")
    completion = CompletionText(MAKERS["byte level"](), ["END"])
    assert completion.push(ids).text == ""
    assert completion.flush() == "EN"


def test_without_stop_strings_text_is_not_scanned() -> None:
    ids = BYTE_LEVEL.encode("Once upon a time").ids
    completion = CompletionText(MAKERS["byte level"]())
    delta = completion.push(ids)
    assert (delta.text, delta.stopped, delta.num_tokens_used) == ("Once upon a time", False, len(ids))
