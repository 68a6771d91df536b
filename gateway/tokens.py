"""Prompts to tokens, by the checkpoint's own tokenizer, and what else the gateway must know of a checkpoint."""

import asyncio
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from gateway.chat_template import ChatMessage, load_chat_template
from gateway.detokenizer import Detokenizer, detokenizers
from gateway.prompt_bound import longest_token
from kvrelay.engine.checkpoint import read_json
from kvrelay.errors import ConfigurationError, InvalidArgument
from kvrelay.request import SamplingParams

__all__ = ["ChatPrompt", "Prompt", "TextPrompt", "TokenPrompt", "Tokenizer", "TokenizerPool"]

# The library would else run a single text on a thread pool of its own, where a long one is in the way of the others.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text, encoded with the special tokens that the tokenizer adds."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, taken as they are."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, rendered by the checkpoint's chat template."""

    messages: tuple[ChatMessage, ...]


Prompt = TextPrompt | TokenPrompt | ChatPrompt


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    Args:
        folder: holds tokenizer.json, config.json and, if they exist, tokenizer_config.json, special_tokens_map.json,
            generation_config.json and a chat template.
        context_length: tokens that prompt and completion may have together; 0 means as many as the model allows.

    Attributes:
        vocab_size: the model's, which may be larger than the tokenizer's; token ids are below it.
        context_length: the lesser of the argument and what the configuration says.
        eos_token_ids: the tokens that end a text; empty if the checkpoint names none.
        default_sampling: temperature, top_k, top_p and min_p as the generation config has them.

    Raises:
        ConfigurationError: a file is missing or cannot be understood; says which, and what to do.
    """

    def __init__(self, folder: Path, context_length: int = 0) -> None:
        config = read_json(folder / "config.json")
        generation_config = _read_if_there(folder / "generation_config.json")
        tokenizer_config = _read_if_there(folder / "tokenizer_config.json")
        special_tokens = _special_tokens(tokenizer_config, _read_if_there(folder / "special_tokens_map.json"))
        self._tokenizer = _load_tokenizer(folder, tokenizer_config, special_tokens)
        self._chat_template = load_chat_template(folder, tokenizer_config, special_tokens)
        self._longest_token = longest_token(self._tokenizer)
        self._new_detokenizer = detokenizers(self._tokenizer)
        text_config = {**config, **(config.get("text_config") or {})}
        self.vocab_size = _count(text_config, ("vocab_size",), folder / "config.json")
        self.context_length = _count(text_config, _CONTEXT_LENGTH_KEYS, folder / "config.json")
        if context_length:
            self.context_length = min(self.context_length, context_length)
        self.eos_token_ids = _eos_token_ids(generation_config, config, text_config)
        self.default_sampling = _default_sampling(generation_config, folder / "generation_config.json")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of a text, never truncated."""
        # The batch call is the one that does not compute character offsets, at half the time.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Returns the token ids of a conversation.

        Raises:
            InvalidArgument: there is no chat template, it refuses the messages, or the prompt is surely too long.
        """
        if self._chat_template is None:
            raise InvalidArgument.field("chat", "this model has no chat template; send the prompt as text")
        text = self._chat_template.render(messages)
        self._refuse_hopeless(text, "chat")
        return self.encode(text, add_special_tokens=False)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Returns the token ids of any kind of prompt.

        Raises:
            InvalidArgument: as `encode_chat`, or the text is so long that it cannot fit into the context.
        """
        match prompt:
            case TokenPrompt(token_ids):
                return list(token_ids)
            case ChatPrompt(messages):
                return self.encode_chat(messages)
            case TextPrompt(text):
                self._refuse_hopeless(text, "text")
                return self.encode(text)

    def detokenizer(self) -> Detokenizer:
        """Returns a detokenizer for one sequence."""
        return self._new_detokenizer()

    def _refuse_hopeless(self, text: str, field: str) -> None:
        if self._longest_token is None:
            return
        at_least = len(text.encode()) // self._longest_token
        if at_least >= self.context_length:
            raise InvalidArgument.field(
                field, f"at least {at_least} tokens, but the context has room for {self.context_length - 1}"
            )


