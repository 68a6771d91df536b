"""How much text a token can stand for, so that a hopelessly long prompt is refused before it is tokenized."""

import json
from typing import Any

from tokenizers import Tokenizer

from gateway.detokenizer import BYTE_OF_CHARACTER

__all__ = ["longest_token"]


def longest_token(tokenizer: Tokenizer) -> int | None:
    """The most bytes of text that one token can stand for.

    None if the tokenizer may drop or shorten text on its way to tokens, so that nothing can be said. The answer may be
    larger than the truth, never smaller.
    """
    spec = json.loads(tokenizer.to_str())
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    pieces_kept = _normalizer_keeps_all(spec["normalizer"]) and _pre_tokenizer_keeps_all(spec["pre_tokenizer"])
    absorbs_spaces = any(token["lstrip"] or token["rstrip"] for token in spec["added_tokens"])
    if not pieces_kept or absorbs_spaces or not _knows_every_byte(spec, vocabulary):
        return None
    return max(len(token.encode()) for token in vocabulary)


def _normalizer_keeps_all(spec: dict[str, Any] | None) -> bool:
    match spec:
        case None | {"type": "Prepend"}:
            return True
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
            return len(content.encode()) >= len(pattern.encode())
        case {"type": "Sequence", "normalizers": list(parts)}:
            return all(_normalizer_keeps_all(part) for part in parts)
    return False


def _pre_tokenizer_keeps_all(spec: dict[str, Any] | None) -> bool:
    match spec:
        case None | {"type": "ByteLevel" | "Metaspace" | "Digits"}:
            return True
        case {"type": "Split", "behavior": str(behavior)}:
            return behavior != "Removed"
        case {"type": "Sequence", "pretokenizers": list(parts)}:
            return all(_pre_tokenizer_keeps_all(part) for part in parts)
    return False


def _knows_every_byte(spec: dict[str, Any], vocabulary: dict[str, int]) -> bool:
    """A byte without a token of its own would vanish, or any number of them become one unknown token."""
    if spec["model"].get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    return '"ByteLevel"' in json.dumps(spec["pre_tokenizer"]) and vocabulary.keys() >= BYTE_OF_CHARACTER.keys()
