import argparse
import dataclasses
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvrelay import config
from kvrelay.errors import ConfigurationError
from kvrelay.settings import ClusterSettings, EngineSettings, Settings, TransferSettings, WorkerSettings

GROUPS = [group.name for group in dataclasses.fields(Settings)]
Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(text: str) -> Path:
        path = tmp_path / "kvrelay.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def parse(*arguments: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    config.add_flags(parser, GROUPS)
    return vars(parser.parse_args(arguments))


# Precedence


def test_without_anything_the_defaults_hold() -> None:
    assert config.load({}, {}) == config.load(parse(), {}) == Settings()


def test_a_flag_beats_the_environment_which_beats_the_file(write: Write) -> None:
    path = write("[engine]\nblock_size = 8\nnum_blocks = 80\nthreads = 1\n[gateway]\nport = 1\n")
    environment = {"KVRELAY_BLOCK_SIZE": "16", "KVRELAY_NUM_BLOCKS": "160", "PATH": "/bin"}
    settings = config.load(parse("--config", str(path), "--block-size", "32"), environment)
    assert settings.engine == EngineSettings(block_size=32, num_blocks=160, threads=1)
    assert settings.gateway.port == 1
    assert settings.transfer == TransferSettings()


def test_the_file_may_be_named_by_the_environment_and_a_flag_beats_it(write: Write, tmp_path: Path) -> None:
    path = write("[gateway]\nport = 1\n")
    assert config.load(parse(), {"KVRELAY_CONFIG": str(path)}).gateway.port == 1
    other = tmp_path / "other.toml"
    other.write_text("[gateway]\nport = 2\n")
    assert config.load(parse("--config", str(other)), {"KVRELAY_CONFIG": str(path)}).gateway.port == 2


def test_the_process_environment_is_read_unless_another_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVRELAY_BLOCK_SIZE", "64")
    assert config.load({}).engine.block_size == 64
    assert config.load({}, {}).engine.block_size == 16


def test_what_a_command_asks_beside_the_settings_is_passed_over() -> None:
    settings = config.load({"command": "up", "json": True, "block_size": None}, {"KVRELAY_TARGET": "host:1"})
    assert settings == Settings()


def test_what_would_beat_a_file_is_not_passed_on() -> None:
    kept = {"PATH": "/bin", "KVRELAY_TARGET": "host:1", "KVRELAY_FAILPOINTS": "release.before=kill"}
    settings = {"KVRELAY_PORT": "1", "KVRELAY_CONFIG": "a.toml", "KVRELAY_NO_SUCH": "1"}
    assert config.without_settings(kept | settings) == kept


# Values


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], True),
        (["--prefix-caching"], True),
        (["--no-prefix-caching"], False),
    ],
)
def test_a_flag_switches_on_and_off(arguments: list[str], expected: bool) -> None:
    assert config.load(parse(*arguments), {}).engine.prefix_caching is expected


