"""Chat templates: what transformers renders, and an answer for every way in which a template can fail."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from gateway.chat_template import ChatMessage, load_chat_template
from gateway.tokens import Tokenizer
from kvrelay.errors import InvalidArgument
from tests.unit import small_tokenizers

# Written for this test in the manner of the families' own.
LLAMA_LIKE = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\nToday Date: " + date_string + "\\n\\n" + system_message + "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {{- raise_exception("No tools here!") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
"""
QWEN_LIKE = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and not ns.found %}
        {%- set ns.found = true %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}{%- continue %}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {% generation %}{{- content }}{% endgeneration %}
    {%- else %}
        {{- message.content }}{{ (loop.index0 == ns.last) | tojson }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
MISTRAL_LIKE = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
    {{ message['content'] + eos_token }} {# a comment #}
{% endif %}
{% endfor %}
"""
CONVERSATIONS: list[list[tuple[str, str]]] = [
    [("user", "Hello!  ")],
    [("system", " Be brief. "), ("user", 'Größe & <漢字> "quoted"?\n')],
    [("user", "One"), ("assistant", "<think>hm</think>\n\nTwo"), ("user", "Three")],
    [("user", "One"), ("assistant", ""), ("user", "<|eos|>")],
]
SPECIAL_TOKENS = {"bos_token": "<|bos|>", "eos_token": {"__type": "AddedToken", "content": "<|eos|>"}}


def messages_of(conversation: list[tuple[str, str]]) -> list[ChatMessage]:
    return [ChatMessage(role, content) for role, content in conversation]


def save(folder: Path, **tokenizer_config: Any) -> Path:
    backend = small_tokenizers.byte_level(bos=True)
    return small_tokenizers.save(folder, backend, tokenizer_config={**SPECIAL_TOKENS, **tokenizer_config})


@pytest.mark.parametrize("source", [LLAMA_LIKE, QWEN_LIKE, MISTRAL_LIKE], ids=["llama", "qwen", "mistral"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_encodes_a_chat_as_transformers_does(source: str, conversation: list[tuple[str, str]], tmp_path: Path) -> None:
    folder = save(tmp_path, chat_template=source)
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    if source == MISTRAL_LIKE and conversation[0][0] == "system":
        with pytest.raises(InvalidArgument, match="roles must alternate"):
            ours.encode_chat(messages_of(conversation))
        return
    conversation_of_dicts = [{"role": role, "content": content} for role, content in conversation]
    expected = theirs.apply_chat_template(conversation_of_dicts, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(messages_of(conversation)) == expected


def rendered(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    template = load_chat_template(folder, tokenizer_config, {"bos_token": "<s>"})
    return None if template is None else template.render([ChatMessage("user", "hi")])


def test_where_a_template_is_looked_for(tmp_path: Path) -> None:
    assert rendered(tmp_path, {}) is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert rendered(tmp_path, {}) == "from json"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ bos_token }}default"}]
    assert rendered(tmp_path, {"chat_template": named}) == "<s>default"
    assert rendered(tmp_path, {"chat_template": named[:1]}) == "from json"
    (tmp_path / "chat_template.jinja").write_text("from the file{{ unknown_token }}")
    assert rendered(tmp_path, {"chat_template": named}) == "from the file"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[7].content.upper() }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ range(10**9)|list }}",
    ],
)
def test_a_failing_template_gives_no_python_text(source: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(save(tmp_path, chat_template=source))
    with pytest.raises(InvalidArgument) as caught:
        tokenizer.encode_chat([ChatMessage("user", "hi")])
    [violation] = caught.value.violations
    assert violation.field == "chat"
    assert violation.description == "the model's chat template fails on these messages"


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="chat: this model has no chat template"):
        Tokenizer(save(tmp_path)).encode_chat([ChatMessage("user", "hi")])


def test_the_clock_and_json_as_templates_expect_them(tmp_path: Path) -> None:
    config = {"chat_template": "{{ strftime_now('%Y')|int > 2000 }} {{ {'é': '<b>'} | tojson(indent=1) }}"}
    assert rendered(tmp_path, config) == 'True {\n "é": "<b>"\n}'
