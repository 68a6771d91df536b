"""What a request leaves behind where operators look: nothing that its client wrote."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gateway.relay import Relay
from gateway.requests import CancelHandle
from gateway.response_log import ResponseLog
from gateway.tokens import Tokenizer, TokenizerPool
from gateway.validation import parse_generate
from kvrelay import telemetry
from kvrelay.errors import Internal, InvalidArgument, KvrelayError
from kvrelay.v1 import inference_pb2
from tests.unit import small_tokenizers

SECRET = "whistleblower"
TEMPLATE = "{{ raise_exception('no conversation has a ' + messages[0]['role']) }}"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "tracer", lambda: provider.get_tracer("kvrelay"))
    yield exporter
    provider.shutdown()


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[TokenizerPool]:
    tokenizer_config = {"chat_template": TEMPLATE}
    folder = small_tokenizers.save(tmp_path, small_tokenizers.byte_level(), tokenizer_config=tokenizer_config)
    pool = TokenizerPool(Tokenizer(folder))
    yield pool
    pool.close()


async def run(pool: TokenizerPool) -> KvrelayError:
    """Runs a chat whose role and content are secret; answers what the client is told."""
    nobody: Any = None  # who would be asked next
    tokenizer = pool._tokenizer
    relay = Relay(tokenizer, pool, nobody, nobody, max_failures=1)
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role=SECRET, content=SECRET)])
    proto = inference_pb2.GenerateRequest(chat=chat)
    call = parse_generate(proto, model="model", vocab_size=tokenizer.vocab_size, context_length=512)
    log = ResponseLog(call.request_id)
    with contextlib.suppress(ValueError):  # a defect is for whoever runs the task
        await relay.run(call, log, CancelHandle(), Context(), None)
    with pytest.raises(KvrelayError) as caught:
        _ = [chunk async for chunk in log.read()]
    return caught.value


async def test_what_a_template_says_of_a_chat_is_the_clients_alone(
    spans: InMemorySpanExporter, pool: TokenizerPool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        error = await run(pool)
    assert isinstance(error, InvalidArgument)
    assert SECRET in error.message
    _check(spans, "INVALID_ARGUMENT")
    assert SECRET not in caplog.text


async def test_a_defect_leaves_no_text_in_a_span(
    spans: InMemorySpanExporter, pool: TokenizerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(prompt: Any) -> list[int]:
        raise ValueError(f"cannot encode {prompt}")

    monkeypatch.setattr(pool._tokenizer, "encode_prompt", fail)
    error = await run(pool)
    assert isinstance(error, Internal)
    assert SECRET not in error.message
    _check(spans, "INTERNAL")


def _check(spans: InMemorySpanExporter, reason: str) -> None:
    tokenize, generate = spans.get_finished_spans()
    assert (tokenize.name, generate.name) == ("kvrelay.tokenize", "kvrelay.generate")
    assert generate.status.description == reason
    assert generate.attributes is not None
    assert generate.attributes["error.type"] == reason
    assert SECRET not in tokenize.to_json() + generate.to_json()
