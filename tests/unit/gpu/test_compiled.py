"""The interpreter accepts what the compiler does not, so the kernels are compiled too; that takes no GPU."""

from pathlib import Path

from tests.unit.gpu.compiling import compiled_by

KERNELS = {
    ("activation", "_gated_silu"),
    ("chunk_attention", "_attend_kernel"),
    ("decode_attention", "_attend_kernel"),
    ("decode_attention", "_join_kernel"),
    ("feed", "_begin"),
    ("feed", "_end"),
    ("norm", "_add_rms_norm"),
    ("rotary", "_rotate_and_store"),
    ("rotary", "_store"),
    ("sampling", "_choose"),
    ("sampling", "_collect"),
    ("sampling", "_rank"),
    ("sampling", "_weigh"),
}


def test_all_kernels_compile_for_hopper(tmp_path: Path) -> None:
    compiled = compiled_by(tmp_path, "-m", "tests.unit.gpu.compile_kernels")
    assert {(module, name) for module, name, _ in compiled} == KERNELS
    assert all(int(size) > 1000 for _, _, size in compiled)
