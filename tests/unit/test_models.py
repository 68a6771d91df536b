"""Every architecture against transformers, and every refusal, through the runner."""

import random
from collections.abc import Callable
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from kvrelay.engine.block_pool import BlockPool
from kvrelay.engine.models import transformers_model
from kvrelay.engine.models.llama import LlamaModel
from kvrelay.engine.models.registry import inspect_model
from kvrelay.engine.runner import ModelRunner
from kvrelay.engine.sequence import Chunk, Sequence
from kvrelay.errors import ConfigurationError
from kvrelay.request import Request, Sampling
from kvrelay.settings import EngineSettings
from tests.checkpoints import ARCHITECTURES, FUSED_ARCHITECTURES, VOCAB_SIZE, WINDOW, greedy_oracle
from tests.checkpoints import oracle_logits as oracle

NUM_NEW_TOKENS = 24
SETTINGS = EngineSettings(num_blocks=60, block_size=5)


pytestmark = pytest.mark.usefixtures("one_thread")


def make_prompts(lengths: Items[int]) -> list[list[int]]:
    source = random.Random(11)
    return [[source.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]


def make_sequences(runner: ModelRunner, prompts: Items[Items[int]], num_tokens: int) -> list[Sequence]:
    """Sequences whose blocks lie scattered over the pool."""
    pool = BlockPool(runner.num_blocks)
    blocks = pool.allocate(runner.num_blocks)
    random.Random(2).shuffle(blocks)
    sequences = []
    for index, prompt in enumerate(prompts):
        sequence = Sequence(Request(str(index), tuple(prompt), Sampling(max_tokens=num_tokens)))
        for _ in range(runner.layout.blocks_for(len(prompt) + num_tokens)):
            sequence.block_table.append(blocks.pop())
        sequences.append(sequence)
    return sequences


def generate(runner: ModelRunner, prompts: Items[Items[int]], num_tokens: int) -> list[list[int]]:
    """Greedy completions by a schedule of odd chunks, in which prefills and decodes share their steps.

    Sequence i starts in step 2i, so that the others are in all stages by then.
    """
    sequences = make_sequences(runner, prompts, num_tokens)
    step = 0
    while any(sequence.num_completion_tokens < num_tokens for sequence in sequences):
        chunks = []
        for index, sequence in enumerate(sequences):
            if step >= 2 * index and sequence.num_completion_tokens < num_tokens:
                length = min(sequence.num_uncomputed_tokens, 7 + index)
                chunks.append(Chunk(sequence, sequence.num_computed_tokens, length))
        tokens = iter(runner.run(chunks))
        for chunk in chunks:
            samples = chunk.samples
            chunk.sequence.num_computed_tokens = chunk.end
            if samples:
                chunk.sequence.append(next(tokens).token_id, 10**6)
        assert next(tokens, None) is None
        step += 1
    return [list(sequence.token_ids[-num_tokens:]) for sequence in sequences]


def is_fused(runner: ModelRunner) -> bool:
    """Whether kvrelay's own implementation serves the model, and not transformers' modeling code."""
    return isinstance(runner._model, LlamaModel)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_are_those_of_transformers(architecture: str, checkpoint: Callable[..., Path]) -> None:
    path = checkpoint(architecture)
    runner = ModelRunner.load(path, SETTINGS)
    assert is_fused(runner) == (architecture in FUSED_ARCHITECTURES)
    longest = min(runner.context_length, 80) - NUM_NEW_TOKENS
    prompts = make_prompts([1, 17, longest, 5])
    completions = generate(runner, prompts, NUM_NEW_TOKENS)
    assert completions == [greedy_oracle(path, prompt, NUM_NEW_TOKENS) for prompt in prompts]
    assert len({token for completion in completions for token in completion}) > 5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_transformers(architecture: str, checkpoint: Callable[..., Path]) -> None:
    path = checkpoint(architecture)
    runner = ModelRunner.load(path, SETTINGS)
    prompts = make_prompts([runner.context_length if runner.spec.sliding_window else 100, 3, 1])
    sequences = make_sequences(runner, prompts, 1)
    logits = runner.compute([Chunk(sequence, 0, len(sequence.token_ids)) for sequence in sequences])
    expected = torch.stack([oracle(path, prompt) for prompt in prompts])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_a_step_without_samples_computes_no_logits(checkpoint: Callable[..., Path]) -> None:
    for architecture in ("llama", "gpt2"):
        runner = ModelRunner.load(checkpoint(architecture), SETTINGS)
        sequence = make_sequences(runner, make_prompts([9]), 1)[0]
        assert runner.compute([Chunk(sequence, 0, 8)]).shape == (0, VOCAB_SIZE)
        assert runner.run([Chunk(sequence, 0, 8)]) == []


def test_sharded_and_half_precision_checkpoints(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(checkpoint("llama-bias"), dtype=torch.float16)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    runner = ModelRunner.load(tmp_path, SETTINGS)
    assert runner.spec.dtype == "float16"
    assert runner.layout.dtype == "float32"
    prompt = make_prompts([13])[0]
    assert generate(runner, [prompt], 8) == [greedy_oracle(tmp_path, prompt, 8)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_sixteen_bits(architecture: str, checkpoint: Callable[..., Path]) -> None:
    path = checkpoint(architecture)
    runner = ModelRunner.load(path, EngineSettings(num_blocks=20, dtype="bfloat16"))
    assert runner.cache.tensor.dtype == torch.bfloat16
    prompt = make_prompts([13])[0]
    logits = runner.compute([Chunk(make_sequences(runner, [prompt], 1)[0], 0, 13)])
    torch.testing.assert_close(logits[0], oracle(path, prompt), atol=0.3, rtol=0)


def test_context_is_limited_by_model_window_settings_and_pool(checkpoint: Callable[..., Path]) -> None:
    for architecture, limit, reason in (("llama", 256, "max_position"), ("mistral-window", WINDOW, "attend to 48")):
        spec = inspect_model(checkpoint(architecture))
        assert spec.context_length == limit
        assert reason in spec.context_limit
    path = checkpoint("mistral-window")
    assert ModelRunner.load(path, EngineSettings(num_blocks=99, context_length=40)).context_length == 40
    assert ModelRunner.load(path, EngineSettings(num_blocks=2)).context_length == 32
    with pytest.raises(ConfigurationError, match="context_length: 49 is more than 48: some layers attend"):
        ModelRunner.load(path, EngineSettings(num_blocks=99, context_length=49))
    with pytest.raises(ConfigurationError, match="KV pool holds, which is 32"):
        ModelRunner.load(path, EngineSettings(num_blocks=2, context_length=33))


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
SPECS: dict[str, tuple[str, dict[str, Any], bool, int]] = {
    # architecture, overrides, fused, context length
    "qwen2 with a window in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
        True,
        32,
    ),
    "qwen2 whose window is not used": ("qwen2", {"sliding_window": 32}, True, 256),
    "another activation": ("llama", {"hidden_act": "gelu"}, False, 256),
    "dynamic rope scaling": (
        "llama",
        {"rope_parameters": DYNAMIC},
        True,
        256,
    ),
    "longrope": ("llama", {"rope_parameters": LONGROPE}, True, 64),
    "longrope without fusion": ("llama", {"rope_parameters": LONGROPE, "hidden_act": "gelu"}, False, 64),
    "dynamic without fusion": ("phi", {"rope_parameters": DYNAMIC}, False, 256),
}


@pytest.mark.parametrize(("architecture", "overrides", "fused", "context_length"), SPECS.values(), ids=SPECS)
def test_unusual_configurations(
    architecture: str, overrides: dict[str, Any], fused: bool, context_length: int, checkpoint: Callable[..., Path]
) -> None:
    path = checkpoint(architecture, **overrides)
    runner = ModelRunner.load(path, SETTINGS)
    assert (is_fused(runner), runner.context_length) == (fused, context_length)
    prompts = make_prompts([context_length // 2, 9])
    assert generate(runner, prompts, 12) == [greedy_oracle(path, prompt, 12) for prompt in prompts]


TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "an encoder": (lambda: tf.BertConfig(**TINY), "BertForMaskedLM", "not a decoder-only"),
    "attention to later tokens": (lambda: tf.BertConfig(**TINY), "BertLMHeadModel", "attends to later tokens"),
    "encoder and decoder": (lambda: tf.T5Config(), "T5ForConditionalGeneration", "has an encoder"),
    "a classifier": (lambda: tf.LlamaConfig(**TINY), "LlamaForSequenceClassification", "not a decoder-only"),
    "state space": (lambda: tf.MambaConfig(), "MambaForCausalLM", "not supported"),
    "linear attention": (lambda: tf.Qwen3NextConfig(), "Qwen3NextForCausalLM", "layers of type linear_attention"),
    "convolutions": (
        lambda: tf.Lfm2Config(**TINY, layer_types=["conv", "full_attention"]),
        "Lfm2ForCausalLM",
        "layers of type conv",
    ),
    "attention sinks": (
        lambda: tf.GptOssConfig(**TINY, num_local_experts=2, num_experts_per_tok=1, head_dim=16),
        "GptOssForCausalLM",
        "asks attention for s_aux",
    ),
    "keys unlike values": (
        lambda: tf.DeepseekV3Config(num_hidden_layers=2),
        "DeepseekV3ForCausalLM",
        "keys and values do not have the same heads",
    ),
    "two attentions in a layer": (lambda: tf.DiffLlamaConfig(**TINY), "DiffLlamaForCausalLM", "attend exactly once"),
    "alibi": (lambda: tf.BloomConfig(), "BloomForCausalLM", "does not let its attention be replaced"),
    "code that asks what the router chose": (
        lambda: tf.LongcatFlashConfig(num_layers=1, n_routed_experts=2, moe_topk=1),
        "LongcatFlashForCausalLM",
        "cannot run with paged attention",
    ),
    "quantized": (
        lambda: tf.LlamaConfig(**{**TINY, "quantization_config": {"quant_method": "fp8"}}),
        "LlamaForCausalLM",
        "quantized",
    ),
}


@pytest.mark.parametrize(("config", "architecture", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_before_the_weights_are_read(
    config: Callable[[], Any], architecture: str, message: str, tmp_path: Path
) -> None:
    """There are no weights to read."""
    made = config()
    made.architectures = [architecture]
    made.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=message):
        inspect_model(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "no-such-model", "architectures": ["NoSuchModel"]}', "transformers cannot read it"),
        ('{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": "x"}', "cannot read it"),
        ('{"architectures": ["LlamaForCausalLM"]}', "transformers cannot read it"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "evil.Evil"}}', "transformers cannot read it"),
    ],
)
def test_configurations_that_make_no_sense(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "evil.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(ConfigurationError, match=message):
        inspect_model(tmp_path)


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in sorted(tensors) if ".1." in name)]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.surprise"] = torch.zeros(1)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in sorted(tensors) if ".1." in name)
    tensors[name] = torch.zeros(3, 3)


