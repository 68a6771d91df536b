"""Reads the tensors of a checkpoint straight to where they belong."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch

from kvrelay.engine.checkpoint import weight_files
from kvrelay.errors import ConfigurationError

__all__ = ["CheckpointReader", "WeightSource"]


class WeightSource(Protocol):
    """Where a model takes its tensors from, each once; `CheckpointReader` takes them from files."""

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """One tensor."""

    def take_stacked(self, names: Sequence[str], heights: Sequence[int], shape: Sequence[int] = ()) -> torch.Tensor:
        """Several tensors one below the other in one; `heights` has the first dimension of each."""

    def finish(self, ignore: str) -> None:
        """Ends the taking."""


class CheckpointReader:
    """The tensors of a checkpoint's safetensors files, each to be taken once.

    The files are mapped, so a tensor costs memory only where it is copied to. After the last `take`, `finish` tells
    whether something was left over, which would mean that the model is not what the configuration says.
    """

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        """Opens the files.

        Args:
            device: where the tensors go.
            dtype: what they are converted to.

        Raises:
            ConfigurationError: a file is missing or is not safetensors.
        """
        self._path = path
        self._device = device
        self._dtype = dtype
        self._file_of: dict[str, Any] = {}
        for file in weight_files(path):
            try:
                opened: Any = safetensors.safe_open(file, framework="pt", device="cpu")
            except (OSError, safetensors.SafetensorError) as error:
                raise ConfigurationError(f"{file}: not a safetensors file: {error}") from error
            self._file_of.update(dict.fromkeys(opened.keys(), opened))

    def take(self, name: str, shape: Sequence[int]) -> torch.Tensor:
        """One tensor."""
        return self.take_stacked([name], [shape[0]], shape[1:])

    def take_stacked(self, names: Sequence[str], heights: Sequence[int], shape: Sequence[int] = ()) -> torch.Tensor:
        """Several tensors one below the other in one.

        Args:
            names: of the tensors.
            heights: the first dimension of each.
            shape: the other dimensions of all.

        Raises:
            ConfigurationError: a tensor is missing or has another shape.
        """
        stacked = torch.empty(sum(heights), *shape, dtype=self._dtype, device=self._device)
        for name, part, height in zip(names, torch.split(stacked, list(heights)), heights, strict=True):
            part.copy_(self._read(name, (height, *shape)))
        return stacked

    def finish(self, ignore: str) -> None:
        """Ends the reading.

        Args:
            ignore: regular expression of the names that may be left over.

        Raises:
            ConfigurationError: naming what else is left.
        """
        left = sorted(name for name in self._file_of if not re.fullmatch(ignore, name))
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise ConfigurationError(f"{self._path}: tensors that the model does not have: {', '.join(left[:3])}{more}")

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        file = self._file_of.pop(name, None)
        if file is None:
            raise ConfigurationError(f"{self._path}: tensor {name} is missing")
        tensor: torch.Tensor = file.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ConfigurationError(f"{self._path}: tensor {name} is {list(tensor.shape)}, not {list(shape)}")
        return tensor
