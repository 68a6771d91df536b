"""A Docker daemon of the tests' own, and images that stand in for the public ones, made of Debian's packages."""

import configparser
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlparse

__all__ = ["docker_daemon", "import_stand_in", "run", "why_no_daemon"]

_START_SECONDS = 60
_MEMORY_BYTES = 8 << 30
_STAND_IN_PACKAGES = ("python3", "python3-venv", "ca-certificates", "redis-server", "g++")
_CACHE = Path("/var/cache/kvrelay-tests")


def why_no_daemon() -> str:
    """What this machine or this user lacks to start one; empty if nothing."""
    if os.geteuid() != 0:
        return "only root may start one"
    if missing := [name for name in ("docker", "dockerd", "debootstrap", "unshare") if shutil.which(name) is None]:
        return f"not installed: {', '.join(missing)}"
    if not os.access("/sys/fs/cgroup", os.W_OK):
        return "control groups cannot be made"
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True, timeout=30)
    return tried.stderr.strip() if tried.returncode else ""


def run(*command: str, environment: Mapping[str, str] | None = None, folder: Path | None = None) -> str:
    """A command's standard output.

    Raises:
        RuntimeError: it failed; with the end of all that it printed.
    """
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}")
    return done.stdout


@contextlib.contextmanager
def docker_daemon() -> Iterator[str]:
    """Starts a daemon that shares nothing with another one, and removes all that it made; yields its DOCKER_HOST.

    It has no default bridge and touches no packet filter: a build needs the host's network, and a published port works
    through Docker's own proxy.

    Raises:
        RuntimeError: it does not start; with the end of its log.
    """
    with _scratch_folder() as folder:
        host = f"unix://{folder}/docker.sock"
        with (folder / "log").open("wb") as log:
            daemon = subprocess.Popen(_daemon_command(folder, host), stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for(daemon, host, folder / "log")
            yield host
        finally:
            daemon.terminate()
            try:
                daemon.wait(_START_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@contextlib.contextmanager
def _scratch_folder() -> Iterator[Path]:
    """In memory where there is enough of it: a disk can take minutes to delete the images."""
    with tempfile.TemporaryDirectory(prefix="kvrelay-docker-", ignore_cleanup_errors=True) as name:
        in_memory = _available_memory() > 1.5 * _MEMORY_BYTES
        tmpfs = ["-t", "tmpfs", "-o", f"size={_MEMORY_BYTES},mode=700", "kvrelay-tests"]
        run("mount", *(tmpfs if in_memory else ["--bind", name]), name)
        try:
            yield Path(name)
        finally:
            run("umount", "--lazy", name)  # with all that the daemon left mounted below it


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def _daemon_command(folder: Path, host: str) -> list[str]:
    folders = ["--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec", "--pidfile", f"{folder}/pid"]
    return ["dockerd", "--host", host, *folders, "--bridge=none", "--iptables=false", "--ip6tables=false"]


def _wait_for(daemon: "subprocess.Popen[bytes]", host: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while daemon.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(RuntimeError):
            run("docker", "--host", host, "version")
            return
        time.sleep(0.2)
    raise RuntimeError(f"dockerd does not start here; the end of its log:\n{log.read_text(errors='replace')[-2000:]}")


def import_stand_in(host: str, *tags: str) -> None:
    """Gives these names to an image of a minimal Debian with Python and Redis, in which pip works as it does here."""
    run("docker", "--host", host, "import", str(_debian()), tags[0])
    with tempfile.TemporaryDirectory() as name:
        _write_context(Path(name), tags[0])
        builder = {"DOCKER_BUILDKIT": "0"}
        run("docker", "--host", host, "build", *(f"--tag={tag}" for tag in tags), name, environment=builder)


def _debian() -> Path:
    """A tar file of the file system; kept for the next run where that can be."""
    digest = hashlib.sha256(" ".join(_STAND_IN_PACKAGES).encode()).hexdigest()[:12]
    archive = _CACHE / f"bookworm-{digest}.tar"
    if not archive.exists():
        _CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_CACHE) as name:
            packages = f"--include={','.join(_STAND_IN_PACKAGES)}"
            run("debootstrap", "--variant=minbase", packages, "bookworm", f"{name}/root")
            run(
                "tar",
                "--directory",
                f"{name}/root",
                "--exclude=./var/cache/apt/*",
                "--create",
                "--file",
                f"{name}/tar",
                ".",
            )
            os.replace(f"{name}/tar", archive)
    return archive


def _write_context(folder: Path, base: str) -> None:
    """A Dockerfile that adds this machine's package index, certificates and folders of wheels."""
    lines = [f"FROM {base}"]
    settings = _pip_settings()
    certificates = settings.get("cert")
    if certificates:
        shutil.copy(certificates, folder / "certificates.crt")
        lines.append("COPY certificates.crt /etc/ssl/certs/ca-certificates.crt")
        settings["cert"] = "/etc/ssl/certs/ca-certificates.crt"
    for number, link in enumerate(filter(os.path.isdir, settings.get("find-links", "").split())):
        shutil.copytree(link, folder / f"wheels{number}")
        lines.append(f"COPY wheels{number} {link}")
    pip = configparser.RawConfigParser()
    pip["global"] = settings
    with (folder / "pip.conf").open("w") as stream:
        pip.write(stream)
    lines.append("COPY pip.conf /etc/pip.conf")
    (folder / "Dockerfile").write_text("\n".join(lines) + "\n")


def _pip_settings() -> dict[str, str]:
    """Where pip gets packages from on this machine, by its files and environment; indexes on its disk are left out."""
    settings: dict[str, str] = {}
    for line in run(sys.executable, "-m", "pip", "config", "list").splitlines():
        place, _, value = line.partition("=")
        name = place.rpartition(".")[2]
        words = [word for word in value.strip("'\"").split() if urlparse(word).scheme != "file"]
        if name in ("cert", "find-links", "index-url", "extra-index-url", "trusted-host", "timeout") and words:
            settings[name] = " ".join(words)
    return settings
