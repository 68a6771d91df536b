"""What the command line says when no server of ours answers."""

import contextlib
from collections.abc import Iterator

from kvrelay.errors import Unavailable

__all__ = ["readable_connection_errors"]


@contextlib.contextmanager
def readable_connection_errors(target: str) -> Iterator[None]:
    """Puts a sentence in the place of gRPC's own words, which no server of ours has said."""
    try:
        yield
    except Unavailable as error:
        if error.reason != error.code:
            raise
        raise Unavailable(
            f"nothing answers at {target}, or not any more; `kvrelay up` starts a cluster, --target names another"
        ) from error
