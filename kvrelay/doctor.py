"""What `kvrelay doctor` looks at: everything that a cluster on this machine needs, each with one sentence."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version

from kvrelay.client import Client
from kvrelay.client.connection_errors import readable_connection_errors
from kvrelay.control.private_redis import find_redis_server
from kvrelay.engine.checkpoint import check_checkpoint, resolve_checkpoint
from kvrelay.errors import ConfigurationError, KvrelayError
from kvrelay.request import LinkStatus

__all__ = ["Finding", "examine"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. What is not ok keeps a cluster from working."""

    subject: str
    ok: bool
    text: str


def examine(model: str, target: str | None) -> list[Finding]:
    """Looks at this machine, the model and, if one runs, a cluster."""
    findings = [_python(), _torch(), _shared_memory(), _attempt("redis", lambda: str(find_redis_server()))]
    findings += [_attempt("model", lambda: _model(model)), *_cluster(target)]
    return findings


def _attempt(subject: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(subject, True, look())
    except ConfigurationError as error:
        return Finding(subject, False, str(error))


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", sys.version_info >= (3, 11), f"{found}, {os.cpu_count()} cores; 3.11 or newer is needed")


def _torch() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("torch", False, "not installed; run scripts/install")
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: models run on the CPU in float32"
    return Finding("torch", True, f"{torch.__version__}, transformers {version('transformers')}; {device}")


def _shared_memory() -> Finding:
    between = "nixl or grpc" if importlib.util.find_spec("nixl") else "grpc"
    if not hasattr(os, "memfd_create"):
        return Finding("transport", True, f"{between} only: this system has no memfd for the shm transport")
    within = "shm between workers on this host, by block ids where they share a pool"
    return Finding("transport", True, f"{within}; {between} between hosts")


def _model(name: str) -> str:
    path = resolve_checkpoint(name)
    check_checkpoint(path)
    return f"{path}"


def _cluster(target: str | None) -> Iterator[Finding]:
    with Client(target, timeout=5.0) as client:
        try:
            with readable_connection_errors(client.target):
                status = client.status()
        except KvrelayError as error:
            # Without a target nobody said that a cluster should be running.
            yield Finding("cluster", target is None, f"not reached: {error.message}")
            return
    for worker in status.workers:
        links = "; ".join(map(_link, worker.links))
        text = f"{worker.state.value}, {worker.blocks_free} of {worker.blocks_total} blocks free"
        yield Finding(worker.id, worker.state.value == "ready", text + (f", blocks from {links}" if links else ""))


def _link(link: LinkStatus) -> str:
    return f"{link} (no faster transport: {link.fallback})" if link.fallback else str(link)
