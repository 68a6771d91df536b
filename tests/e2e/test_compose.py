"""The image and compose.yaml, with a real Docker daemon: build, up, generate, scale, stop."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvrelay import Client, Unavailable
from tests.e2e.docker_kit import docker_daemon, import_stand_in, run, why_no_daemon
from tests.patience import eventually
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
PUBLIC_IMAGES = ("python:3.11-slim-bookworm", "python:3.11-bookworm", "redis:7.2-bookworm")
PROJECT = "kvrelay-test"

LACKING = why_no_daemon()
pytestmark = [
    pytest.mark.timeout(1200),  # on a bare machine it first makes a Debian, then downloads PyTorch
    pytest.mark.skipif(bool(LACKING), reason=f"needs a Docker daemon of its own: {LACKING}"),
]


class Compose:
    """compose.yaml's profile cpu on a free port."""

    def __init__(self, docker_host: str) -> None:
        self.port = free_port()
        self._program = ["docker", "compose"] if has_compose_plugin() else ["docker-compose"]
        self._environment = {
            "DOCKER_HOST": docker_host,
            "KVRELAY_PORT": str(self.port),
            "KVRELAY_THREADS": "1",
            "KVRELAY_KV_CACHE_MEMORY": "64MiB",
        }

    def __call__(self, *arguments: str) -> str:
        options = ("--project-name", PROJECT, "--profile", "cpu")
        return run(*self._program, *options, *arguments, environment=self._environment, folder=ROOT)

    def docker(self, *arguments: str) -> str:
        return run("docker", *arguments, environment=self._environment, folder=ROOT)

    def containers(self) -> dict[str, Any]:
        """What `docker inspect` says of each container of the project, by container name."""
        ids = self.docker("ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={PROJECT}").split()
        return {entry["Name"].lstrip("/"): entry for entry in json.loads(self.docker("inspect", *ids))} if ids else {}


def has_compose_plugin() -> bool:
    return subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="module")
def compose() -> Iterator[Compose]:
    with docker_daemon() as host:
        import_stand_in(host, *PUBLIC_IMAGES)
        compose = Compose(host)
        # Built by docker rather than by compose, because only here does a build need the host's network.
        compose.docker("build", "--network=host", "--target=cpu", "--tag=kvrelay:cpu", ".")
        try:
            yield compose
        finally:
            compose("down", "--volumes", "--timeout", "5")


def health(container: Any) -> str:
    return str(container["State"]["Health"]["Status"])


def test_image_does_not_run_as_root(compose: Compose) -> None:
    image = json.loads(compose.docker("image", "inspect", "kvrelay:cpu"))[0]
    assert image["Config"]["User"] == "kvrelay"


def test_image_has_the_compiled_kernels(compose: Compose) -> None:
    question = "from kvrelay.engine.kernels.native.library import load_library; print(load_library() is not None)"
    answer = compose.docker("run", "--rm", "--network=none", "--entrypoint=python3", "kvrelay:cpu", "-c", question)
    assert answer.strip() == "True"


def test_cluster_generates_scales_and_stops(compose: Compose) -> None:
    def wait_healthy(count: int, seconds: float) -> None:
        def all_healthy() -> bool:
            found = [health(container) for container in compose.containers().values()]
            return len(found) == count and set(found) == {"healthy"}

        eventually(all_healthy, seconds, lambda: compose("ps") + compose("logs", "--tail=20"), pause=0.5)

    compose("up", "--detach", "--no-build")
    wait_healthy(4, 180)
    assert_only_loopback_is_published(compose)
    with Client(f"127.0.0.1:{compose.port}", timeout=60) as client:
        first = client.complete("Once upon a time", max_tokens=24, temperature=0, ignore_eos=True)
        assert len(first.token_ids) == 24
        assert first.text.strip()
        compose("up", "--detach", "--no-build", "--no-recreate", "--scale", "decode=2")
        wait_healthy(5, 120)
        assert ready_workers(compose.port) == {"prefill": 1, "decode": 2}
        again = [client.complete("Once upon a time", max_tokens=24, temperature=0, ignore_eos=True) for _ in range(4)]
        assert {result.token_ids for result in again} == {first.token_ids}
        compose("stop")
        assert {
            name: entry["State"]["ExitCode"]
            for name, entry in compose.containers().items()
            if entry["State"]["ExitCode"]
        } == {}
        with pytest.raises(Unavailable):
            client.status()
    compose("down", "--volumes")
    assert compose.containers() == {}


def assert_only_loopback_is_published(compose: Compose) -> None:
    published = [
        binding["HostIp"]
        for container in compose.containers().values()
        for bindings in container["NetworkSettings"]["Ports"].values()
        for binding in bindings or ()
    ]
    assert published == ["127.0.0.1"]


def ready_workers(port: int) -> dict[str, int]:
    command = [sys.executable, "-m", "kvrelay", "status", "--json", "--target", f"127.0.0.1:{port}"]
    workers = json.loads(run(*command))["workers"]
    roles = [worker["role"] for worker in workers if worker["state"] == "ready"]
    return {role: roles.count(role) for role in roles}
