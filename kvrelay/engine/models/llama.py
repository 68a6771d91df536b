"""The Llama family, fused: Llama, Mistral, Qwen2 and Qwen3."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from kvrelay.engine.attention import PagedAttention
from kvrelay.engine.kernels.interface import HeadNorms
from kvrelay.engine.layers import RmsNorm, RotaryEmbedding
from kvrelay.engine.linear import Linear, make_linear
from kvrelay.engine.weights import WeightSource

__all__ = ["FUSED_ARCHITECTURES", "LlamaModel", "LlamaShape"]

FUSED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
# Dynamic and longrope scaling change the frequencies only beyond the context length that we allow.
_ROPE_TYPES = {"default", "linear", "llama3", "yarn", "dynamic", "longrope"}
_LEFT_OVER = r".*rotary_emb\.inv_freq"  # old checkpoints keep what is computed
_LEFT_OVER_TIED = rf"{_LEFT_OVER}|lm_head\.weight"


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """What tells the members of the family apart."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_epsilon: float
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    head_norms: bool
    tied_embeddings: bool

    @classmethod
    def from_config(cls, config: Any, architecture: str) -> "LlamaShape | None":
        """The shape that a transformers configuration means; None if it asks for what is not implemented here."""
        rope = config.rope_parameters
        if config.hidden_act != "silu" or rope.get("rope_type") not in _ROPE_TYPES:
            return None
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            return None
        attention_bias = getattr(config, "attention_bias", False)
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            norm_epsilon=config.rms_norm_eps,
            qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
            output_bias=attention_bias,
            mlp_bias=getattr(config, "mlp_bias", False),
            head_norms=architecture == "Qwen3ForCausalLM",
            tied_embeddings=config.tie_word_embeddings,
        )


@dataclass(frozen=True, slots=True)
class _Layer:
    """One decoder layer. The query, key and value projections are one matrix, gate and up are another."""

    input_norm: RmsNorm
    qkv: Linear  # [(heads + 2 * kv_heads) * head_dim, hidden]
    head_norms: HeadNorms | None
    output: Linear
    mlp_norm: RmsNorm
    gate_up: Linear  # [2 * intermediate, hidden]
    down: Linear


class LlamaModel:
    """Implements `kvrelay.engine.models.spec.Model`."""

    def __init__(
        self,
        shape: LlamaShape,
        config: Any,
        weights: WeightSource,
        device: torch.device,
        quantization: str = "none",
    ) -> None:
        """Takes the weights.

        Args:
            config: the transformers configuration that `shape` was made from.
            device: where the weights are.
            quantization: of the matrix products, the head included; embeddings and norms stay float.

        Raises:
            ConfigurationError: the checkpoint does not fit its configuration.
        """
        self._shape = shape
        self._scale = shape.head_dim**-0.5
        self._rotary = RotaryEmbedding(config, shape.head_dim, device)
        loader = _Loader(weights, shape, quantization)
        self._embedding = loader.embedding()
        self._layers = [loader.layer(f"model.layers.{index}") for index in range(shape.num_layers)]
        self._norm = loader.norm("model.norm", shape.hidden_size)
        self._head = loader.head(self._embedding)
        loader.finish()

    def forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, attention: PagedAttention
    ) -> torch.Tensor:
        kernels, head_dim = attention.kernels, self._shape.head_dim
        hidden = functional.embedding(token_ids, self._embedding)  # [T, H]
        delta: torch.Tensor | None = None
        rotation = self._rotary.rotation(positions)
        for index, layer in enumerate(self._layers):
            normed = kernels.add_rms_norm(hidden, delta, layer.input_norm.weight, layer.input_norm.epsilon)
            heads = layer.qkv(normed).view(len(normed), -1, head_dim)  # [T, heads + 2 * kv_heads, D]
            attended = attention.rotate_and_attend(index, heads, rotation, layer.head_norms, self._scale).flatten(1)
            if index == len(self._layers) - 1:
                # From here on a token acts on itself only, so only those whose logits are wanted go on.
                hidden, attended = hidden[rows], attended[rows]  # [R, H]
            delta = layer.output(attended)
            normed = kernels.add_rms_norm(hidden, delta, layer.mlp_norm.weight, layer.mlp_norm.epsilon)
            delta = layer.down(kernels.gated_silu(layer.gate_up(normed)))
        return self._head(kernels.add_rms_norm(hidden, delta, self._norm.weight, self._norm.epsilon)).float()


class _Loader:
    """Knows the names that transformers gives to the family's tensors."""

    def __init__(self, reader: WeightSource, shape: LlamaShape, quantization: str) -> None:
        self._reader = reader
        self._quantization = quantization
        self._shape = shape

    def embedding(self) -> torch.Tensor:
        return self._reader.take("model.embed_tokens.weight", [self._shape.vocab_size, self._shape.hidden_size])

    def head(self, embedding: torch.Tensor) -> Linear:
        size = [self._shape.vocab_size, self._shape.hidden_size]
        weight = embedding if self._shape.tied_embeddings else self._reader.take("lm_head.weight", size)
        return make_linear(weight, quantization=self._quantization)

    def norm(self, name: str, size: int) -> RmsNorm:
        return RmsNorm(self._reader.take(f"{name}.weight", [size]), self._shape.norm_epsilon)

    def layer(self, prefix: str) -> _Layer:
        shape = self._shape
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        query_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        qkv_names = [f"{attention}.{name}_proj" for name in "qkv"]
        gate_up_names = [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
        hidden, inner = shape.hidden_size, shape.intermediate_size
        return _Layer(
            input_norm=self.norm(f"{prefix}.input_layernorm", hidden),
            qkv=self._linear(qkv_names, [query_size, kv_size, kv_size], hidden, shape.qkv_bias),
            head_norms=self._head_norms(attention) if shape.head_norms else None,
            output=self._linear([f"{attention}.o_proj"], [hidden], query_size, shape.output_bias),
            mlp_norm=self.norm(f"{prefix}.post_attention_layernorm", hidden),
            gate_up=self._linear(gate_up_names, [inner, inner], hidden, shape.mlp_bias),
            down=self._linear([f"{mlp}.down_proj"], [hidden], inner, shape.mlp_bias),
        )

    def _head_norms(self, attention: str) -> HeadNorms:
        query, key = (self.norm(f"{attention}.{name}_norm", self._shape.head_dim) for name in "qk")
        return HeadNorms(query.weight, key.weight, self._shape.norm_epsilon)

    def finish(self) -> None:
        self._reader.finish(ignore=_LEFT_OVER_TIED if self._shape.tied_embeddings else _LEFT_OVER)

    def _linear(self, names: list[str], heights: list[int], width: int, bias: bool) -> Linear:
        weight = self._reader.take_stacked([f"{name}.weight" for name in names], heights, [width])
        added = self._reader.take_stacked([f"{name}.bias" for name in names], heights) if bias else None
        return make_linear(weight, added, self._quantization)
