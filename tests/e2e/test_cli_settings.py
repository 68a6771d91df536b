"""Settings that cannot work: exit code 2, before a model is loaded, and a message that names them."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from redis import Redis

from kvrelay.cli import main
from kvrelay.control.private_redis import PrivateRedis
from kvrelay.engine import kv_cache
from tests.e2e.cluster import Cluster, start_cluster
from tests.e2e.processes import kvrelay
from tests.patience import eventually
from tests.ports import free_port

Output = pytest.CaptureFixture[str]


def complaint(capsys: Output, *arguments: object) -> str:
    """What a command says that ends with exit code 2."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exit:  # argparse's own
        code = exit.code if isinstance(exit.code, int) else -1
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


WRONG_ARGUMENTS = {
    "a count of none": (("up", "--decode", "0"), "--decode: 0 is too small; the least is 1"),
    "a negative count": (("up", "--prefill", "-1"), "--prefill: -1 is too small; the least is 1"),
    "no number": (("up", "--num-blocks", "many"), "--num-blocks: 'many' is not"),
    "a port out of range": (("up", "--port", "70000"), "--port: 70000 is too large"),
    "an unknown flag": (("up", "--num-block", "3"), "--num-block: unknown flag; did you mean --num-blocks?"),
    "an unknown flag with value": (("up", "--prefil=2"), "--prefil: unknown flag; did you mean --prefill?"),
    "an unknown flag of a client": (("generate", "x", "--maxtokens", "3"), "did you mean --max-tokens?"),
    "a flag like nothing": (("status", "--qqqq"), "--qqqq: unknown flag; --help shows the valid ones"),
    "two prompts": (("generate", "once", "upon"), "'upon': one argument too many"),
    "an unknown command": (("upp",), "invalid choice: 'upp' (choose from 'up'"),
    "an unknown choice": (("up", "--transport", "grcp"), "--transport: 'grcp' is not a choice; did you mean grpc?"),
    "a flag of `up` at a worker": (("decode", "--prefill", "2"), "--prefill: unknown flag"),
    "a worker's flag at the gateway": (("gateway", "--device", "cpu"), "--device: unknown flag"),
    "a worker's flag at `up`": (("up", "--worker-port", "7000"), "--worker-port: unknown flag"),
    "no folder": (("up", "--model", "/no/such/model"), "model /no/such/model: no such folder"),
    "a public address": (("up", "--host", "0.0.0.0"), "--insecure-bind"),
    "a worker alone": (("decode",), "--redis"),
    "a worker without a key": (("decode", "--redis", "redis://127.0.0.1:1"), "--key-file"),
    "a run directory in a file": (("up", "--run-dir", "/dev/null/run"), "run directory /dev/null/run: Not a directory"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG_ARGUMENTS.values(), ids=WRONG_ARGUMENTS)
def test_wrong_arguments(arguments: tuple[str, ...], message: str, tiny_llama: Path, capsys: Output) -> None:
    # A model that is there, so that nothing else is wrong.
    model = () if "--model" in arguments or arguments[0] not in ("up", "decode") else ("--model", tiny_llama)
    assert message in complaint(capsys, *arguments, *model)


def test_a_wrong_variable(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    monkeypatch.setenv("KVRELAY_PREFIL", "2")
    assert "KVRELAY_PREFIL: unknown variable; did you mean KVRELAY_PREFILL?" in complaint(capsys, "up")


def test_a_wrong_file(tmp_path: Path, capsys: Output) -> None:
    file = tmp_path / "kvrelay.toml"
    file.write_text("[engine]\nblok_size = 16\n")
    assert f"{file}: [engine] blok_size: unknown key; did you mean block_size?" in complaint(
        capsys, "up", "--config", file
    )


def test_a_checkpoint_without_safetensors(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    error = complaint(capsys, "up", "--model", tmp_path)
    assert "no model.safetensors" in error
    assert "pytorch_model.bin is not read" in error


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateRedis]:
    server = PrivateRedis(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


def worker(redis: PrivateRedis, key: Path, model: Path, *more: object) -> tuple[object, ...]:
    return ("prefill", "--redis", redis.url, "--key-file", key, "--model", model, *more)


UNSUPPORTED: dict[str, Callable[[], Any]] = {
    "bert": lambda: tf.BertConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
    "t5": lambda: tf.T5Config(vocab_size=512, d_model=64, d_kv=16, num_layers=2, num_heads=4),
    "mamba": lambda: tf.MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2),
}


def make_unsupported(folder: Path, model: Path, kind: str) -> Path:
    """Its configuration beside the weights of another, which nobody gets to read."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = UNSUPPORTED[kind]()
    config.architectures = [type(config).__name__.replace("Config", "Model")]
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_an_unsupported_architecture(
    kind: str, redis: PrivateRedis, tiny_llama: Path, tmp_path: Path, capsys: Output
) -> None:
    model = make_unsupported(tmp_path / kind, tiny_llama, kind)
    error = complaint(capsys, *worker(redis, tmp_path / "key", model))
    assert re.search(
        rf"^kvrelay: {re.escape(str(model))}\S*: .*(support|decoder|causal|attention)", error, re.MULTILINE
    )


def test_a_pool_larger_than_the_memory(
    redis: PrivateRedis, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setattr(kv_cache, "_available_memory", lambda: 1 << 20)  # lest a defect takes the machine down
    error = complaint(capsys, *worker(redis, tmp_path / "key", tiny_llama, "--kv-cache-memory", "2MiB"))
    assert "kv_cache_memory: a pool of 2 MiB" in error
    assert "does not fit; 1 MiB of memory are available" in error


def test_redis_that_refuses(redis: PrivateRedis, tiny_llama: Path, tmp_path: Path, capsys: Output) -> None:
    gateway = ("gateway", "--port", free_port(), "--key-file", tmp_path / "key", "--model", tiny_llama)
    with Redis.from_url(redis.url) as admin:
        admin.execute_command("REPLICAOF", "127.0.0.1", "1")
        assert "read-only replica" in complaint(capsys, *gateway, "--redis", redis.url)
        admin.execute_command("REPLICAOF", "NO", "ONE")
        admin.config_set("requirepass", "secret")
        assert "refuses the user name or password" in complaint(capsys, *gateway, "--redis", redis.url)
        error = complaint(capsys, *gateway, "--redis", redis.url.replace("unix://", "unix://:wrong@"))
        assert "refuses the user name or password" in error
        assert "wrong" not in error
        admin.auth("secret")
        admin.config_set("requirepass", "")
    assert "Redis at redis://127.0.0.1:1: cannot be reached" in complaint(
        capsys, *gateway, "--redis", "redis://127.0.0.1:1"
    )


def test_up_ends_as_its_child_does(tiny_llama: Path, cluster: Cluster, tmp_path: Path) -> None:
    port = cluster.target.rpartition(":")[2]
    done = kvrelay("up", "--model", tiny_llama, "--port", port, "--run-dir", tmp_path / "run")
    assert done.returncode == 2
    assert f"kvrelay: {cluster.target}: cannot listen here: Address already in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_up_with_an_unsupported_model(tiny_llama: Path, tmp_path: Path) -> None:
    model = make_unsupported(tmp_path / "model", tiny_llama, "mamba")
    done = kvrelay("up", "--model", model, "--port", free_port(), "--run-dir", tmp_path / "run")
    assert done.returncode == 2
    assert str(model) in done.stderr
    assert "Traceback" not in done.stderr


def test_flags_of_up_beat_its_environment_in_its_children_too(tiny_llama: Path, tmp_path: Path) -> None:
    variables = {"KVRELAY_PORT": str(free_port()), "KVRELAY_SHARED_POOL": "auto"}
    variables |= {"KVRELAY_WORKER_ID": "worker", "KVRELAY_WORKER_PORT": str(free_port())}
    with start_cluster(tmp_path / "run", tiny_llama, num_blocks=64, environment=variables) as cluster:
        status = cluster.status()
        assert {worker.id for worker in status.workers} == {"prefill-0", "decode-0"}
        assert [(gateway.address, gateway.id != "worker") for gateway in status.gateways] == [(cluster.target, True)]


def test_up_says_what_to_do_next(cluster: Cluster) -> None:
    log = cluster.run_dir.parent / f"{cluster.run_dir.name}.up.log"
    eventually(lambda: "kvrelay status" in log.read_text(), 5, "it is said")
    text = log.read_text()
    assert re.search(rf"^kvrelay: ready after \S+ s: {cluster.target} serves ", text, re.MULTILINE)
    assert f'kvrelay generate "Once upon a time" --target {cluster.target}' in text
