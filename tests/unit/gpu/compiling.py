"""Compiles kernels in a process of its own: this one has Triton interpret them."""

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["compiled_by"]

ROOT = Path(__file__).parents[3]


def compiled_by(cache: Path, *arguments: str) -> list[list[str]]:
    """What Python compiles with these arguments, a line each: the module, the kernel and its size in bytes.

    Raises:
        AssertionError: it cannot.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [line.split() for line in done.stdout.splitlines()]
