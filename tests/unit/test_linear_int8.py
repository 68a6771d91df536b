"""The 8-bit product against arithmetic in doubles, models that compute with it, and what it cannot do."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvrelay import config
from kvrelay.engine import linear_int8, runner
from kvrelay.engine.checkpoint import model_digest
from kvrelay.engine.linear import make_linear
from kvrelay.engine.linear_int8 import Int8Linear, quantize_weight
from kvrelay.engine.models import int8_modules
from kvrelay.engine.runner import ModelRunner
from kvrelay.engine.sequence import Chunk, Sequence
from kvrelay.errors import ConfigurationError
from kvrelay.request import Request, Sampling
from kvrelay.settings import EngineSettings
from tests.checkpoints import VOCAB_SIZE, make_checkpoint

SETTINGS = EngineSettings(num_blocks=40, block_size=5, device="cpu", quantization="int8", threads=1)
SIZES = [(1, 1), (1, 7), (16, 32), (17, 33), (37, 64), (48, 2), (64, 129), (250, 96)]  # out, in
NUM_ROWS = (1, 2, 3, 4, 5, 9, 10, 11, 21, 150)


pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_product(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Int8Linear:
    product = Int8Linear.quantize(weight, bias)
    assert product is not None, "scripts/install compiles the kernels for processors with AVX2 or AVX-512"
    return product


@pytest.mark.parametrize(("out_size", "in_size"), SIZES)
def test_weights_are_within_half_a_step(out_size: int, in_size: int) -> None:
    weight = normal(out_size, in_size)
    quantized = quantize_weight(weight)
    assert quantized.values.abs().max() <= 127
    half_step = weight.abs().amax(dim=1, keepdim=True) / 127 / 2
    assert ((quantized.dequantized() - weight).abs() <= half_step * 1.0001).all()


@pytest.mark.parametrize(("out_size", "in_size"), SIZES)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_product_is_that_of_the_rounded_weight(out_size: int, in_size: int, bias: bool) -> None:
    weight = normal(out_size, in_size)
    added = normal(out_size, seed=1) if bias else None
    product = make_product(weight, added)
    quantized = quantize_weight(weight).dequantized().double()
    for num_rows in NUM_ROWS:
        rows = normal(num_rows, in_size, seed=2)
        expected = rows.double() @ quantized.T + (0 if added is None else added.double())
        # Half a step of each input, times the weights it meets.
        bound = rows.abs().amax(dim=1, keepdim=True) / 32767 * 0.51 * quantized.abs().sum(dim=1) + 1e-5
        assert ((product(rows) - expected).abs() <= bound).all()


def test_error_against_float32_is_that_of_rounding_weights() -> None:
    weight, rows = normal(300, 512), normal(20, 512, seed=1)
    exact = rows @ weight.T
    error = (make_product(weight)(rows) - exact).norm() / exact.norm()
    assert 0.001 < error < 0.01


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("out_size", "in_size"), [*SIZES, (640, 500)])
def test_a_row_does_not_depend_on_its_batch(out_size: int, in_size: int, threads: int) -> None:
    torch.set_num_threads(threads)
    product = make_product(normal(out_size, in_size), normal(out_size, seed=1))
    rows = normal(150, in_size, seed=2) * torch.logspace(-3, 3, 150)[:, None]
    alone = torch.cat([product(row[None]) for row in rows])
    for num_rows in NUM_ROWS:
        assert torch.equal(product(rows[:num_rows]), alone[:num_rows])
    assert torch.equal(product(rows.flip(0)), alone.flip(0))


def test_zeros() -> None:
    weight = normal(20, 30)
    weight[3] = 0
    bias = normal(20, seed=1)
    product = make_product(weight, bias)
    assert product(torch.empty(0, 30)).shape == (0, 20)
    rows = normal(2, 30, seed=2)
    rows[0] = 0
    output = product(rows)
    assert torch.equal(output[0], bias)
    assert output[1, 3] == bias[3]
    assert quantize_weight(torch.zeros(2, 3)).dequantized().equal(torch.zeros(2, 3))


def test_extreme_rows_stay_by_themselves() -> None:
    weight = normal(20, 30)
    product = make_product(weight)
    rows = normal(7, 30, seed=2)
    usual = product(rows)
    rows[0, 4], rows[1, 0], rows[2, 29] = float("nan"), float("inf"), -float("inf")
    rows[3] *= 1e37
    rows[4] *= 1e-20
    rows[5] = 1e-40  # no normal float
    output = product(rows)
    assert output[:3].isnan().all()
    torch.testing.assert_close(output[3] / 1e37, usual[3])
    torch.testing.assert_close(output[4] * 1e20, usual[4])
    assert torch.equal(output[5], torch.zeros(20))
    assert torch.equal(output[6], usual[6])


def test_no_sum_overflows() -> None:
    # All products have the same sign and the largest size, so that sums are as large as the limit lets them be.
    weight = torch.ones(16, 4096)
    weight[1] = -1
    output = make_product(weight)(torch.full((1, 4096), 3.0))
    torch.testing.assert_close(output[0, :2], torch.tensor([3.0 * 4096, -3.0 * 4096]), rtol=1e-3, atol=0)


def test_any_shape_and_layout_of_rows() -> None:
    product = make_product(normal(20, 30))
    rows = normal(30, 6, seed=1).T
    expected = product(rows.contiguous())
    assert torch.equal(product(rows), expected)
    assert torch.equal(product(rows.contiguous().view(2, 3, 30)), expected.view(2, 3, 20))


PRINT_PRODUCT = """
import torch
from kvrelay.engine.linear_int8 import Int8Linear
import hashlib, random
source = random.Random(5)
def numbers(*shape):
    return torch.tensor([source.random() - 0.5 for _ in range(torch.Size(shape).numel())]).view(shape)