def test_a_flag_beats_the_environment_also_when_it_switches_off() -> None:
    switched = {value: {"KVRELAY_PREFIX_CACHING": value} for value in ("true", "false")}
    assert config.load(parse("--no-prefix-caching"), switched["true"]).engine.prefix_caching is False
    assert config.load(parse("--prefix-caching"), switched["false"]).engine.prefix_caching is True


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1", True), ("true", True), ("Yes", True), ("ON", True), ("0", False), ("False", False), ("no", False)],
)
def test_booleans_of_the_environment(text: str, expected: bool) -> None:
    assert config.load({}, {"KVRELAY_INSECURE_BIND": text}).cluster.insecure_bind is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("512", 512),
        ("4KiB", 4096),
        ("512MiB", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("2 GB", 2 * 10**9),
        ("3mb", 3 * 10**6),
        ("10KB", 10_000),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes_in_bytes_have_units(text: str, expected: int, write: Write) -> None:
    assert config.load(parse("--kv-cache-memory", text), {}).engine.kv_cache_memory == expected
    path = write(f'[engine]\nkv_cache_memory = "{text}"')
    assert config.load({"config": str(path)}, {}).engine.kv_cache_memory == expected


def test_a_size_in_the_file_may_be_a_number(write: Write) -> None:
    path = write("[engine]\nkv_cache_memory = 4096")
    assert config.load({"config": str(path)}, {}).engine.kv_cache_memory == 4096


def test_a_number_with_a_fraction_may_be_whole(write: Write) -> None:
    path = write("[transfer]\nlease_seconds = 5")
    lease = config.load({"config": str(path)}, {}).transfer.lease_seconds
    assert lease == 5.0
    assert isinstance(lease, float)


# Errors


def error_of(flags: dict[str, Any], environment: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigurationError) as caught:
        config.load(flags, environment or {})
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[engine]\nblok_size = 8", "[engine] blok_size: unknown key; did you mean block_size?"),
        ("[engine]\nport = 8", "[engine] port: unknown key; valid are block_size, context_length"),
        ("[engin]\nblock_size = 8", "[engin]: unknown table; did you mean engine?"),
        ("[xyz]", "[xyz]: unknown table; valid are cluster, engine, gateway, transfer, worker"),
        ("block_size = 8", "[block_size]: unknown table; valid are"),
        ("engine = 8", "engine: 8 is not a table; write [engine] above its keys"),
        ("[[engine]]\nblock_size = 8", "engine: [{'block_size': 8}] is not a table"),
        ("[engine]\nblock_size = 0", "[engine] block_size: 0 is too small; the least is 1"),
        ("[engine]\nblock_size = -3", "[engine] block_size: -3 is too small; the least is 1"),
        ("[engine]\nblock_size = 2000", "[engine] block_size: 2000 is too large; the most is 1024"),
        ('[engine]\nblock_size = "many"', "[engine] block_size: 'many' is not a whole number"),
        ("[engine]\nblock_size = 8.0", "[engine] block_size: 8.0 is not a whole number"),
        ("[engine]\nblock_size = true", "[engine] block_size: True is not a whole number"),
        ("[engine]\nblock_size = [8]", "[engine] block_size: [8] is not a whole number"),
        ("[engine]\nblock_size = 1979-05-27", "is not a whole number"),
        ("[engine]\nmodel = 8", "[engine] model: 8 is not text"),
        ("[engine]\nprefix_caching = 1", "[engine] prefix_caching: 1 is not true or false"),
        ('[engine]\nprefix_caching = "maybe"', "[engine] prefix_caching: 'maybe' is not true or false"),
        ("[transfer]\nlease_seconds = nan", "[transfer] lease_seconds: nan is too small; the least is 0.1"),
        ('[transfer]\nlease_seconds = "x"', "[transfer] lease_seconds: 'x' is not a number"),
        ("[transfer]\nlease_seconds = 1" + "0" * 400, "is not a number"),
        ('[transfer]\ntransport = "gprc"', "[transfer] transport: 'gprc' is not a choice; did you mean grpc?"),
        (
            '[transfer]\ntransport = "pigeon"',
            "'pigeon' is not a choice; valid are auto, cuda_ipc, grpc, nixl, pool, shm",
        ),
        ("[engine]\nkv_cache_memory = 1.5", "[engine] kv_cache_memory: 1.5 is not a number of bytes, such as 512MiB"),
        ("[engine]\nkv_cache_memory = -1", "[engine] kv_cache_memory: -1 is too small; the least is 0"),
        ('[engine]\nkv_cache_memory = "5 apples"', "'5 apples' is not a number of bytes"),
        ('[engine]\nkv_cache_memory = "-5"', "'-5' is not a number of bytes"),
        ('[engine]\nkv_cache_memory = ""', "'' is not a number of bytes"),
        ("[engine\n", "not valid TOML: "),
        ("[engine]\nthreads = 1\nthreads = 2", "not valid TOML: "),
        ("[engine]\nthreads = 1" + "0" * 5000, "not valid TOML: "),
    ],
)
def test_an_error_in_the_file_names_file_key_value_and_what_is_valid(write: Write, text: str, message: str) -> None:
    path = write(text)
    error = error_of({"config": str(path)})
    assert error.startswith(f"{path}: ")
    assert message in error


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.toml"
    assert error_of({"config": str(missing)}) == f"{missing}: cannot be read: No such file or directory"
    assert error_of({"config": str(tmp_path)}) == f"{tmp_path}: cannot be read: Is a directory"
    missing.write_bytes(b"\xff\xfe")
    assert error_of({"config": str(missing)}).startswith(f"{missing}: not valid TOML: ")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("KVRELAY_BLOCKSIZE", "8", "KVRELAY_BLOCKSIZE: unknown variable; did you mean KVRELAY_BLOCK_SIZE?"),
        ("KVRELAY_XYZXYZ", "8", "KVRELAY_XYZXYZ: unknown variable; valid are KVRELAY_ADVERTISE_HOST, "),
        ("KVRELAY_PORT", "", "KVRELAY_PORT: '' is not a whole number"),
        ("KVRELAY_PORT", "65536", "KVRELAY_PORT: 65536 is too large; the most is 65535"),
        ("KVRELAY_PREFIX_CACHING", "perhaps", "KVRELAY_PREFIX_CACHING: 'perhaps' is not true or false"),
        ("KVRELAY_DECODE", "0", "KVRELAY_DECODE: 0 is too small; the least is 1"),
    ],
)
def test_an_error_in_the_environment_names_the_variable(name: str, text: str, message: str) -> None:
    assert error_of({}, {name: text}).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--block-size", "x"], "--block-size: 'x' is not a whole number"),
        (["--prefill", "0"], "--prefill: 0 is too small; the least is 1"),
        (["--transport", "shn"], "--transport: 'shn' is not a choice; did you mean shm?"),
        (["--lease-seconds", "-1"], "--lease-seconds: -1 is too small; the least is 0.1"),
    ],
)
def test_an_error_in_a_flag_names_the_flag(arguments: list[str], message: str) -> None:
    assert error_of(parse(*arguments)) == message


