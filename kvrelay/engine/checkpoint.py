"""Checkpoint folders, as far as they can be judged without torch: where one is, whether it is whole, which it is."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from kvrelay.errors import ConfigurationError
from kvrelay.settings import DEMO_MODEL, EngineSettings

__all__ = ["check_checkpoint", "model_digest", "model_name", "read_json", "resolve_checkpoint", "weight_files"]

_DEMO_FOLDER = Path(__file__).parent.parent / "demo_model"
_HUB_FILES = ("*.json", "*.jinja", "*.safetensors", "tokenizer*", "*.model", "*.txt")
_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_SAMPLE_BYTES = 4096
_NUM_SAMPLES = 64


def resolve_checkpoint(name: str) -> Path:
    """The folder of a checkpoint, downloaded if need be.

    Args:
        name: a folder, the name of a model on the Hugging Face hub, or "demo" for the model that is shipped.

    Raises:
        ConfigurationError: no such folder, and the hub does not have it either or cannot be reached.
    """
    if name == DEMO_MODEL:
        return _DEMO_FOLDER
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ConfigurationError(f"model {name}: is a file; a checkpoint is a folder with config.json and weights")
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise ConfigurationError(f"model {name}: no such folder")
    return _download(name)


def model_name(engine: EngineSettings) -> str:
    """What the API calls the model: as was set, else a folder by its name, else as `model` has it.

    Never by the folder of a download, whose name is that of a commit.
    """
    if engine.served_model_name:
        return engine.served_model_name
    folder = Path(engine.model).expanduser()
    # Not resolved: a link to a folder has been given a name, too.
    return Path(os.path.abspath(folder)).name if engine.model != DEMO_MODEL and folder.is_dir() else engine.model


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES), ignore_patterns=["*/*", "consolidated*"]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigurationError(
            f"model {name}: no such folder, and it could not be fetched from the Hugging Face hub: {reason}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ConfigurationError: the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path}: not a JSON object")
    return content


def check_checkpoint(path: Path) -> None:
    """Looks whether a folder can be a checkpoint, before anything large is read.

    Raises:
        ConfigurationError: no valid config.json, no safetensors, or a weight file that is missing or cut short.
    """
    read_json(path / "config.json")
    for file in weight_files(path):
        with file.open("rb") as stream:
            _read_header(file, stream)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted by name.

    Raises:
        ConfigurationError: there are none, or the index names one that is missing.
    """
    if (path / _SINGLE_FILE).is_file():
        return [path / _SINGLE_FILE]
    index = path / _INDEX_FILE
    if not index.is_file():
        found = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        hint = f"; {found[0]} is not read, because loading it can run code: convert it to safetensors" if found else ""
        raise ConfigurationError(f"{path}: no {_SINGLE_FILE} and no {_INDEX_FILE}{hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigurationError(f"{index}: no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (path / name).is_file():
            raise ConfigurationError(f"{index}: names {name}, which is not in the folder")
    return [path / name for name in names]


def model_digest(path: Path, quantization: str = "none") -> bytes:
    """SHA-256 that tells checkpoints, and what is made of them, apart without reading all of their weights.

    Over config.json and, of each weight file, the size, the header and 64 evenly spaced pieces of 4 KiB (a small file
    whole). Two checkpoints of equal shape that were trained apart differ in nearly every piece.

    Raises:
        ConfigurationError: as `check_checkpoint`.
    """
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in weight_files(path):
        with file.open("rb") as stream:
            size = file.stat().st_size
            digest.update(size.to_bytes(8, "little"))
            digest.update(_read_header(file, stream))
            for offset in _sample_offsets(stream.tell(), size):
                stream.seek(offset)
                digest.update(stream.read(_SAMPLE_BYTES))
    if quantization != "none":
        digest.update(quantization.encode())
    return digest.digest()


def _sample_offsets(start: int, end: int) -> list[int]:
    if end - start <= _SAMPLE_BYTES * _NUM_SAMPLES:
        return list(range(start, end, _SAMPLE_BYTES))
    last = end - _SAMPLE_BYTES
    return [start + (last - start) * index // (_NUM_SAMPLES - 1) for index in range(_NUM_SAMPLES)]


def _read_header(file: Path, stream: BinaryIO) -> bytes:
    """The JSON header of a safetensors file; leaves the stream at the first tensor."""
    length = int.from_bytes(stream.read(8), "little")
    size = file.stat().st_size
    if not 2 <= length <= size - 8:
        raise ConfigurationError(f"{file}: not a safetensors file, or cut short")
    header = stream.read(length)
    try:
        tensors = json.loads(header)
        end = max(entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{file}: not a safetensors file") from error
    if 8 + length + end != size:
        raise ConfigurationError(f"{file}: {size} bytes, but its header tells of {8 + length + end}: cut short?")
    return header
