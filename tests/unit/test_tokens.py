"""The tokenizer of a checkpoint folder: the ids that transformers gives, and what else the folder says."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers
from transformers import AutoTokenizer

from gateway.chat_template import ChatMessage
from gateway.prompt_bound import longest_token
from gateway.tokens import ChatPrompt, TextPrompt, Tokenizer, TokenizerPool, TokenPrompt
from kvrelay.errors import ConfigurationError, InvalidArgument
from kvrelay.request import SamplingParams
from tests.patience import SOON
from tests.unit import small_tokenizers

DEMO_MODEL = Path(__file__).parents[2] / "kvrelay" / "demo_model"
LONG_TEXT = " ".join(small_tokenizers.TEXTS * 40)
KINDS: dict[str, Callable[[], Backend]] = {
    "byte level": small_tokenizers.byte_level,
    "byte level with bos": lambda: small_tokenizers.byte_level(bos=True),
    "byte fallback": small_tokenizers.byte_fallback,
    "byte fallback without strip": lambda: small_tokenizers.byte_fallback(strip=False),
    "unigram": small_tokenizers.unigram,
}


@pytest.mark.parametrize("kind", KINDS)
def test_encodes_as_transformers_does(kind: str, tmp_path: Path) -> None:
    folder = small_tokenizers.save(tmp_path, KINDS[kind]())
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in [*small_tokenizers.TEXTS, "<|bos|>a<tool call>漢字 <s> x</s>", "", LONG_TEXT]:
        for special in (True, False):
            assert ours.encode(text, add_special_tokens=special) == theirs.encode(text, add_special_tokens=special)


def test_encodes_as_transformers_does_where_the_file_truncates(tmp_path: Path) -> None:
    backend = small_tokenizers.byte_level()
    backend.enable_truncation(16)
    backend.enable_padding(length=16)
    folder = small_tokenizers.save(tmp_path, backend)
    ids = Tokenizer(folder).encode(LONG_TEXT)
    assert len(ids) > 1000
    assert ids == AutoTokenizer.from_pretrained(folder).encode(LONG_TEXT)
    assert len(Tokenizer(folder).encode("a")) == 1


def test_tokens_that_only_the_configuration_names_are_added_as_transformers_adds_them(tmp_path: Path) -> None:
    listed = {"content": "<|turn|>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    config = {"pad_token": "<|pad|>", "added_tokens_decoder": {"422": {**listed, "special": True}}}
    folder = small_tokenizers.save(tmp_path, small_tokenizers.byte_level(), tokenizer_config=config)
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    ids = ours.encode("a<|turn|>b<|pad|>c")
    assert ids == theirs.encode("a<|turn|>b<|pad|>c")
    assert len(ids) == 5
    detokenizer = ours.detokenizer()
    assert detokenizer.push(ids) + detokenizer.flush() == theirs.decode(ids, skip_special_tokens=True) == "abc"


def test_the_demo_model() -> None:
    tokenizer = Tokenizer(DEMO_MODEL)
    ids = tokenizer.encode("Once upon a time")
    assert ids == AutoTokenizer.from_pretrained(DEMO_MODEL).encode("Once upon a time")
    assert ids[0] == 0
    assert (tokenizer.vocab_size, tokenizer.context_length) == (2048, 1024)
    assert tokenizer.eos_token_ids == {1}
    assert tokenizer.default_sampling.temperature == pytest.approx(0.8)
    assert tokenizer.encode_chat([ChatMessage("user", "Once")])[0] == 0


@pytest.mark.parametrize(
    ("generation_config", "config", "expected"),
    [
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 1}, {7, 8}),
        ({"eos_token_id": 0}, {"eos_token_id": 1}, {0}),
        ({"eos_token_id": None}, {"eos_token_id": 1}, {1}),
        (None, {"text_config": {"eos_token_id": [3]}}, {3}),
        (None, {}, set()),
    ],
)
def test_end_of_sequence_tokens(
    generation_config: dict[str, object] | None, config: dict[str, object], expected: set[int], tmp_path: Path
) -> None:
    backend = small_tokenizers.byte_level()
    folder = small_tokenizers.save(tmp_path, backend, config=config, generation_config=generation_config)
    assert Tokenizer(folder).eos_token_ids == expected


@pytest.mark.parametrize(
    ("generation_config", "expected"),
    [
        (None, SamplingParams()),
        ({"do_sample": False}, SamplingParams()),
        ({"temperature": 0.0, "top_k": 0}, SamplingParams(temperature=0.0, top_k=0)),
        (
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.2, "max_length": 20},
            SamplingParams(temperature=0.6, top_k=20, top_p=0.95, min_p=0.1),
        ),
    ],
)
def test_default_sampling(
    generation_config: dict[str, object] | None, expected: SamplingParams, tmp_path: Path
) -> None:
    folder = small_tokenizers.save(tmp_path, small_tokenizers.byte_level(), generation_config=generation_config)
    assert Tokenizer(folder).default_sampling == expected


def test_sizes_come_from_a_nested_configuration_too(tmp_path: Path) -> None:
    config = {"vocab_size": None, "max_position_embeddings": None}
    nested = {"text_config": {"vocab_size": 999, "n_positions": 64}}
    folder = small_tokenizers.save(tmp_path, small_tokenizers.byte_level(), config={**config, **nested})
    tokenizer = Tokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.context_length) == (999, 64)
    assert Tokenizer(folder, context_length=32).context_length == 32
    assert Tokenizer(folder, context_length=128).context_length == 64


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tokenizer.json", None, "save_pretrained"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("config.json", None, "cannot be read"),
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[]", "not a JSON object"),
        ("config.json", '{"vocab_size": 9}', "max_position_embeddings"),
        ("config.json", '{"n_ctx": 9}', "vocab_size"),
        ("generation_config.json", '{"temperature": -1}', "temperature: -1"),
        ("generation_config.json", '{"temperature": NaN}', "temperature: nan"),
        ("generation_config.json", '{"top_p": 1.5}', "top_p: 1.5"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "not a tokenizer"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "chat template"),
    ],
)
def test_a_broken_folder_is_refused(name: str, content: str | None, problem: str, tmp_path: Path) -> None:
    folder = small_tokenizers.save(tmp_path, small_tokenizers.byte_level())
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(ConfigurationError) as caught:
        Tokenizer(folder)
    assert problem in str(caught.value)
    assert str(folder) in str(caught.value)


BOUNDED = {kind: make() for kind, make in KINDS.items() if kind != "unigram"}


@pytest.mark.parametrize("kind", BOUNDED)
@given(text=st.text(max_size=200) | st.text(st.sampled_from(" aon\n"), max_size=200))
@settings(max_examples=60)
def test_no_token_is_longer_than_the_longest(kind: str, text: str) -> None:
    longest = longest_token(BOUNDED[kind])
    assert longest is not None
    assert len(BOUNDED[kind].encode(text, add_special_tokens=False).ids) >= len(text.encode()) / longest


def test_nothing_is_known_of_the_longest_token_where_text_may_vanish() -> None:
    stripping = small_tokenizers.byte_level()
    stripping.normalizer = normalizers.Strip()
    assert longest_token(stripping) is None
    assert longest_token(small_tokenizers.unigram()) is None


def test_a_hopelessly_long_text_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(small_tokenizers.save(tmp_path, small_tokenizers.byte_level()))
    with monkeypatch.context() as unread:
        unread.setattr(tokenizer, "encode", lambda text: pytest.fail("it was encoded"))
        with pytest.raises(InvalidArgument) as caught:
            tokenizer.encode_prompt(TextPrompt("a " * (1 << 21)))
    [violation] = caught.value.violations
    assert violation.field == "text"
    assert "room for 511" in violation.description
    assert len(tokenizer.encode_prompt(TextPrompt("a " * 400))) > 400


async def test_the_pool_encodes_each_kind_of_prompt(tmp_path: Path) -> None:
    config = {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    tokenizer = Tokenizer(
        small_tokenizers.save(tmp_path, small_tokenizers.byte_level(bos=True), tokenizer_config=config)
    )
    pool = TokenizerPool(tokenizer)
    try:
        assert await pool.encode_prompt(TextPrompt("a b")) == tokenizer.encode("a b")
        assert await pool.encode_prompt(TokenPrompt((5, 6))) == [5, 6]
        chat = ChatPrompt((ChatMessage("user", "a "), ChatMessage("user", "b")))
        assert await pool.encode_prompt(chat) == tokenizer.encode("a b", add_special_tokens=False)
    finally:
        pool.close()


async def test_long_prompts_never_keep_short_ones_waiting(tmp_path: Path) -> None:
    tokenizer = Tokenizer(small_tokenizers.save(tmp_path, small_tokenizers.byte_level()))
    begun, go_on = threading.Event(), threading.Event()

    class Slow(Tokenizer):
        def __init__(self) -> None: ...

        def encode_prompt(self, prompt: object) -> list[int]:
            if isinstance(prompt, TextPrompt) and len(prompt.text) >= TokenizerPool.LONG_PROMPT:
                begun.set()
                go_on.wait(10)
            return tokenizer.encode("short")

    pool = TokenizerPool(Slow(), threads=1)
    try:
        long = [asyncio.create_task(pool.encode_prompt(TextPrompt("a" * (1 << 17)))) for _ in range(4)]
        await asyncio.to_thread(begun.wait, 10)
        long[1].cancel()
        assert await asyncio.wait_for(pool.encode_prompt(TextPrompt("short")), SOON) == tokenizer.encode("short")
    finally:
        go_on.set()
        await asyncio.gather(*long, return_exceptions=True)
        pool.close()


def test_the_gateway_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, gateway.validation, gateway.router, gateway.response_log; print(*sys.modules)"
    root = Path(__file__).parents[2]
    answer = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True, timeout=60)
    assert not {"torch", "transformers"} & set(answer.stdout.decode().split())