weight, rows, bias = numbers(130, 77), numbers(23, 77), numbers(130)
print(hashlib.sha256(Int8Linear.quantize(weight, bias)(rows).numpy().tobytes()).hexdigest())
"""
PRODUCT_DIGEST = "de2aef1dbf2b33d06ff4ca757ec92a9af991ca1d8beaa179df0e13752acc20c3"


@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_results_are_equal_on_all_machines(level: str) -> None:
    """To the last bit. A processor without AVX-512 takes AVX2 in either case."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": level}
    done = subprocess.run([sys.executable, "-c", PRINT_PRODUCT], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == PRODUCT_DIGEST, done.stderr


def test_without_compiled_kernels_the_rounded_weight_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, rows = normal(37, 33), normal(37, seed=1), normal(5, 33, seed=2)
    monkeypatch.setattr(linear_int8, "load_library", lambda: None)
    expected = rows @ quantize_weight(weight).dequantized().T + bias
    torch.testing.assert_close(make_linear(weight, bias, "int8")(rows), expected)


def compute_logits(path: Path, settings: EngineSettings, lengths: tuple[int, ...] = (30, 1, 7)) -> torch.Tensor:
    """Of prompts that are computed together in one step."""
    loaded = ModelRunner.load(path, settings)
    chunks, used = [], 0
    for index, length in enumerate(lengths):
        prompt = torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        sequence = Sequence(Request(str(index), tuple(prompt), Sampling(max_tokens=1)))
        sequence.block_table = list(range(used, used := used + loaded.layout.blocks_for(length)))
        chunks.append(Chunk(sequence, 0, length))
    return loaded.compute(chunks)


@pytest.mark.parametrize("architecture", ["llama", "llama-bias", "qwen2", "qwen3", "gpt2", "gpt-neox", "gemma2", "phi"])
def test_models_are_near_to_float32(architecture: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, architecture)
    exact = compute_logits(path, replace(SETTINGS, quantization="none"))
    quantized = compute_logits(path, SETTINGS)
    error = ((quantized - exact).norm() / exact.norm()).item()
    assert 0.0005 < error < 0.1  # random weights carry an error on, layer by layer


def test_experts_and_routers_stay_float(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "mixtral")
    exact = compute_logits(path, replace(SETTINGS, quantization="none"))
    quantized = compute_logits(path, SETTINGS)
    # A token near the border between two experts may go to the other one, so that not every row is near.
    errors = (quantized - exact).norm(dim=1) / exact.norm(dim=1)
    assert 0.0005 < errors.median() < 0.05


def test_models_without_linear_modules_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_checkpoint(tmp_path, "gpt2")
    monkeypatch.setattr(int8_modules, "_weight", lambda module: None)
    with pytest.raises(ConfigurationError, match=r"int8.*no linear modules"):
        ModelRunner.load(path, SETTINGS)


def test_models_that_reach_for_a_weight_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    path = make_checkpoint(tmp_path, "gpt2")
    monkeypatch.setattr(GPT2MLP, "forward", lambda self, hidden: hidden @ self.c_fc.weight @ self.c_proj.weight)
    with pytest.raises(ConfigurationError, match=r"int8.*past its linear modules"):
        ModelRunner.load(path, SETTINGS)


def test_only_in_float32_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_checkpoint(tmp_path, "llama")
    with pytest.raises(ConfigurationError, match=r"quantization: int8.*bfloat16"):
        ModelRunner.load(path, replace(SETTINGS, dtype="bfloat16"))
    monkeypatch.setattr(runner, "choose_device", lambda settings: torch.device("cuda"))  # as if there were one
    with pytest.raises(ConfigurationError, match=r"quantization: int8.*cuda"):
        ModelRunner.load(path, replace(SETTINGS, device="cuda", dtype="float32"))


def test_quantized_workers_do_not_pair_with_float_ones(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")
    assert model_digest(path, "none") == model_digest(path)
    digests = {
        ModelRunner.load(path, replace(SETTINGS, quantization=mode)).layout.digest for mode in ("none", "int8", "int8")
    }
    assert len(digests) == 2


def test_the_setting_is_checked() -> None:
    assert config.load({}, {}).engine.quantization == "none"
    assert config.load({"quantization": "int8"}, {}).engine.quantization == "int8"
    with pytest.raises(ConfigurationError, match=r"--quantization.*'int9'.*int8"):
        config.load({"quantization": "int9"}, {})
