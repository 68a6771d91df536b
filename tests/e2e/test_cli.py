"""The command line against a cluster, and without one."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvrelay.cli import main
from kvrelay.client import GenerateOptions, Stream
from tests.e2e.cluster import Cluster
from tests.e2e.processes import clean_environment, command_line, kvrelay
from tests.patience import eventually

PROMPT = "Once upon a time"
NOBODY = "127.0.0.1:1"
FOREVER: GenerateOptions = {
    "request_id": "a-long-one",
    "token_ids": [5, 6, 7],
    "max_tokens": 8000,
    "ignore_eos": True,
    "temperature": 0,
}
GRPC_TEXT = re.compile(r"ipv4:|last error|addresses|errno|Traceback|recvmsg|resolving")

Output = pytest.CaptureFixture[str]


@pytest.fixture
def target(cluster: Cluster) -> Iterator[str]:
    yield cluster.target
    cluster.wait_whole()


@pytest.fixture
def long_request(cluster: Cluster) -> Iterator[Stream]:
    """One that runs while the test looks at it."""
    with cluster.client() as client, client.generate(**FOREVER) as stream:
        thread = threading.Thread(target=lambda: list(stream))
        thread.start()
        in_decode = {("decode-0", "running")}
        eventually(
            lambda: {(entry.worker_id, entry.state) for entry in client.held_blocks()} == in_decode, 10, "it is decoded"
        )
        yield stream
        stream.close()
        thread.join()
    cluster.wait_whole()


def output_of(capsys: Output, *arguments: object) -> str:
    """What a command that succeeds prints."""
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# generate and chat


def test_generate_prints_the_text_and_nothing_else(cluster: Cluster, target: str) -> None:
    done = kvrelay("generate", PROMPT, "--target", target, "--max-tokens", 12, "--temperature", 0)
    with cluster.client() as client:
        expected = client.complete(PROMPT, max_tokens=12, temperature=0).text
    assert (done.returncode, done.stdout, done.stderr) == (0, expected + "\n", "")


def test_generate_as_json_is_one_object_a_line(target: str, capsys: Output) -> None:
    options = ("--target", target, "--max-tokens", 12, "--temperature", 0, "--ignore-eos")
    chunks = objects(output_of(capsys, "generate", PROMPT, "--json", *options))
    assert [chunk["seq"] for chunk in chunks] == list(range(1, len(chunks) + 1))
    assert sum(len(chunk["token_ids"]) for chunk in chunks) == 12
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["LENGTH"]
    assert chunks[-1]["usage"]["completion_tokens"] == 12
    assert chunks[-1]["timings"]["total"] > 0
    plain = output_of(capsys, "generate", PROMPT, *options)
    assert "".join(chunk["text"] for chunk in chunks) == plain.removesuffix("\n")


def test_timings_go_to_stderr(target: str, capsys: Output) -> None:
    assert main(["generate", PROMPT, "--target", target, "--max-tokens", "5", "--timings"]) == 0
    error = capsys.readouterr().err
    for stage in ("queue", "prefill", "transfer", "decode", "other", "total"):
        assert re.search(rf"^  {stage} +\d+\.\d ms", error, re.MULTILINE)


def test_stop_and_seed(target: str, capsys: Output) -> None:
    options = ("--target", target, "--max-tokens", 40, "--temperature", 1, "--ignore-eos")
    first, second = (output_of(capsys, "generate", PROMPT, "--seed", 7, *options) for _ in range(2))
    assert first == second
    assert output_of(capsys, "generate", PROMPT, "--seed", 8, *options) != first
    stop = first[5:7]
    stopped = output_of(capsys, "generate", PROMPT, "--seed", 7, "--stop", stop, *options)
    assert stopped == first[: first.index(stop)] + "\n"


def endless_generate(target: str) -> list[str]:
    options = ["--target", target, "--json", "--max-tokens", "8000", "--ignore-eos"]
    return [sys.executable, "-m", "kvrelay", "generate", PROMPT, *options]


def test_a_reader_that_has_enough(cluster: Cluster, target: str) -> None:
    """`kvrelay generate ... | head -1`: it ends, quietly, and so does the request."""
    with subprocess.Popen(
        endless_generate(target),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["seq"] == 1
        process.stdout.close()
        assert process.wait(10) == 1
        assert process.stderr.read() == ""


def test_an_interrupted_request(target: str) -> None:
    with subprocess.Popen(
        endless_generate(target),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(10) == 130
        assert process.stderr.read() == ""


def test_chat_over_a_pipe(target: str) -> None:
    done = kvrelay("chat", "--max-tokens", 6, "--temperature", 0, "--target", target, stdin="Hello\nAnd then?\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") >= 2
    done = kvrelay("chat", "--max-tokens", 0, "--target", target, "--json", stdin="Hello\n")
    assert done.returncode == 0
    assert "max_tokens" in done.stderr


# what is known of a cluster


def test_status_as_json_has_the_fields_of_the_contract(
    cluster: Cluster, target: str, long_request: Stream, capsys: Output
) -> None:
    (status,) = objects(output_of(capsys, "status", "--json", "--target", target))
    assert [worker["id"] for worker in status["workers"]] == ["decode-0", "prefill-0"]
    for worker in status["workers"]:
        assert worker["role"] in ("decode", "prefill")
        assert worker["state"] == "ready"
        assert re.fullmatch(r"127\.0\.0\.1:\d+", worker["address"])
        assert worker["epoch"] > 0
        assert Path(f"/proc/{worker['pid']}").exists()
        assert worker["blocks_free"] + worker["blocks_held"] == worker["blocks_total"]
        assert worker["waiting"] == 0
    assert status["workers"][0]["running"] == 1
    assert status["workers"][0]["blocks_held"] > 0
    assert [gateway["address"] for gateway in status["gateways"]] == [target]
    assert (status["queue"]["waiting"], status["queue"]["running"]) == (0, 1)


def test_up_tells_each_worker_which_of_the_hosts_workers_it_is(cluster: Cluster) -> None:
    """By which it chooses a GPU."""
    lines = {worker.id: command_line(worker.pid) for worker in cluster.status().workers}
    for rank, worker_id in enumerate(["prefill-0", "decode-0"]):
        assert f" --local-rank {rank} --local-size 2 " in lines[worker_id]


def test_status_for_people(target: str, capsys: Output) -> None:
    text = output_of(capsys, "status", "--target", target)
    assert re.search(r"^decode-0 +decode +ready +0 +0 +4096/4096 +0 ", text, re.MULTILINE)
    assert f"gateway-{os.uname().nodename}" in text
    assert "queue: 0 waiting, 0 running, room for 16" in text


def test_blocks_names_every_holder(cluster: Cluster, target: str, long_request: Stream, capsys: Output) -> None:
    (gateway,) = cluster.status().gateways
    held = objects(output_of(capsys, "blocks", "--json", "--target", target))
    assert {(entry["worker_id"], entry["request_id"]) for entry in held} == {("decode-0", "a-long-one")}
    assert all(entry["block_ids"] and entry["age_seconds"] > 0 for entry in held)
    assert {entry["owner"] for entry in held} == {gateway.id}
    row = rf"^decode-0 +a-long-one +running +{gateway.id} +\d+ +[\d.]+ s +with its call$"
    assert re.search(row, output_of(capsys, "blocks", "--target", target), re.M)


def test_blocks_of_an_idle_cluster(target: str, capsys: Output) -> None:
    assert output_of(capsys, "blocks", "--json", "--target", target) == ""
    assert output_of(capsys, "blocks", "--target", target).endswith("0 blocks are held\n")


def test_doctor(tiny_llama: Path, target: str, capsys: Output) -> None:
    findings = objects(output_of(capsys, "doctor", "--model", tiny_llama, "--json", "--target", target))
    subjects = [finding["subject"] for finding in findings]
    assert subjects == ["python", "torch", "transport", "redis", "model", "decode-0", "prefill-0"]
    assert all(finding["ok"] for finding in findings)
    assert re.search(r"blocks from prefill-0 by shm, [\d.]+ GB/s, [\d.]+ ms$", findings[5]["text"])


def test_status_shows_how_fast_the_links_are(target: str, capsys: Output) -> None:
    table = output_of(capsys, "status", "--target", target)
    assert re.search(r"^decode-0 .* prefill-0 by shm, [\d.]+ GB/s, [\d.]+ ms$", table, re.M)
    (status,) = objects(output_of(capsys, "status", "--json", "--target", target))
    (link,) = next(worker for worker in status["workers"] if worker["id"] == "decode-0")["links"]
    assert link["bandwidth"] > 0
    assert link["latency"] > 0
    assert link["fallback"] == ""


def test_doctor_without_a_cluster(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setenv("KVRELAY_TARGET", NOBODY)
    assert main(["doctor", "--model", str(tiny_llama)]) == 0
    assert not GRPC_TEXT.search(capsys.readouterr().out)
    assert main(["doctor", "--model", str(tiny_llama), "--target", NOBODY]) == 1
    assert "FAIL  cluster" in capsys.readouterr().out
    assert main(["doctor", "--model", "/no/such/folder"]) == 1
    assert "FAIL  model" in capsys.readouterr().out


def test_the_target_comes_from_the_environment(target: str) -> None:
    done = kvrelay("status", environment={"KVRELAY_TARGET": target})
    assert done.returncode == 0
    assert "decode-0" in done.stdout


@pytest.mark.parametrize("command", [("generate", "x"), ("status",), ("blocks",)])
def test_nobody_there(command: tuple[str, ...], capsys: Output) -> None:
    assert main([*command, "--target", NOBODY]) == 1
    error = capsys.readouterr().err
    assert f"nothing answers at {NOBODY}" in error
    assert "kvrelay up" in error
    assert not GRPC_TEXT.search(error)


def test_a_target_that_is_no_address(capsys: Output) -> None:
    assert main(["status", "--target", "no such host:1"]) == 1
    assert not GRPC_TEXT.search(capsys.readouterr().err)


def test_what_the_server_refuses(target: str, capsys: Output) -> None:
    assert main(["generate", PROMPT, "--temperature", "-1", "--target", target]) == 1
    assert "INVALID_ARGUMENT: sampling.temperature" in capsys.readouterr().err
