"""Models with random weights that are made on the device: speed does not depend on what the weights are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from kvrelay.engine.block_pool import BlockPool
from kvrelay.engine.engine import Engine
from kvrelay.engine.kernels import choose_kernels
from kvrelay.engine.kv_cache import KvCache
from kvrelay.engine.kv_layout import KvLayout
from kvrelay.engine.limits import Limits
from kvrelay.engine.models.llama import LlamaModel, LlamaShape
from kvrelay.engine.models.spec import ModelSpec
from kvrelay.engine.runner import ModelRunner
from kvrelay.engine.scheduler import Scheduler
from kvrelay.engine.sequence import Role
from kvrelay.engine.sequence import Sequence as EngineSequence
from kvrelay.request import Request, Sampling
from kvrelay.settings import EngineSettings

__all__ = ["SHAPES", "ModelCase", "RandomWeights", "new_sequence"]

tf: Any = transformers  # much of it has no types
BLOCK_SIZE = 16
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": (
        "LlamaForCausalLM",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "qwen3-0.6b": (
        "Qwen3ForCausalLM",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
    ),
    "tiny": (
        "Qwen3ForCausalLM",
        {
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
    ),
}
_CONFIGS = {"LlamaForCausalLM": tf.LlamaConfig, "Qwen3ForCausalLM": tf.Qwen3Config}


class RandomWeights:
    """Implements `kvrelay.engine.weights.WeightSource` without a file."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._generator = torch.Generator(device).manual_seed(7)

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        return self.take_stacked([name], [shape[0]], shape[1:])

    def take_stacked(self, names: Sequence[str], heights: Sequence[int], shape: Sequence[int] = ()) -> torch.Tensor:
        stacked = torch.empty(sum(heights), *shape, dtype=self._dtype, device=self._device)
        is_norm = not shape
        return stacked.fill_(1.0) if is_norm else stacked.normal_(0.0, 0.02, generator=self._generator)

    def finish(self, ignore: str) -> None:
        """There is no file in which something could be left."""


@dataclass(frozen=True, slots=True)
class ModelCase:
    """A shape on a device.

    Attributes:
        context_length: tokens a sequence may have.
        max_num_sequences: sequences in a batch.
    """

    name: str
    device: torch.device
    context_length: int
    max_num_sequences: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def config(self) -> Any:
        """Of transformers."""
        architecture, fields = SHAPES[self.name]
        config = _CONFIGS[architecture](**fields, max_position_embeddings=self.context_length)
        config.architectures = [architecture]
        return config

    def shape(self) -> LlamaShape:
        shape = LlamaShape.from_config(self.config(), SHAPES[self.name][0])
        if shape is None:
            raise ValueError(f"{self.name} is not of the Llama family")
        return shape

    def runner(self, num_tokens: int, **settings: Any) -> ModelRunner:
        """The engine's runner, with a KV cache for `num_tokens`, or for fewer if the device has not the memory."""
        shape = self.shape()
        dtype = str(self.dtype).removeprefix("torch.")
        layout = KvLayout(b"random", dtype, BLOCK_SIZE, shape.num_layers, shape.num_kv_heads, shape.head_dim)
        model = LlamaModel(shape, self.config(), RandomWeights(self.device, self.dtype), self.device)
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            num_blocks = min(num_blocks, int(0.85 * free) // layout.block_bytes)
        cache = KvCache(layout, num_blocks, self.device)
        for block in cache.tensor:  # zeros would take less power, and be faster than life
            block.normal_()
        kernels = choose_kernels(self.device, self.dtype, shape.head_dim)
        engine_settings = EngineSettings(max_num_sequences=self.max_num_sequences, **settings)
        return ModelRunner(model, self.spec(), cache, kernels, self.context_length, engine_settings)

    def spec(self) -> ModelSpec:
        architecture, shape = SHAPES[self.name][0], self.shape()
        return ModelSpec(
            architecture=architecture,
            vocab_size=shape.vocab_size,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            context_length=self.context_length,
            context_limit="the benchmark wants no more",
            sliding_window=None,
            dtype=str(self.dtype).removeprefix("torch."),
        )

    def engine(self, runner: ModelRunner, max_batched_tokens: int) -> Engine:
        """An engine with nothing in it over a runner that may have served before."""
        limits = Limits(
            max_num_sequences=self.max_num_sequences,
            max_batched_tokens=max_batched_tokens,
            context_length=self.context_length,
            block_size=BLOCK_SIZE,
            prefix_caching=False,
        )
        return Engine(Scheduler(BlockPool(runner.num_blocks), limits), runner)

    @property
    def num_streamed_weights(self) -> int:
        """Weights that a decode step reads: all but an embedding of which it reads a few rows only."""
        shape = self.shape()
        queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        attention = shape.hidden_size * (2 * queries + 2 * keys)
        mlp = 3 * shape.hidden_size * shape.intermediate_size
        return shape.num_layers * (attention + mlp) + shape.vocab_size * shape.hidden_size

    @property
    def kv_bytes_per_token(self) -> int:
        shape = self.shape()
        return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * self.dtype.itemsize


def new_sequence(name: str, length: int, max_tokens: int, role: Role = Role.WHOLE) -> EngineSequence:
    """A greedy request of `length` prompt tokens."""
    prompt = tuple((37 * position + len(name)) % 200 for position in range(length))
    return EngineSequence(Request(name, prompt, Sampling(max_tokens)), role)
