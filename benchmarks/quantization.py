"""What `--quantization int8` gains and loses against float32, on the CPU.

    python -m benchmarks.quantization [--corpus ../shared/corpus] [--shapes small base] [--update-docs]

Speed: steps of decoding at several batch sizes and of prefill, on checkpoints with random weights, float32 and int8 in
turn, so that a slower moment of the machine meets both; the ratio is taken within each turn. Loss: the demo model reads
text that it was not trained on (the stretches that scripts/train_demo_model holds out of --corpus; without a corpus
this row is left out), and the random checkpoints read random tokens.

Tables: quantization-speed, quantization-loss.
"""

import argparse
import os
import random
import runpy
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks import results
from benchmarks.checkpoints import SHAPES, make
from benchmarks.results import Row, measure
from benchmarks.workloads import VOCAB_SIZE
from kvrelay.engine.attention import PagedAttention
from kvrelay.engine.batch import make_input
from kvrelay.engine.checkpoint import resolve_checkpoint
from kvrelay.engine.kernels import choose_kernels
from kvrelay.engine.kv_cache import KvCache
from kvrelay.engine.kv_layout import KvLayout
from kvrelay.engine.models.registry import inspect_model, load_model
from kvrelay.engine.runner import ModelRunner
from kvrelay.engine.sequence import Chunk
from kvrelay.engine.sequence import Sequence as EngineSequence
from kvrelay.request import Request, Sampling
from kvrelay.settings import EngineSettings

__all__ = ["main"]

MODES = ("none", "int8")
DECODE_BATCHES = (1, 2, 4, 8, 16, 32)
PREFILL_TOKENS = (256, 512)
BLOCK_SIZE = 16
CONTEXT = 64  # tokens before those that are timed
ROOT = Path(__file__).parents[1]


@dataclass(slots=True)
class Divergence:
    """How the distributions of the next token differ, summed over tokens."""

    tokens: int = 0
    nats: float = 0.0
    quantized_nats: float = 0.0
    divergence: float = 0.0
    equal: int = 0
    error: float = 0.0
    size: float = 0.0

    def add(self, exact: torch.Tensor, quantized: torch.Tensor, following: torch.Tensor) -> None:
        """Logits `[R, vocabulary]` of both, and the tokens `[R]` that did follow."""
        first, second = (logits.double().log_softmax(dim=1) for logits in (exact, quantized))
        self.tokens += len(following)
        self.nats -= first.gather(1, following[:, None]).sum().item()
        self.quantized_nats -= second.gather(1, following[:, None]).sum().item()
        self.divergence += (first.exp() * (first - second)).sum().item()
        self.equal += int((exact.argmax(dim=1) == quantized.argmax(dim=1)).sum())
        self.error += (exact - quantized).double().square().sum().item()
        self.size += exact.double().square().sum().item()

    def row(self, model: str, text: str) -> Row:
        return {
            "model": model,
            "text": text,
            "tokens": self.tokens,
            "float32, nats/token": f"{self.nats / self.tokens:.4f}",
            "int8, nats/token": f"{self.quantized_nats / self.tokens:.4f}",
            "KL divergence, nats": f"{self.divergence / self.tokens:.1e}",
            "equal greedy tokens": f"{self.equal / self.tokens:.2%}",
            "relative error of logits": f"{(self.error / self.size) ** 0.5:.2%}",
        }


def load_pair(folder: Path, threads: int) -> dict[str, ModelRunner]:
    """The same checkpoint in both forms."""
    return {
        mode: ModelRunner.load(
            folder, EngineSettings(dtype="float32", device="cpu", quantization=mode, threads=threads)
        )
        for mode in MODES
    }


def new_sequences(layout: KvLayout, texts: Sequence[Sequence[int]], room: int = 0) -> list[EngineSequence]:
    """Sequences over the beginning of the pool, each with blocks for its text and `room` tokens more."""
    sequences, used = [], 0
    for index, text in enumerate(texts):
        sequence = EngineSequence(Request(str(index), tuple(text), Sampling(max_tokens=room + 1)))
        count = layout.blocks_for(len(text) + room)
        sequence.block_table = list(range(used, used + count))
        used += count
        sequences.append(sequence)
    return sequences


class Reader:
    """A model that gives the logits after each token of a text."""

    def __init__(self, folder: Path, quantization: str) -> None:
        device, dtype = torch.device("cpu"), torch.float32
        spec = inspect_model(folder)
        layout = KvLayout(b"", "float32", BLOCK_SIZE, spec.num_layers, spec.num_kv_heads, spec.head_dim)
        self._model = load_model(folder, spec, device, dtype, quantization)
        self._cache = KvCache(layout, layout.blocks_for(spec.context_length), device)
        self._kernels = choose_kernels(device, dtype, spec.head_dim)

    @torch.inference_mode()
    def logits(self, text: Sequence[int]) -> torch.Tensor:
        """`[T, vocabulary]`."""
        sequence = new_sequences(self._cache.layout, [text])[0]
        step = make_input([Chunk(sequence, 0, len(text))], self._cache)
        attention = PagedAttention(self._cache, step.batch, self._kernels)
        return self._model.forward(step.token_ids, step.batch.positions, torch.arange(len(text)), attention)


