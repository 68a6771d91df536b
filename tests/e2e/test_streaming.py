"""What a client sees of one request: its chunks, its text, its end, and what a second reader sees."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from kvrelay import AsyncClient, Client
from kvrelay.client import Completion
from kvrelay.errors import DeadlineExceeded, NotFound
from kvrelay.request import Chunk, FinishReason, Timings
from tests.checkpoints import oracle_logits
from tests.e2e.cluster import Cluster
from tests.patience import eventually

PROMPT = "Once upon a time"
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
FOREVER: dict[str, Any] = {**GREEDY, "max_tokens": 8192}
EOS = 1
REPLACEMENT = "\ufffd"


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))


@pytest.fixture(scope="module")
def greedy(cluster: Cluster) -> Completion:
    with cluster.client() as client:
        return client.complete(PROMPT, max_tokens=100, **GREEDY)


@pytest.fixture(autouse=True)
def whole(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.wait_whole()


def text_of(chunks: Sequence[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def tokens_of(chunks: Sequence[Chunk]) -> tuple[int, ...]:
    return tuple(token_id for chunk in chunks for token_id in chunk.token_ids)


# Chunks and text


def test_chunks_make_the_whole(client: Client, tokenizer: Tokenizer) -> None:
    texts = [check_chunks(client, tokenizer, seed) for seed in range(8)]
    # Characters were put together from the bytes of several tokens, and none was cut.
    assert any(ord(character) > 127 and character != REPLACEMENT for text in texts for character in text)


def check_chunks(client: Client, tokenizer: Tokenizer, seed: int) -> str:
    """Streams a text of random tokens, many of which are single bytes."""
    chunks = list(client.generate(PROMPT, max_tokens=200, temperature=3.0, seed=seed, ignore_eos=True))
    again = client.complete(PROMPT, max_tokens=200, temperature=3.0, seed=seed, ignore_eos=True)
    text, token_ids = text_of(chunks), tokens_of(chunks)
    assert [chunk.seq for chunk in chunks] == list(range(1, len(chunks) + 1))
    assert len({chunk.request_id for chunk in chunks}) == 1
    assert [bool(chunk.finish_reason) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [bool(chunk.usage and chunk.timings) for chunk in chunks] == [bool(c.finish_reason) for c in chunks]
    assert all(chunk.text or chunk.token_ids or chunk.finish_reason for chunk in chunks)
    assert len(token_ids) == 200
    assert text == tokenizer.decode(list(token_ids)) == again.text
    assert token_ids == again.token_ids
    return text


def test_text_and_tokens_and_chat_are_ways_to_say_the_same(
    client: Client, tokenizer: Tokenizer, greedy: Completion
) -> None:
    by_tokens = client.complete(token_ids=tokenizer.encode(PROMPT).ids, max_tokens=100, **GREEDY)
    assert (by_tokens.text, by_tokens.token_ids) == (greedy.text, greedy.token_ids)
    messages = [{"role": "system", "content": "Be brief. ü"}, {"role": "user", "content": "Hi"}]
    chat = client.complete(messages=messages, max_tokens=20, **GREEDY)
    rendered = "<system> Be brief. ü\n<user> Hi\n<assistant>"
    assert chat.token_ids == client.complete(rendered, max_tokens=20, **GREEDY).token_ids
    assert chat.usage.prompt_tokens == len(tokenizer.encode(rendered).ids)


# Ends


def test_a_stop_string_across_tokens(client: Client, tokenizer: Tokenizer, greedy: Completion) -> None:
    index, stop = across_tokens(greedy, tokenizer)
    result = client.complete(PROMPT, max_tokens=100, stop=["never there", stop], **GREEDY)
    assert result.finish_reason is FinishReason.STOP
    assert result.text == greedy.text[: greedy.text.index(stop)]
    assert result.token_ids == greedy.token_ids[: index + 1]
    assert result.usage.completion_tokens == index + 1


def across_tokens(greedy: Completion, tokenizer: Tokenizer) -> tuple[int, str]:
    """A string that begins in one token and ends in the next, and the index of the latter."""
    pieces = [tokenizer.decode([token_id]) for token_id in greedy.token_ids]
    for index in range(4, len(pieces)):
        left, right = pieces[index - 1][-2:], pieces[index][:2]
        before = tokenizer.decode(list(greedy.token_ids[: index - 1])) + pieces[index - 1]
        stop = left + right
        if len(stop) == 4 and stop.isascii() and greedy.text.find(stop) == len(before) - 2:
            return index, stop
    raise AssertionError("the greedy text has no such place")


def test_a_stop_string_of_which_only_the_beginning_comes(client: Client, greedy: Completion) -> None:
    result = client.complete(PROMPT, max_tokens=100, stop=[greedy.text[-3:] + "and more", "\x00" * 256], **GREEDY)
    assert result.finish_reason is FinishReason.LENGTH
    assert (result.text, result.token_ids) == (greedy.text, greedy.token_ids)


@pytest.mark.parametrize("seed", range(4))
def test_a_stop_string_at_the_very_beginning(client: Client, tokenizer: Tokenizer, seed: int) -> None:
    whole = client.complete(PROMPT, max_tokens=4, seed=seed, ignore_eos=True)
    index = next(n for n in range(1, 5) if tokenizer.decode(list(whole.token_ids[:n])).strip(REPLACEMENT))
    result = client.complete(PROMPT, max_tokens=4, seed=seed, ignore_eos=True, stop=whole.text.lstrip(REPLACEMENT)[0])
    assert result.finish_reason is FinishReason.STOP
    assert result.text.strip(REPLACEMENT) == ""
    assert result.token_ids == whole.token_ids[:index]


@pytest.mark.parametrize("index", [0, 1, 20])
def test_a_stop_token_ends_and_belongs_to_the_completion(client: Client, greedy: Completion, index: int) -> None:
    stop = greedy.token_ids[index]
    first = greedy.token_ids.index(stop)
    result = client.complete(PROMPT, max_tokens=100, stop_token_ids=[stop], **GREEDY)
    assert result.finish_reason is FinishReason.STOP
    assert result.token_ids == greedy.token_ids[: first + 1]
    assert result.usage.completion_tokens == first + 1


def test_a_first_token_that_is_the_last_ends_well_however_its_news_race(client: Client, greedy: Completion) -> None:
    first = greedy.token_ids[0]

    def run(_: int) -> Completion:
        return client.complete(PROMPT, max_tokens=100, stop_token_ids=[first], **GREEDY)

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(run, range(60)))
    assert {(result.finish_reason, result.token_ids) for result in results} == {(FinishReason.STOP, (first,))}


def test_the_end_of_sequence_ends_unless_it_is_ignored(client: Client) -> None:
    def run(seed: int, ignore_eos: bool) -> Completion:
        return client.complete(PROMPT, max_tokens=300, temperature=100.0, seed=seed, ignore_eos=ignore_eos)

    seed, ignored = next((n, result) for n in range(20) if EOS in (result := run(n, True)).token_ids[1:-1])
    end = ignored.token_ids.index(EOS) + 1
    result = run(seed, False)
    assert ignored.finish_reason is FinishReason.LENGTH
    assert len(ignored.token_ids) == 300
    assert result.finish_reason is FinishReason.STOP
    assert result.token_ids == ignored.token_ids[:end]
    assert ignored.text.startswith(result.text.rstrip(REPLACEMENT))


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_few_tokens(client: Client, greedy: Completion, max_tokens: int) -> None:
    result = client.complete(PROMPT, max_tokens=max_tokens, **GREEDY)
    assert result.finish_reason is FinishReason.LENGTH
    assert result.token_ids == greedy.token_ids[:max_tokens]
    assert result.usage.completion_tokens == max_tokens
    assert_plausible(result.timings)


# What is told beside the text


def test_log_probabilities_are_those_of_the_model(client: Client, tokenizer: Tokenizer, tiny_llama: Path) -> None:
    prompt = tokenizer.encode(PROMPT).ids
    result = client.complete(PROMPT, max_tokens=8, temperature=2.0, top_k=50, seed=3, logprobs=5, ignore_eos=True)
    assert [entry.token_id for entry in result.logprobs] == list(result.token_ids)
    for index, entry in enumerate(result.logprobs):
        logits = oracle_logits(tiny_llama, [*prompt, *result.token_ids[:index]])
        expected = torch.log_softmax(logits, dim=-1)
        top = torch.topk(expected, 5)
        assert entry.logprob == pytest.approx(float(expected[entry.token_id]), abs=1e-4)
        assert [token_id for token_id, _ in entry.top] == top.indices.tolist()
        assert [logprob for _, logprob in entry.top] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_usage_and_timings(client: Client, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("a prompt for this test alone, and of more than three blocks " * 3).ids
    for cached in (0, (len(prompt) - 1) // 16 * 16):
        result = client.complete(token_ids=prompt, max_tokens=30, **GREEDY)
        assert result.usage.prompt_tokens == len(prompt)
        assert result.usage.cached_tokens == cached
        assert result.usage.completion_tokens == len(result.token_ids) == 30
        assert_plausible(result.timings)
        assert result.timings.prefill > 0
        assert result.timings.first_decode_step > 0


def assert_plausible(timings: Timings) -> None:
    stages = {name: getattr(timings, name) for name in Timings.__slots__}
    assert all(seconds >= 0 for seconds in stages.values())
    to_first_token = timings.gateway_queue + timings.prefill_queue + timings.prefill
    assert 0 < to_first_token <= timings.time_to_first_token <= timings.total
    after = timings.transfer + timings.decode_queue + timings.first_decode_step
    assert to_first_token + after <= timings.total


# Who reads, and how often


def test_a_second_reader_and_a_reconnect(client: Client) -> None:
    request: dict[str, Any] = {"max_tokens": 200, "temperature": 1.0, "ignore_eos": True}
    first = client.generate(PROMPT, **request)
    chunks = [next(first) for _ in range(3)]
    again = {**request, "request_id": first.request_id}
    with ThreadPoolExecutor() as threads:  # while it runs
        later = threads.submit(lambda: list(client.generate(PROMPT, **again, resume_after_seq=2)))
        whole = threads.submit(lambda: list(client.generate(PROMPT, **again)))
        chunks += list(first)
        assert later.result() == chunks[2:]
        assert whole.result() == chunks
    for seq in (0, 1, len(chunks) // 2, len(chunks) - 1, len(chunks)):  # after its end
        assert list(client.generate(PROMPT, **again, resume_after_seq=seq)) == chunks[seq:]


def test_one_reader_leaves_and_the_other_reads_on(client: Client) -> None:
    stays = client.generate(PROMPT, max_tokens=300, **GREEDY)
    next(stays)
    leaves = client.generate(PROMPT, max_tokens=300, request_id=stays.request_id, **GREEDY)
    next(leaves)
    leaves.close()
    rest = list(stays)
    assert rest[-1].finish_reason is FinishReason.LENGTH
    assert rest[-1].usage is not None
    assert rest[-1].usage.completion_tokens == 300


def test_one_id_runs_once(client: Client) -> None:
    def run(_: int) -> Completion:
        return client.complete(PROMPT, request_id="once", max_tokens=50, temperature=2.0, ignore_eos=True)

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(run, range(8)))
    assert len({result.token_ids for result in [*results, run(0)]}) == 1  # no seed was given


# Leaving


def test_an_abort_ends_the_stream_well(client: Client) -> None:
    with client.generate(PROMPT, **FOREVER) as stream:
        chunks = [next(stream), next(stream)]
        client.abort(stream.request_id)
        chunks += list(stream)
    last = chunks[-1]
    assert last.finish_reason is FinishReason.ABORT
    assert last.usage is not None
    assert last.usage.completion_tokens == len(tokens_of(chunks)) < 8000
    assert [chunk.seq for chunk in chunks] == list(range(1, len(chunks) + 1))
    client.abort(stream.request_id)  # it has ended; nothing changes
    again = list(client.generate(PROMPT, request_id=stream.request_id, **FOREVER))
    assert again == chunks


def test_an_abort_at_any_moment(client: Client) -> None:
    for index in range(20):
        request_id = f"abort-{index}"
        with ThreadPoolExecutor() as threads:
            running = threads.submit(client.complete, PROMPT, request_id=request_id, **FOREVER)
            threading.Event().wait(0.002 * index)
            while not running.done():
                try:
                    client.abort(request_id)
                    break
                except NotFound:
                    continue  # it has not arrived yet
            assert running.result(30).finish_reason is FinishReason.ABORT


def test_an_abort_of_nothing(client: Client) -> None:
    with pytest.raises(NotFound, match="no-such-request"):
        client.abort("no-such-request")


@pytest.mark.parametrize("num_chunks", [0, 1, 5])
def test_leaving_the_loop_frees_the_blocks(cluster: Cluster, client: Client, num_chunks: int) -> None:
    with client.generate(PROMPT, **FOREVER) as stream:
        for _ in range(num_chunks):
            next(stream)
        if num_chunks:
            assert not cluster.is_whole()
    eventually(cluster.is_whole, 3, "all blocks free")


def test_who_left_may_send_the_same_request_again(cluster: Cluster, client: Client) -> None:
    with client.generate(PROMPT, request_id="again", **FOREVER) as stream:
        next(stream)
    cluster.wait_whole()
    with client.generate(PROMPT, request_id="again", **FOREVER) as stream:
        assert next(stream).seq == 1


def test_a_deadline_in_the_middle(cluster: Cluster, client: Client) -> None:
    stream = client.generate(PROMPT, timeout=1.0, **FOREVER)
    assert next(stream).seq == 1
    with pytest.raises(DeadlineExceeded):
        list(stream)
    eventually(cluster.is_whole, 3, "all blocks free")
    assert client.complete(PROMPT, max_tokens=2, **GREEDY).usage.completion_tokens == 2


# The asyncio client


async def test_the_asyncio_client(cluster: Cluster, greedy: Completion) -> None:
    async with AsyncClient(cluster.target, timeout=60) as client, asyncio.timeout(60):
        results = await asyncio.gather(*(client.complete(PROMPT, max_tokens=n, **GREEDY) for n in (1, 2, 30, 100)))
        assert [result.token_ids for result in results] == [greedy.token_ids[:n] for n in (1, 2, 30, 100)]
        stream = client.generate(PROMPT, **FOREVER)
        assert (await anext(stream)).seq == 1
        await client.abort(stream.request_id)
        rest = [chunk async for chunk in stream]
        assert rest[-1].finish_reason is FinishReason.ABORT
        async with client.generate(PROMPT, **FOREVER) as left:
            assert (await anext(left)).seq == 1
        with pytest.raises(DeadlineExceeded):
            await client.complete(PROMPT, timeout=0.3, **FOREVER)
        with pytest.raises(NotFound):
            await client.abort("no-such-request")
        assert [model.id for model in await client.list_models()] == ["tiny-llama"]
        assert len((await client.status()).workers) == 2
