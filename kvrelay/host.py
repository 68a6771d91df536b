"""Which processes mean the same by a process id."""

import os
from pathlib import Path

__all__ = ["host_id"]


def host_id() -> str:
    """Equal for the processes that share a kernel and a pid namespace, so that a pid means the same to them."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot_id}:{os.stat('/proc/self/ns/pid').st_ino}"
