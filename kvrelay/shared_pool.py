"""The setting `shared_pool`: what goes with it, and the file that `up` makes for it."""

import os
import sys

from kvrelay.errors import ConfigurationError
from kvrelay.settings import AUTO, Settings

__all__ = ["check_shared_pool", "make_pool_file"]


def check_shared_pool(settings: Settings) -> None:
    """To be called by a worker.

    Raises:
        ConfigurationError: the transport and the pool do not go together, or nobody has named the pool's file.
    """
    path, transport = settings.engine.shared_pool, settings.transfer.transport
    if path == AUTO:
        raise ConfigurationError("shared_pool: a single worker needs the name of the file; only `up` makes one")
    if path and transport not in ("auto", "pool"):
        raise ConfigurationError(f"transport: {transport} moves blocks, which workers that share a pool need not")
    if not path and transport == "pool":
        raise ConfigurationError("transport: pool is for workers that share a pool; say which by shared_pool")


def make_pool_file() -> int:
    """An empty file without a name, which is gone when nobody has it open any more. Answers its descriptor.

    Raises:
        ConfigurationError: this system has none.
    """
    if sys.platform != "linux":
        raise ConfigurationError("shared_pool: only Linux has the locks that it needs")
    return os.memfd_create("kvrelay-shared-pool", os.MFD_CLOEXEC)
