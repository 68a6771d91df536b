import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvrelay.engine.checkpoint import check_checkpoint, model_digest, model_name, resolve_checkpoint, weight_files
from kvrelay.errors import ConfigurationError
from kvrelay.settings import EngineSettings

NUM_WEIGHTS = 300_000  # enough that the file is sampled, not read whole


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"weight": torch.arange(NUM_WEIGHTS, dtype=torch.float32)}, folder / "model.safetensors")
    return folder


def shard(folder: Path) -> None:
    """Makes two files and an index of the checkpoint."""
    (folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for number, name in enumerate(names):
        save_file({f"weight{number}": torch.ones(3)}, folder / name)
    index = {"weight_map": {f"weight{number}": name for number, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_names_that_are_folders(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_checkpoint(str(checkpoint)) == checkpoint
    monkeypatch.chdir(checkpoint.parent)
    assert resolve_checkpoint("model").resolve() == checkpoint
    check_checkpoint(resolve_checkpoint("demo"))


def test_the_name_in_the_api(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkpoint.parent / "link").symlink_to(checkpoint)
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    monkeypatch.chdir(checkpoint)
    folders = {str(checkpoint): "model", ".": "model", "../model/": "model", "~/model": "model", "../link": "link"}
    for model, name in {**folders, "demo": "demo", "org/model": "org/model"}.items():
        assert model_name(EngineSettings(model=model)) == name
        assert model_name(EngineSettings(model=model, served_model_name="other")) == "other"


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c"])
def test_a_missing_folder(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"no such folder$"):
        resolve_checkpoint(name)


def test_a_name_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("kvrelay-tests/there-is-no-such-model", "not a name"):
        with pytest.raises(ConfigurationError, match=f"model {name}: no such folder, and it could not be fetched"):
            resolve_checkpoint(name)


def test_a_file_is_no_checkpoint(checkpoint: Path) -> None:
    with pytest.raises(ConfigurationError, match="is a file"):
        resolve_checkpoint(str(checkpoint / "config.json"))


def test_shards_are_found_by_the_index(checkpoint: Path) -> None:
    shard(checkpoint)
    (checkpoint / "consolidated.safetensors").write_bytes(b"something else")
    assert [file.name[:11] for file in weight_files(checkpoint)] == ["model-00001", "model-00002"]
    check_checkpoint(checkpoint)


def only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def escaping_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00001-of-00002.safetensors").rename(folder.parent / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of-00002", "../outside"))


def empty_index(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("{}")


def cut(folder: Path, size: int) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:size])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
    "config is binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json: not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: not a JSON object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "pickled weights only": (only_bin, "pytorch_model.bin is not read"),
    "missing shard": (missing_shard, "names model-00002"),
    "shard outside of the folder": (escaping_shard, "names ../outside"),
    "empty index": (empty_index, "no weight_map"),
    "weights cut short": (lambda f: cut(f, 200_000), "cut short"),
    "header cut short": (lambda f: cut(f, 20), "cut short"),
    "weights of text": (lambda f: (f / "model.safetensors").write_text("x" * 99), "not a safetensors file"),
    "header of no tensors": (
        lambda f: (f / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}"),
        "not a safetensors file",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named(checkpoint: Path, damage: Callable[[Path], object], message: str) -> None:
    check_checkpoint(checkpoint)
    damage(checkpoint)
    with pytest.raises(ConfigurationError, match=message):
        check_checkpoint(checkpoint)


def test_digest_is_that_of_the_content(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    assert model_digest(copy) == model_digest(checkpoint)
    assert len(model_digest(copy)) == 32


@pytest.mark.parametrize("offset", [-1, -NUM_WEIGHTS * 4, 10])
def test_digest_tells_weights_apart(checkpoint: Path, offset: int) -> None:
    before = model_digest(checkpoint)
    if offset > 0:
        (checkpoint / "config.json").write_text('{"model_type": "qwen2"}')
    else:
        flip(checkpoint / "model.safetensors", offset)
    assert model_digest(checkpoint) != before


def test_digest_of_a_small_file_covers_every_byte(checkpoint: Path) -> None:
    save_file({"weight": torch.zeros(25_000)}, checkpoint / "model.safetensors")
    digests = {model_digest(checkpoint)}
    for offset in (-1, -40_000, -99_999):
        flip(checkpoint / "model.safetensors", offset)
        digests.add(model_digest(checkpoint))
    assert len(digests) == 4


def test_none_of_this_needs_torch() -> None:
    code = "import sys, kvrelay.engine.checkpoint; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
