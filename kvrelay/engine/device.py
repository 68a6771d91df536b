"""Which device a worker computes on, and how much of its memory the worker may fill with KV blocks.

Workers that one command starts on one host take its GPUs in turn; where they are more than GPUs, several share one.
"""

import torch

from kvrelay.errors import ConfigurationError
from kvrelay.settings import AUTO, EngineSettings

__all__ = ["choose_device", "default_kv_memory"]

_CPU_BYTES = 512 << 20
_CUDA_FRACTION = 0.85  # of what the weights leave; the rest is for activations


def choose_device(settings: EngineSettings) -> torch.device:
    """Raises: ConfigurationError if it cannot be used."""
    name = settings.device
    if name == AUTO:
        name = f"cuda:{settings.local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        reason = str(error).split("\n")[0]
        raise ConfigurationError(f"device {name}: cannot be used: {reason}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"device {name}: is neither cpu nor cuda")
    return device


def default_kv_memory(settings: EngineSettings, device: torch.device) -> int:
    """Bytes of a KV pool whose size nobody has set. On CUDA, call it when the weights are on the device.

    A GPU that workers share is shared evenly, in whatever order they start.
    """
    if device.type != "cuda":
        return _CPU_BYTES
    free, total = torch.cuda.mem_get_info(device)
    left_of_share = total // _num_sharers(settings) - torch.cuda.memory_reserved(device)
    return max(0, int(_CUDA_FRACTION * min(free, left_of_share)))


def _num_sharers(settings: EngineSettings) -> int:
    """Workers of this host on this worker's GPU, itself among them."""
    if settings.device != AUTO:
        return settings.local_size
    num_devices = torch.cuda.device_count()
    return len(range(settings.local_rank % num_devices, settings.local_size, num_devices))
