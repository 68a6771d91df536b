"""Hosts of their own on one machine: network namespaces on a bridge, with a packet filter between them."""

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Host", "hosts", "why_no_namespaces"]

_numbers = itertools.count()


@dataclass(frozen=True)
class Host:
    """A network namespace with one address. Files, Unix sockets and processes are those of the machine."""

    namespace: str
    address: str

    def command(self, *command: str) -> list[str]:
        """The command that runs a command here."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def drop(self, other: "Host", *, incoming: bool = False, outgoing: bool = False) -> None:
        """From now on packets from or to the other are lost."""
        if incoming:
            _run(*self.command("iptables", "-A", "INPUT", "-s", other.address, "-j", "DROP"))
        if outgoing:
            _run(*self.command("iptables", "-A", "OUTPUT", "-d", other.address, "-j", "DROP"))

    def reset(self, other: "Host") -> None:
        """From now on the other's TCP packets are answered by a reset."""
        action = ("-j", "REJECT", "--reject-with", "tcp-reset")
        _run(*self.command("iptables", "-A", "INPUT", "-p", "tcp", "-s", other.address, *action))

    def heal(self) -> None:
        _run(*self.command("iptables", "-F"))


def why_no_namespaces() -> str:
    """What this machine or this user lacks for them; empty if nothing."""
    if os.geteuid() != 0:
        return "only root may make them"
    if missing := [name for name in ("ip", "iptables", "unshare") if shutil.which(name) is None]:
        return f"not installed: {', '.join(missing)}"
    tried = subprocess.run(["unshare", "--net", "iptables", "--list"], capture_output=True, text=True, timeout=30)
    return tried.stderr.strip() if tried.returncode else ""


@contextlib.contextmanager
def hosts(count: int) -> Iterator[Sequence[Host]]:
    """Hosts that reach one another, the first of which carries the bridge."""
    prefix = f"kv{os.getpid()}-{next(_numbers)}"
    made = [Host(f"{prefix}-{index}", f"10.77.0.{index + 1}") for index in range(count)]
    with contextlib.ExitStack() as cleanup:
        for host in made:
            _run("ip", "netns", "add", host.namespace)
            cleanup.callback(_run, "ip", "netns", "del", host.namespace)
            _run("ip", "-n", host.namespace, "link", "set", "lo", "up")
        _bridge(made)
        yield made


def _bridge(made: Sequence[Host]) -> None:
    hub = made[0]
    _run("ip", "-n", hub.namespace, "link", "add", "bridge", "type", "bridge")
    _run("ip", "-n", hub.namespace, "addr", "add", f"{hub.address}/24", "dev", "bridge")
    _run("ip", "-n", hub.namespace, "link", "set", "bridge", "up")
    for index, host in enumerate(made[1:]):
        port = f"port{index}"
        # Both ends are made where they belong, so that the machine's own network never sees them.
        _run(
            *("ip", "-n", hub.namespace, "link", "add", port, "type", "veth"),
            *("peer", "name", "eth0", "netns", host.namespace),
        )
        _run("ip", "-n", hub.namespace, "link", "set", port, "master", "bridge", "up")
        _run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
        _run("ip", "-n", host.namespace, "link", "set", "eth0", "up")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
