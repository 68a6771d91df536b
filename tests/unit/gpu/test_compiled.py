"""The interpreter accepts what the compiler does not, so the kernels are compiled too; that takes no GPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
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
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.gpu.compile_kernels"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = [line.split() for line in done.stdout.splitlines()]
    assert {(module, name) for module, name, _ in compiled} == KERNELS
    assert all(int(size) > 1000 for _, _, size in compiled)
