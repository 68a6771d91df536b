"""Small random checkpoints of many architectures, and what transformers makes of them."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = [
    "ARCHITECTURES",
    "FUSED_ARCHITECTURES",
    "VOCAB_SIZE",
    "WINDOW",
    "greedy_oracle",
    "make_checkpoint",
    "oracle_logits",
]

tf: Any = transformers  # much of it has no types
VOCAB_SIZE = 512
WINDOW = 48  # of those that have a sliding window
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
_GPT2 = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_GEMMA2 = {"head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

_CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **more: tf.LlamaConfig(**{**_BASE, "head_dim": 16, "tie_word_embeddings": True, **more}),
    "llama3-rope": lambda **more: tf.LlamaConfig(**{**_BASE, "rope_parameters": dict(_LLAMA3_ROPE), **more}),
    "llama-yarn": lambda **more: tf.LlamaConfig(**{**_BASE, "rope_parameters": dict(_YARN_ROPE), **more}),
    "llama-linear": lambda **more: tf.LlamaConfig(**{**_BASE, "rope_parameters": dict(_LINEAR_ROPE), **more}),
    "llama-bias": lambda **more: tf.LlamaConfig(**{**_BASE, "attention_bias": True, "mlp_bias": True, **more}),
    "mistral": lambda **more: tf.MistralConfig(**{**_BASE, "sliding_window": None, "head_dim": 32, **more}),
    "mistral-window": lambda **more: tf.MistralConfig(**{**_BASE, "sliding_window": WINDOW, **more}),
    "qwen2": lambda **more: tf.Qwen2Config(**{**_BASE, **more}),
    "qwen3": lambda **more: tf.Qwen3Config(**{**_BASE, "head_dim": 32, "tie_word_embeddings": True, **more}),
    "gpt2": lambda **more: tf.GPT2Config(**{**_GPT2, "scale_attn_by_inverse_layer_idx": True, **more}),
    "gpt-neox": lambda **more: tf.GPTNeoXConfig(**{**_BASE, **more}),
    "phi": lambda **more: tf.PhiConfig(**{**_BASE, **more}),
    "gemma": lambda **more: tf.GemmaConfig(**{**_BASE, "head_dim": 32, "num_key_value_heads": 1, **more}),
    "gemma2": lambda **more: tf.Gemma2Config(**{**_BASE, **_GEMMA2, **more}),
    "olmo2": lambda **more: tf.Olmo2Config(**{**_BASE, **more}),
    "qwen3-moe": lambda **more: tf.Qwen3MoeConfig(**{**_BASE, "head_dim": 16, "num_experts": 4, **_EXPERTS, **more}),
    "mixtral": lambda **more: tf.MixtralConfig(**{**_BASE, "num_local_experts": 4, "num_experts_per_tok": 2, **more}),
}
ARCHITECTURES = tuple(_CONFIGS)
FUSED_ARCHITECTURES = ARCHITECTURES[: ARCHITECTURES.index("gpt2")]


def make_checkpoint(folder: Path, architecture: str = "llama", **overrides: Any) -> Path:
    """Writes a checkpoint with random weights and a byte-level tokenizer; the same for the same arguments.

    Args:
        folder: is made.
        architecture: one of ARCHITECTURES.
        overrides: fields of the transformers configuration.

    Returns:
        The folder.
    """
    config = _CONFIGS[architecture](**overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms, which would else be zeros and ones
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.get_input_embeddings().weight.data *= 0.3  # so that the layers have a say beside the last token
    model.generation_config = tf.GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def _tokenizer() -> Any:
    """Of 259 to 500 tokens: every byte, and what is frequent in this file."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|bos|>", "<|eos|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train([__file__], trainer)
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )


@functools.cache
def _reference(path: Path) -> Any:
    # Only the eager attention of transformers knows Gemma 2's soft cap.
    return tf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def greedy_oracle(path: Path, prompt_ids: Sequence[int], count: int, *, ignore_eos: bool = False) -> list[int]:
    """The tokens that transformers' `generate` makes of a prompt in float32: `count`, or fewer to the end of text."""
    return list(_generate(path, tuple(prompt_ids), count, ignore_eos))


@functools.cache
def _generate(path: Path, prompt_ids: tuple[int, ...], count: int, ignore_eos: bool) -> tuple[int, ...]:
    ids = torch.tensor([prompt_ids])
    # What is left open is the checkpoint's end of sequence; -1 is a token that never comes.
    end = {"eos_token_id": -1} if ignore_eos else {}
    config = tf.GenerationConfig(max_new_tokens=count, do_sample=False, pad_token_id=2, **end)
    with torch.inference_mode():
        output = _reference(path).generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return tuple(output[0, len(prompt_ids) :].tolist())


def oracle_logits(path: Path, token_ids: Sequence[int]) -> torch.Tensor:
    """Transformers' logits after the last token, `[vocabulary]`, float32."""
    with torch.inference_mode():
        logits: torch.Tensor = _reference(path)(torch.tensor([list(token_ids)])).logits
    return logits[0, -1]
