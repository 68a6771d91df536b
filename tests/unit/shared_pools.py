"""Workers without an engine in one pool file: some in this process, some in processes of their own."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvrelay.engine.kv_layout import KvLayout
from kvrelay.engine.pool_file import PoolFile
from kvrelay.engine.shared_block_pool import SharedBlockPool

__all__ = ["LAYOUT", "Worker", "join", "joined", "worker"]

LAYOUT = KvLayout(b"\7" * 32, "float32", block_size=4, num_layers=1, num_kv_heads=1, head_dim=8)


def join(path: Path, num_blocks: int, patience: float = 5.0) -> SharedBlockPool:
    return SharedBlockPool(PoolFile.join(str(path), LAYOUT, num_blocks, lambda num_bytes: None), patience)


@contextlib.contextmanager
def joined(path: Path, num_blocks: int, patience: float = 5.0) -> Iterator[SharedBlockPool]:
    """One worker of the pool. When it leaves, the books must be consistent."""
    pool = join(path, num_blocks, patience)
    try:
        yield pool
        pool.check_all()
    finally:
        pool._file.close()


class Worker:
    """A process that has joined as `pool`, and executes what it is told to."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def send(self, code: str) -> None:
        """Statements in one line. They may `print` one line."""
        assert self.process.stdin is not None
        self.process.stdin.write(code + "\n")
        self.process.stdin.flush()

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, expression: str) -> Any:
        self.send(f"print({expression})")
        return eval(self.read())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def worker(path: Path, num_blocks: int) -> Iterator[Worker]:
    program = (
        "import os, signal, sys, random\n"
        "from pathlib import Path\n"
        "from tests.unit.shared_pools import join\n"
        f"pool = join(Path({str(path)!r}), {num_blocks})\n"
        "print('joined', flush=True)\n"
        "for line in sys.stdin:\n"
        "    exec(line)\n"
        "    sys.stdout.flush()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    started = Worker(process)
    try:
        assert started.read() == "joined"
        yield started
    finally:
        started.kill()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