# What others rely on


def test_no_two_settings_have_one_name() -> None:
    names = [
        spec.name
        for group in dataclasses.fields(Settings)
        for spec in dataclasses.fields(getattr(config.load({}, {}), group.name))
    ]
    assert len(names) == len(set(names))


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.load({}, {}).engine.block_size = 8  # type: ignore[misc]


@pytest.mark.parametrize("group", GROUPS)
def test_each_group_has_flags_with_help(group: str) -> None:
    parser = argparse.ArgumentParser()
    config.add_flags(parser, [group])
    text = parser.format_help()
    flat = " ".join(text.split())
    for spec in dataclasses.fields(getattr(Settings(), group)):
        assert "--" + spec.name.replace("_", "-") in text
        assert spec.metadata["help"].split(";")[0] in flat
    assert "default: )" not in flat


def test_flags_can_be_left_out() -> None:
    parser = argparse.ArgumentParser()
    config.add_flags(parser, ["cluster"], leave_out=["prefill", "decode"])
    assert not {"prefill", "decode"} & vars(parser.parse_args([])).keys()
    assert "redis" in vars(parser.parse_args([]))


def every_setting() -> Settings:
    """Each setting with another value than its default."""

    def other(spec: "dataclasses.Field[Any]") -> Any:
        if spec.type is bool:
            return not spec.default
        if spec.metadata["choices"]:
            return spec.metadata["choices"][-1]
        return spec.type(spec.default + 1) if spec.type is not str else f"{spec.name}-ü"  # type: ignore[operator]

    return Settings(
        **{
            name: type(group)(**{spec.name: other(spec) for spec in dataclasses.fields(group)})
            for name, group in ((name, getattr(Settings(), name)) for name in GROUPS)
        }
    )


def test_dumped_settings_are_read_back(write: Write) -> None:
    for asked in (Settings(), every_setting()):
        assert config.load({"config": str(write(config.dump_toml(asked)))}, {}) == asked


@settings(max_examples=50)
@given(text=st.text(st.characters(exclude_categories=["Cs"])), seconds=st.floats(min_value=0.1))
def test_any_text_and_number_is_read_back(tmp_path_factory: pytest.TempPathFactory, text: str, seconds: float) -> None:
    asked = Settings(engine=EngineSettings(model=text), transfer=TransferSettings(lease_seconds=seconds))
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(config.dump_toml(asked), encoding="ascii")
    assert config.load({"config": str(path)}, {}) == asked


@pytest.mark.parametrize(
    "text", ['"', "\\", "\\n", "a\nb", "\r\n", "\t", "\x00", "\x1f", "\x7f", "\x85", "\u2028", "é", "😀"]
)
def test_special_characters_are_read_back(write: Write, text: str) -> None:
    settings = Settings(engine=EngineSettings(model=f"a{text}b"))
    assert config.load({"config": str(write(config.dump_toml(settings)))}, {}) == settings


def test_the_name_of_a_process() -> None:
    assert WorkerSettings().id_of("decode") == f"decode-{socket.gethostname()}-{os.getpid()}"
    assert WorkerSettings(worker_id="decode-7").id_of("decode") == "decode-7"


@pytest.mark.parametrize(
    ("host", "advertise_host", "expected"),
    [
        ("127.0.0.1", "", "127.0.0.1:7"),
        ("::1", "", "[::1]:7"),
        ("0.0.0.0", "", f"{socket.gethostname()}:7"),
        ("0.0.0.0", "decode.example", "decode.example:7"),
    ],
)
def test_address_that_others_are_told(host: str, advertise_host: str, expected: str) -> None:
    assert ClusterSettings(host=host, advertise_host=advertise_host).address(7) == expected
