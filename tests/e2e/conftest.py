"""What the end-to-end tests share: a small model, and one small cluster for all tests that leave it whole."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvrelay import Client
from tests.checkpoints import make_checkpoint
from tests.e2e.cluster import Cluster, start_cluster

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of one layer, with a context long enough for a request to be caught running."""
    folder = make_checkpoint(
        tmp_path_factory.mktemp("models") / "tiny-llama", "llama", num_hidden_layers=1, max_position_embeddings=8192
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def cluster(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One prefill and one decode worker, a short queue, and a short memory for finished requests."""
    run_dir = tmp_path_factory.mktemp("shared") / "run"
    limits: dict[str, Any] = {"max_running": 8, "max_waiting": 8, "replay_requests": 8}
    with start_cluster(run_dir, tiny_llama, num_blocks=4096, **limits) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Client]:
    with cluster.client() as client:
        yield client


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("KVRELAY_"):
            monkeypatch.delenv(name)