class TokenizerPool:
    """Encodes prompts on threads, so that the event loop goes on.

    Long prompts have one thread among them and never keep short ones waiting, also when their callers give up.

    Args:
        tokenizer: releases the GIL while it works.
        threads: for short prompts.
    """

    LONG_PROMPT = 1 << 16  # characters; some 30 ms of work

    def __init__(self, tokenizer: Tokenizer, threads: int = 2) -> None:
        self._tokenizer = tokenizer
        self._short = ThreadPoolExecutor(threads, thread_name_prefix="tokenizer")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="tokenizer-long")

    async def encode_prompt(self, prompt: Prompt) -> list[int]:
        """As `Tokenizer.encode_prompt`. A call that is cancelled before its turn is never run."""
        if isinstance(prompt, TokenPrompt):
            return list(prompt.token_ids)
        executor = self._short if _num_characters(prompt) < self.LONG_PROMPT else self._long
        return await asyncio.get_running_loop().run_in_executor(executor, self._tokenizer.encode_prompt, prompt)

    def close(self) -> None:
        """Drops what has not begun; does not wait for the rest."""
        for executor in (self._short, self._long):
            executor.shutdown(wait=False, cancel_futures=True)


def _num_characters(prompt: TextPrompt | ChatPrompt) -> int:
    if isinstance(prompt, TextPrompt):
        return len(prompt.text)
    return sum(len(message.role) + len(message.content) for message in prompt.messages)


def _load_tokenizer(
    folder: Path, tokenizer_config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigurationError(
            f"{path}: missing; make it with transformers: "
            f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        _add_missing_tokens(tokenizer, tokenizer_config, special_tokens)
    except Exception as error:  # the library raises plain Exception
        raise ConfigurationError(f"{path}: not a tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _add_missing_tokens(
    tokenizer: tokenizers.Tokenizer, tokenizer_config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> None:
    """Adds, as transformers does, the tokens that only tokenizer_config.json and its companion name."""
    decoder = tokenizer_config.get("added_tokens_decoder") or {}
    tokenizer.add_tokens([tokenizers.AddedToken(**decoder[index]) for index in sorted(decoder, key=int)])
    tokenizer.add_special_tokens(list(special_tokens.values()))


def _special_tokens(tokenizer_config: Mapping[str, Any], special_tokens_map: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by name, `bos_token` and the like; each is given as text or as an object."""
    named = {**special_tokens_map, **tokenizer_config}
    tokens = {
        name: token.get("content") if isinstance(token, dict) else token
        for name, token in named.items()
        if name.endswith("_token")
    }
    return {name: token for name, token in tokens.items() if isinstance(token, str)}


def _eos_token_ids(*configs: Mapping[str, Any]) -> frozenset[int]:
    """What the first of the configs that has an eos_token_id says: one or several."""
    for config in configs:
        found = config.get("eos_token_id")
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()


def _default_sampling(generation_config: Mapping[str, Any], path: Path) -> SamplingParams:
    def number(name: str, maximum: float = math.inf) -> float | None:
        value = generation_config.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= maximum:
            raise ConfigurationError(f"{path}: {name}: {value!r} is not a number from 0 to {maximum:g}")
        return value

    top_k = number("top_k", maximum=2**31)
    return SamplingParams(
        temperature=number("temperature"),
        top_k=None if top_k is None else int(top_k),
        top_p=number("top_p", maximum=1) or None,
        min_p=number("min_p", maximum=1),
    )


_CONTEXT_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")


def _count(config: Mapping[str, Any], names: Sequence[str], path: Path) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            return value
    raise ConfigurationError(f"{path}: names no {names[0]}")


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
