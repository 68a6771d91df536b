"""What holds for all tests."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.exploring  # noqa: F401  (sets hypothesis up)
from tests.checkpoints import make_checkpoint

# What a helper asserts is explained as what a test asserts; here, because it must stand before any of them is imported.
pytest.register_assert_rewrite("tests.contract", "tests.e2e", "tests.faults", "tests.unit")

# Triton decides when it is imported, which transformers may do at any time.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell that starts the tests in the background has them ignore SIGINT, and so would every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a checkpoint, or gives the one that was made before."""
    made: dict[str, Path] = {}

    def make(architecture: str, **overrides: Any) -> Path:
        key = architecture + json.dumps(overrides, sort_keys=True)
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp("model"), architecture, **overrides)
        return made[key]

    return make


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors are slower on several threads, and far slower beside other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
