"""Ports for servers that a test starts."""

import contextlib
import secrets
import socket

__all__ = ["free_port"]


def free_port() -> int:
    """One that nobody has, of those that the system gives to nobody who asks for any."""
    while True:
        port = 20000 + secrets.randbelow(10000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