def compare(folder: Path, texts: Iterable[Sequence[int]]) -> Divergence:
    """Both forms of a checkpoint read the texts."""
    exact, quantized = (Reader(folder, mode) for mode in MODES)
    found = Divergence()
    for text in texts:
        found.add(exact.logits(text)[:-1], quantized.logits(text)[:-1], torch.tensor(text[1:]))
    return found


def held_out_texts(corpus: Path, folder: Path) -> list[list[int]]:
    """Token ids of the stretches that the demo model was not trained on."""
    from transformers import AutoTokenizer

    training = runpy.run_path(str(ROOT / "scripts" / "train_demo_model"))
    _, held = training["hold_out"]([training["read_book"](path) for path in sorted(corpus.glob("*.txt"))])
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return [tokenizer(text, truncation=True)["input_ids"] for text in held]


def random_texts(count: int, length: int) -> list[list[int]]:
    source = random.Random(0)
    return [[source.randrange(3, VOCAB_SIZE) for _ in range(length)] for _ in range(count)]


def decode_rate(runner: ModelRunner, batch: int, steps: int) -> float:
    """Tokens per second of `steps` decode steps after a context of CONTEXT tokens, sampling included."""
    sequences = new_sequences(runner.layout, random_texts(batch, CONTEXT), room=steps + 1)
    for sequence in sequences:
        runner.run([Chunk(sequence, 0, CONTEXT)])
        sequence.append(3, CONTEXT + steps + 2)
    started = time.perf_counter()
    for position in range(CONTEXT, CONTEXT + steps):
        tokens = runner.run([Chunk(sequence, position, 1) for sequence in sequences])
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.append(token.token_id, CONTEXT + steps + 2)
    return batch * steps / (time.perf_counter() - started)


def prefill_rate(runner: ModelRunner, length: int, steps: int) -> float:
    """Tokens per second of prompts of `length` tokens, each in one step."""
    (sequence,) = new_sequences(runner.layout, random_texts(1, length))
    started = time.perf_counter()
    for _ in range(steps):
        runner.run([Chunk(sequence, 0, length)])
    return steps * length / (time.perf_counter() - started)


def speed_rows(shape: str, pair: dict[str, ModelRunner], steps: int, repeats: int) -> list[Row]:
    """A row for each batch size and prompt length; every second turn begins with the other form."""
    work: dict[str, Callable[[ModelRunner], float]] = {
        **{f"decode, batch {batch}": partial(decode_rate, batch=batch, steps=steps) for batch in DECODE_BATCHES},
        **{
            f"prefill, {length} tokens": partial(prefill_rate, length=length, steps=max(steps // 16, 1))
            for length in PREFILL_TOKENS
        },
    }
    rows: list[Row] = []
    for name, run in work.items():
        rates: dict[str, list[float]] = {mode: [] for mode in MODES}
        for index in range(repeats + 1):
            for mode in MODES[::-1] if index % 2 else MODES:
                rate = run(pair[mode])
                if index:  # the first turn warms up
                    rates[mode].append(rate)
        gains = [fast / slow for slow, fast in zip(*rates.values(), strict=True)]
        columns = {"float32, tokens/s": rates["none"], "int8, tokens/s": rates["int8"], "int8 / float32": gains}
        rows.append({"shape": shape, "work": name, **{column: measure(values) for column, values in columns.items()}})
        print(f"{shape}, {name}: {rows[-1]['int8 / float32']}", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="folder with the books that the demo model was trained on")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["small", "base"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--steps", type=int, default=64, help="decode steps of one measurement")
    parser.add_argument("--repeats", type=int, default=5)
    results.add_flags(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shapes, arguments.steps, arguments.repeats = ["tiny"], 2, 1
    torch.set_num_threads(arguments.threads)
    speed: list[Row] = []
    loss: list[Row] = []
    if arguments.corpus:
        folder = resolve_checkpoint("demo")
        texts = held_out_texts(arguments.corpus, folder)
        loss.append(compare(folder, texts[:2] if arguments.quick else texts).row("demo", "held out"))
    with TemporaryDirectory() as temporary:
        for shape in arguments.shapes:
            folder = make(Path(temporary, shape), shape)
            loss.append(compare(folder, random_texts(4, 8 if arguments.quick else 256)).row(shape, "random"))
            speed += speed_rows(shape, load_pair(folder, arguments.threads), arguments.steps, arguments.repeats)
    results.publish(
        "quantization-speed",
        speed,
        arguments,
        caption=f"Steps with sampling; random weights, {arguments.threads} threads, contexts from {CONTEXT} tokens.",
    )
    results.publish(
        "quantization-loss",
        loss,
        arguments,
        caption="Float32 against int8 (weights 8 bits for each output channel, activations 16 bits for each row).",
    )


if __name__ == "__main__":
    main()
