"""What fused models are made of besides matrix products."""

from dataclasses import dataclass
from typing import Any

import torch

from kvrelay.engine.kernels.interface import Rotation

__all__ = ["RmsNorm", "RotaryEmbedding", "rope_settings"]


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """The parameters of a root mean square norm; weight `[H]`."""

    weight: torch.Tensor
    epsilon: float


class RotaryEmbedding:
    """Rotary position embedding (Su et al., 2021) with the frequency scalings that transformers knows.

    Dimension i is rotated together with dimension i + D/2.
    """

    def __init__(self, config: Any, head_dim: int, device: torch.device) -> None:
        """Computes the frequencies.

        Args:
            config: a transformers configuration with flat `rope_parameters`.
            head_dim: D.
        """
        inverse_frequencies, self._scale = _inverse_frequencies(config, head_dim)
        self._inverse_frequencies = inverse_frequencies.to(device)  # [D / 2]

    def rotation(self, positions: torch.Tensor) -> Rotation:
        """For tokens at `positions` `[T]`."""
        angles = positions[:, None].float() * self._inverse_frequencies  # [T, D / 2]
        return Rotation(angles.cos() * self._scale, angles.sin() * self._scale)


def rope_settings(config: Any) -> list[dict[str, Any]]:
    """The rotary parameters of a transformers configuration: one dictionary, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [entry for entry in parameters.values() if isinstance(entry, dict)]
    return nested or [parameters]


def _inverse_frequencies(config: Any, head_dim: int) -> tuple[torch.Tensor, float]:
    rope_type = config.rope_parameters["rope_type"]
    if rope_type == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scale = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    return frequencies, scale
