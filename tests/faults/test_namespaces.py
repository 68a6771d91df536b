"""A network between prefill and decode worker that loses or resets packets: computed again, and never garbage."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvrelay.control.private_redis import PrivateRedis
from tests.checkpoints import make_checkpoint
from tests.faults.namespaces import Host, hosts, why_no_namespaces
from tests.faults.process import Process
from tests.patience import eventually

PORT = 50051
PROMPT = "Once upon a time a prefill worker lost its decode worker."
START_SECONDS, ANSWER_SECONDS, WHOLE_SECONDS = 120, 60, 30
SETTINGS = ("--block-size=4", "--num-blocks=512", "--threads=1", "--no-prefix-caching")
OWN_FLAGS = {
    "gateway": ("--port", str(PORT), "--disaggregation=always"),
    "prefill": SETTINGS,
    "decode": (*SETTINGS, "--transport=grpc"),
}

# What a partition does is tried by the proxy, too, which anybody may run.
LACKING = why_no_namespaces()
pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"needs network namespaces and a packet filter: {LACKING}")


class Cluster:
    """A gateway, a prefill and a decode worker, each on a host of its own; Redis is reached by a Unix socket."""

    def __init__(self, folder: Path, model: Path, places: Sequence[Host], redis: str) -> None:
        self.gateway, self.prefill, self.decode = places
        self.processes = {}
        for name, host in zip(("gateway", "prefill", "decode"), places, strict=True):
            flags = ["--model", str(model), "--redis", redis, "--run-dir", str(folder), "--worker-id", name]
            flags += ["--host", host.address, "--insecure-bind", *OWN_FLAGS[name]]
            self.processes[name] = Process(name, [name, *flags], folder)

    def start(self) -> None:
        for process, host in zip(self.processes.values(), (self.gateway, self.prefill, self.decode), strict=True):
            process.start(host.command)

    def ask(self, *command: str) -> "subprocess.Popen[str]":
        target = ("--json", "--target", f"{self.gateway.address}:{PORT}")
        line = self.gateway.command(sys.executable, "-m", "kvrelay", command[0], *target, *command[1:])
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def generate(self) -> "subprocess.Popen[str]":
        return self.ask("generate", "--max-tokens=12", "--temperature=0", "--ignore-eos", "--logprobs=0", PROMPT)

    def status(self) -> dict[str, Any]:
        output, _ = self.ask("status").communicate(timeout=ANSWER_SECONDS)
        found: dict[str, Any] = json.loads(output) if output else {"workers": []}
        return found

    def is_ready(self) -> bool:
        workers = self.status()["workers"]
        return len(workers) == 2 and all(worker["links"] for worker in workers if worker["role"] == "decode")

    def is_whole(self) -> bool:
        workers = self.status()["workers"]
        return len(workers) == 2 and all(worker["blocks_free"] == worker["blocks_total"] for worker in workers)

    def log(self, name: str) -> str:
        return self.processes[name].log.read_text(errors="replace")

    def num_failed(self) -> int:
        """Transfers that failed so far."""
        return self.log("decode").count("failed, computing it again")

    def num_fired(self) -> int:
        """Failpoints that were met so far."""
        return self.processes["prefill"].num_fired()

    def heal(self) -> None:
        """Everything passes again, and the workers have noticed."""
        self.decode.heal()
        self.processes["prefill"].arm("")
        eventually(self.is_handed_over, WHOLE_SECONDS, "blocks travel again")
        eventually(self.is_whole, WHOLE_SECONDS, "all blocks free")

    def is_handed_over(self) -> bool:
        num_failed = self.num_failed()
        tokens(self.generate())
        return self.num_failed() == num_failed


def tokens(process: "subprocess.Popen[str]") -> list[int]:
    output, errors = process.communicate(timeout=ANSWER_SECONDS)
    assert process.returncode == 0, errors
    return [token_id for line in output.splitlines() for token_id in json.loads(line)["token_ids"]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("namespaces")
    model = make_checkpoint(folder / "model", "llama", num_hidden_layers=1)
    redis = PrivateRedis(folder / "redis")
    with contextlib.ExitStack() as cleanup:
        places = cleanup.enter_context(hosts(3))
        cleanup.callback(redis.stop)
        redis.start()
        cluster = Cluster(folder, model, places, redis.url)
        for process in cluster.processes.values():
            cleanup.callback(process.end)
        cluster.start()
        eventually(cluster.is_ready, START_SECONDS, "both workers ready and paired")
        yield cluster


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> list[int]:
    return tokens(cluster.generate())


BREAKAGES: dict[str, Callable[[Cluster], None]] = {
    "blocks are lost": lambda cluster: cluster.decode.drop(cluster.prefill, incoming=True),
    "requests are lost": lambda cluster: cluster.decode.drop(cluster.prefill, outgoing=True),
    "all is lost": lambda cluster: cluster.decode.drop(cluster.prefill, incoming=True, outgoing=True),
    "connections are reset": lambda cluster: cluster.decode.reset(cluster.prefill),
}


@pytest.mark.parametrize(
    ("moment", "breakage"),
    [
        *(("pull.before_blocks", name) for name in BREAKAGES),
        ("pull.after_blocks", "all is lost"),
        ("release.before", "all is lost"),
    ],
)
def test_what_does_not_arrive_is_computed_again(
    cluster: Cluster, expected: list[int], moment: str, breakage: str
) -> None:
    num_failed, num_fired = cluster.num_failed(), cluster.num_fired()
    cluster.processes["prefill"].arm(f"{moment}=delay:0.7@1")
    try:
        answer = cluster.generate()
        # The failpoint says when the handover is there, and gives the time to break it.
        eventually(lambda: cluster.num_fired() > num_fired, ANSWER_SECONDS, moment)
        BREAKAGES[breakage](cluster)
        assert tokens(answer) == expected
        assert cluster.num_failed() > num_failed
        assert tokens(cluster.generate()) == expected  # while it is broken
    finally:
        cluster.heal()
