"""Chat messages to a prompt, by the checkpoint's own jinja2 template, as transformers renders it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvrelay.errors import ConfigurationError, InvalidArgument

__all__ = ["ChatMessage", "ChatTemplate", "load_chat_template"]


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


class ChatTemplate:
    """A compiled template.

    Args:
        source: the template's text.
        variables: what it may refer to besides the messages: `bos_token`, `eos_token` and the like.

    Raises:
        jinja2.TemplateSyntaxError: the source is no template.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self._template = _environment().from_string(source)
        self._variables = dict(variables)

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """Returns the prompt, which ends where the model's answer begins.

        Raises:
            InvalidArgument: the template refuses the messages or fails on them.
        """
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(
                **self._variables, messages=conversation, tools=None, documents=None, add_generation_prompt=True
            )
        except _Refusal as refusal:
            raise InvalidArgument.field("chat", f"the model's chat template says: {refusal.message}") from refusal
        except Exception as error:  # a template is foreign code and may raise anything
            raise InvalidArgument.field("chat", "the model's chat template fails on these messages") from error


def load_chat_template(
    folder: Path, tokenizer_config: Mapping[str, Any], variables: Mapping[str, str]
) -> ChatTemplate | None:
    """The checkpoint's default template; None if it has none.

    Looked for in chat_template.jinja, in the tokenizer's configuration, and in chat_template.json.

    Raises:
        ConfigurationError: it cannot be read or is not valid.
    """
    source = _find_source(folder, tokenizer_config)
    if source is None:
        return None
    try:
        return ChatTemplate(source, variables)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigurationError(f"{folder}: the chat template is not valid: {error.message}") from error


def _find_source(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    try:
        if (folder / "chat_template.jinja").is_file():
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        found = _default_of(tokenizer_config.get("chat_template"))
        if found is None and (folder / "chat_template.json").is_file():
            content = json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))
            found = _default_of(content.get("chat_template")) if isinstance(content, dict) else None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{folder}: the chat template cannot be read: {error}") from error
    return found


def _default_of(entry: object) -> str | None:
    """A template is given as text, or as a list of named ones."""
    if isinstance(entry, list):
        named = {each.get("name"): each.get("template") for each in entry if isinstance(each, dict)}
        entry = named.get("default")
    return entry if isinstance(entry, str) else None


class _Refusal(jinja2.TemplateError):
    """A template called raise_exception."""


class _GenerationTag(Extension):
    """Accepts `{% generation %}`, which marks the model's turns for training and means nothing here."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    helpers: dict[str, Callable[..., Any]] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals.update(helpers)
    environment.filters["tojson"] = _to_json
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter would escape what HTML does not allow."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