@pytest.mark.parametrize(
    ("architecture", "damage", "message"),
    [
        ("llama", drop, "tensor model.layers.1.* is missing"),
        ("llama", reshape, r"tensor model.layers.1.* is \[3, 3\], not"),
        ("llama", add, "tensors that the model does not have: model.layers.0.self_attn.surprise"),
        ("gpt2", drop, "tensor transformer.h.1.* is missing"),
        ("gpt2", reshape, "weights cannot be loaded"),
    ],
)
def test_weights_that_do_not_fit(
    architecture: str,
    damage: Callable[[dict[str, torch.Tensor]], None],
    message: str,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    source = checkpoint(architecture)
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=message):
        ModelRunner.load(tmp_path, SETTINGS)


def test_tokens_that_meet_outside_of_attention_are_noticed(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint("phi")
    load = transformers_model._load

    def load_convolved(*arguments: Any) -> Any:
        """A Phi that lets each token see the one before it, as a convolution does."""
        model = load(*arguments)
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output + output.roll(1, 1))
        return model

    def load_unplaced(*arguments: Any) -> Any:
        """A Phi that counts the positions by itself."""
        model = load(*arguments)
        model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, kwargs | {"position_ids": None}), with_kwargs=True
        )
        return model

    for changed in (load_convolved, load_unplaced):
        monkeypatch.setattr(transformers_model, "_load", changed)
        with pytest.raises(ConfigurationError, match="outside of attention"):
            ModelRunner.load(path, SETTINGS)


@pytest.mark.parametrize("device", ["nonsense", "meta", "mps", "cuda:99"])
def test_devices_that_cannot_be_used(device: str, checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(ConfigurationError, match=f"device {device}"):
        ModelRunner.load(checkpoint("llama"), EngineSettings(device=device))
