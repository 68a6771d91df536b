"""The secret that all processes of a cluster share: it signs tickets and registrations."""

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

from kvrelay.errors import ConfigurationError

__all__ = ["load_cluster_key"]

_KEY_BYTES = 32


def load_cluster_key(path: Path) -> bytes:
    """Reads the key; whoever comes first makes it.

    Raises:
        ConfigurationError: it cannot be read or made, or is too short to be a secret.
    """
    try:
        if not path.exists():
            _make(path)
        key = bytes.fromhex(path.read_text().strip())
    except OSError as error:
        raise ConfigurationError(f"key file {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"key file {path}: not hexadecimal") from error
    if len(key) < _KEY_BYTES // 2:
        raise ConfigurationError(f"key file {path}: {len(key)} bytes are too short; at least {_KEY_BYTES // 2}")
    return key


def _make(path: Path) -> None:
    # Written aside and linked, so that nobody ever reads half a key and the first one stands.
    descriptor, draft = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)  # readable by us alone
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_hex(_KEY_BYTES) + "\n")
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.unlink(draft)
