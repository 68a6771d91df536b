"""Tokens to text while they arrive: never half a character, and the whole is what decoding all at once gives."""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tokenizers import Tokenizer

from gateway.stop_strings import StopScanner

__all__ = ["CompletionText", "Detokenizer", "TextDelta", "detokenizers"]


class Detokenizer(Protocol):
    """The text of one sequence; special tokens are left out."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Returns the text that these tokens made certain."""

    def flush(self) -> str:
        """Returns what is left when no token follows; an incomplete character becomes U+FFFD."""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What new tokens added to the text of a completion.

    Attributes:
        text: may lag behind the tokens; held back is what may be part of a character or of a stop string.
        stopped: a stop string has appeared.
        num_tokens_used: how many of the tokens belong to the completion; fewer than pushed only if stopped.
    """

    text: str
    stopped: bool
    num_tokens_used: int


class CompletionText:
    """The text of one completion, cut off before the first stop string."""

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str] = ()) -> None:
        self._detokenizer = detokenizer
        self._scanner = StopScanner(stop) if stop else None

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Takes the next tokens."""
        if self._scanner is None:
            return TextDelta(self._detokenizer.push(token_ids), False, len(token_ids))
        text = ""
        for index, token_id in enumerate(token_ids):
            if self._scanner.matched:
                return TextDelta(text, True, index)
            text += self._scanner.push(self._detokenizer.push((token_id,)))[0]
        return TextDelta(text, self._scanner.matched, len(token_ids))

    def flush(self) -> str:
        """Returns the rest of the text; to be called once, after the last token."""
        rest = self._detokenizer.flush()
        if self._scanner is None:
            return rest
        return self._scanner.push(rest)[0] + self._scanner.flush()


def detokenizers(tokenizer: Tokenizer) -> Callable[[], Detokenizer]:
    """Returns what makes a detokenizer for each sequence.

    The two decoders that nearly all language models have are done here, byte by byte and in constant time a token:
    byte-level, and SentencePiece with byte fallback. All others go through the tokenizer itself.
    """
    spec = json.loads(tokenizer.to_str())["decoder"] or {}
    parts = spec["decoders"] if spec.get("type") == "Sequence" else [spec]
    kinds = [part.get("type") for part in parts]
    if [kind for kind in kinds if kind != "Fuse"] == ["ByteLevel"]:
        table = _TokenBytes(tokenizer, _byte_level)
        return lambda: _ByteDetokenizer(table, "replace", 0)
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
        strip = parts[3] if kinds[3:] else _NO_STRIP
        pattern = parts[0]["pattern"].get("String")
        if pattern and strip["content"] == " " and not strip["stop"]:
            table = _TokenBytes(tokenizer, lambda token: _byte_fallback(token, pattern, parts[0]["content"]))
            return lambda: _ByteDetokenizer(table, _EACH_BYTE, strip["start"])
    special = _special_token_ids(tokenizer)
    return lambda: _WindowDetokenizer(tokenizer, special)


_NO_STRIP: dict[str, Any] = {"content": " ", "start": 0, "stop": 0}


class _TokenBytes(dict[int, bytes]):
    """What each token adds to the text; filled as tokens are met. Special and unknown tokens add nothing."""

    def __init__(self, tokenizer: Tokenizer, token_bytes: Callable[[str], bytes]) -> None:
        super().__init__(dict.fromkeys(_special_token_ids(tokenizer), b""))
        self._tokenizer = tokenizer
        self._token_bytes = token_bytes

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        self[token_id] = b"" if token is None else self._token_bytes(token)
        return self[token_id]


class _ByteDetokenizer:
    """Joins the tokens' bytes and decodes them as UTF-8; at most three bytes are ever held back."""

    def __init__(self, table: _TokenBytes, errors: str, leading_spaces: int) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._spaces_to_strip = leading_spaces

    def push(self, token_ids: Sequence[int]) -> str:
        return self._strip(self._decoder.decode(b"".join([self._table[token_id] for token_id in token_ids])))

    def flush(self) -> str:
        return self._strip(self._decoder.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        while self._spaces_to_strip and text:
            self._spaces_to_strip -= 1
            if text[0] != " ":
                self._spaces_to_strip = 0
                return text
            text = text[1:]
        return text


class _WindowDetokenizer:
    """Decodes new tokens after one that came before, which shows their text as it is within a sequence.

    A decoder that can yield half a character (U+FFFD at the end) gets three more tokens to complete it.
    """

    def __init__(self, tokenizer: Tokenizer, special: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        known = (token_id for token_id in token_ids if token_id not in self._special)
        self._pending += [token_id for token_id in known if self._tokenizer.id_to_token(token_id) is not None]
        text = self._new_text()
        return "" if text.endswith("\ufffd") and len(self._pending) < 4 else self._emit(text)

    def flush(self) -> str:
        return self._emit(self._new_text())

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]

    def _emit(self, text: str) -> str:
        if self._pending:
            self._context, self._pending = self._pending[-1:], []
        return text


def _special_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Those that decoding skips. A token can be special though its own flag says otherwise, so the decoder is asked."""
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(
        token_id
        for token_id in added
        if not tokenizer.decode([token_id]) and tokenizer.decode([token_id], skip_special_tokens=False)
    )


def _printable_bytes() -> Iterable[tuple[str, int]]:
    """The characters by which byte-level vocabularies write the 256 bytes, as GPT-2 defined them."""
    shifted = 0
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or (0xA1 <= byte <= 0xFF and byte != 0xAD):
            yield chr(byte), byte
        else:
            yield chr(256 + shifted), byte
            shifted += 1


BYTE_OF_CHARACTER = dict(_printable_bytes())


def _byte_level(token: str) -> bytes:
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:  # an added token, which stands for itself
        return token.encode()


def _byte_fallback(token: str, pattern: str, content: str) -> bytes:
    token = token.replace(pattern, content)
    match = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)
    return bytes.fromhex(match[1]) if match else token.encode()


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


# The byte-fallback decoder of `tokenizers` writes one U+FFFD for each invalid byte. It also does so for the valid
# characters of an unbroken run of byte tokens in which any byte is invalid; here they stay, as they have been emitted.
_EACH_BYTE = "kvrelay.replace_each_byte"
codecs.register_error(_EACH_BYTE, _replace_each_byte)
