"""Checkpoints with random weights to measure with: speed does not depend on what the weights are.

    python -m benchmarks.checkpoints FOLDER [--shape small] [--architecture llama]

They are ordinary Hugging Face folders, float32 and with a tokenizer, so that every engine can run the same one.
"""

import argparse
import sysconfig
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.workloads import VOCAB_SIZE

__all__ = ["ARCHITECTURES", "CONTEXT_LENGTH", "SHAPES", "make"]

tf: Any = transformers  # much of it has no types
CONTEXT_LENGTH = 4096
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
    "base": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
}
ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "llama": (tf.LlamaConfig, tf.LlamaForCausalLM),
    "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM),
    "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM),
}
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")


def make(path: Path, shape: str, architecture: str = "llama") -> Path:
    """Writes a checkpoint of VOCAB_SIZE tokens and CONTEXT_LENGTH; what is already there is left as it is.

    Args:
        path: the folder; made when missing.
        shape: one of SHAPES.
        architecture: one of ARCHITECTURES.

    Returns:
        The folder.

    Raises:
        KeyError: no such shape or architecture.
    """
    config_class, model_class = ARCHITECTURES[architecture]
    config = config_class(
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
        initializer_range=0.05,
        **SHAPES[shape],
    )
    if (path / "model.safetensors").exists():
        return path
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config).float()
    _tokenizer().save_pretrained(path)
    model.save_pretrained(path)  # last, because its weights say that the folder is whole
    return path


def _tokenizer() -> Any:
    """Byte-level BPE of VOCAB_SIZE tokens over the standard library's sources, a text that every machine has."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    bpe.train([str(source) for source in sources], trainer)
    names = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL_TOKENS, strict=True))
    return tf.PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="llama")
    arguments = parser.parse_args()
    print(make(arguments.folder, arguments.shape, arguments.architecture))


if __name__ == "__main__":
    main()
