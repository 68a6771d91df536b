"""Settings: frozen, and parsed once, from flags, environment and one TOML file; what is unknown is an error.

A setting `block_size` of the group `engine` is the flag `--block-size`, the variable `KVRELAY_BLOCK_SIZE` and the key
`block_size` of the table `[engine]`. A flag beats the environment, the environment beats the file.
"""

import argparse
import dataclasses
import difflib
import os
import re
import socket
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from kvrelay.errors import ConfigurationError

__all__ = [
    "AUTO",
    "ClusterSettings",
    "EngineSettings",
    "GatewaySettings",
    "Settings",
    "TransferSettings",
    "WorkerSettings",
    "add_flags",
    "dump_toml",
    "load",
]

ENVIRONMENT_PREFIX = "KVRELAY_"
NOT_SETTINGS = {"KVRELAY_TARGET", "KVRELAY_CONFIG", "KVRELAY_FAILPOINTS"}
DEMO_MODEL = "demo"
AUTO = "auto"


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[str] = (),
    unit: str = "",
    bare: str | None = None,
) -> Any:
    """A dataclass field with what its flag, its check and its documentation need. Unit "bytes" takes 512MiB too.

    Args:
        bare: what the flag means without a value, if it can be without.
    """
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "choices": choices, "unit": unit, "bare": bare}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """What all processes of one cluster share."""

    redis: str = setting("", "Redis URL; empty starts a private server")
    run_dir: str = setting("", "folder for sockets, logs and the cluster's key; empty makes a temporary one")
    key_file: str = setting("", "file with the cluster's key, made when missing; empty puts it into the run directory")
    host: str = setting("127.0.0.1", "address to listen on")
    advertise_host: str = setting(
        "", "name under which others reach this process; empty means the host, or for 0.0.0.0 the machine's name"
    )
    insecure_bind: bool = setting(False, "listen on other addresses than loopback although nothing authenticates")
    detection_seconds: float = setting(
        2.0, "a worker that is silent for so long is taken for lost, and its requests go on elsewhere", minimum=0.5
    )
    log_level: str = setting("info", "least severity that is logged", choices=("debug", "info", "warning", "error"))
    prefill: int = setting(1, "number of prefill workers that `up` starts", minimum=1)
    decode: int = setting(1, "number of decode workers that `up` starts", minimum=1)

    @property
    def heartbeat_seconds(self) -> float:
        """Between two signs of life, and between two looks for those of others."""
        return self.detection_seconds / 8

    @property
    def lease_seconds(self) -> float:
        """How long a sign of life counts; the look that finds it missing comes within `detection_seconds`."""
        return self.detection_seconds * 3 / 4

    def address(self, port: int) -> str:
        """Where others reach this process."""
        everywhere = self.host in ("0.0.0.0", "::")
        host = self.advertise_host or (socket.gethostname() if everywhere else self.host)
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """The gateway's limits."""

    port: int = setting(50051, "port of the public API", minimum=0, maximum=65535)
    max_running: int = setting(256, "requests on the workers at once; the others queue", minimum=1)
    max_waiting: int = setting(1024, "requests that may queue; more are refused", minimum=0)
    disaggregation: str = setting(
        "always",
        "who computes prompts: always the prefill workers, never they but the decode workers, or auto, what costs less",
        choices=("always", "never", "auto"),
    )
    worker_wait_seconds: float = setting(30.0, "how long a request waits for a worker when there is none", minimum=0)
    max_failures: int = setting(
        4, "so many workers may fail a request, which goes on elsewhere each time; the next failure ends it", minimum=0
    )
    responses_per_second: float = setting(
        0.0,
        "responses sent over all streams before tokens travel together; 0 means 160 for each CPU core, inf no limit",
        minimum=0,
    )
    replay_seconds: float = setting(60.0, "how long a finished request can be replayed", minimum=0)
    replay_requests: int = setting(1024, "how many finished requests can be replayed", minimum=0)


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """Who a worker process is."""

    worker_id: str = setting("", "unique name; empty makes one from role, host name and process id")
    worker_port: int = setting(0, "port to listen on; 0 takes a free one", minimum=0, maximum=65535)
    advertise_port: int = setting(
        0, "port under which others reach this worker; 0 means the one it listens on", minimum=0, maximum=65535
    )
    stuck_seconds: float = setting(
        20.0, "a worker whose engine takes longer for one step is not ready; 0 allows any time", minimum=0
    )
    drain_seconds: float = setting(30.0, "how long running requests may take to finish after SIGTERM", minimum=0)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """The model and the batching loop."""

    model: str = setting(DEMO_MODEL, "checkpoint folder, Hugging Face hub name, or demo for the model shipped")
    served_model_name: str = setting("", "name of the model in the API; empty means the checkpoint's")
    device: str = setting("auto", "torch device; auto takes a GPU if there is one")
    dtype: str = setting(
        "auto",
        "auto means float32 on a CPU, else the checkpoint's",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    quantization: str = setting(
        "none",
        "int8 keeps the weights in 8 bits, which is faster and loses a little; on a CPU only",
        choices=("none", "int8"),
    )
    block_size: int = setting(16, "tokens in a KV block", minimum=1, maximum=1024)
    num_blocks: int = setting(0, "KV blocks in the pool; 0 derives them from kv_cache_memory", minimum=0)
    kv_cache_memory: int = setting(
        0, "size of the KV pool; 0 means 512MiB on a CPU, most of what is free on a GPU", minimum=0, unit="bytes"
    )
    shared_pool: str = setting(
        "",
        "file of a KV pool for all workers of this host, between which no blocks move; `up` makes one if none is named",
        bare=AUTO,
    )
    context_length: int = setting(0, "tokens a request may have; 0 means as many as model and pool allow", minimum=0)
    max_num_sequences: int = setting(64, "sequences in the running batch", minimum=1)
    max_batched_tokens: int = setting(512, "tokens computed in one step; longer prompts are chunked", minimum=1)
    itl_limit: float = setting(
        0.1,
        "seconds that a decode step may take because prompt tokens ride beside it; 0 means no limit",
        minimum=0,
    )
    prefix_caching: bool = setting(True, "reuse KV blocks of equal prefixes")
    overlap: str = setting(
        "auto",
        "plan the next step while the device computes this one; auto does so on a GPU",
        choices=("auto", "always", "never"),
    )
    cuda_graphs: bool = setting(True, "replay decode steps as CUDA graphs on a GPU")
    threads: int = setting(0, "CPU threads of one worker; 0 means twice its share of the cores", minimum=0)


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """The handover of KV blocks."""

    transport: str = setting(
        "auto",
        "how blocks travel; auto takes the fastest that both ends share",
        choices=("auto", "pool", "shm", "nixl", "cuda_ipc", "grpc"),
    )
    require_transport: str = setting("", "transports that auto may choose, comma-separated; empty allows all")
    checksum: str = setting(
        "full",
        "which blocks that were moved are verified by an XXH3 checksum: all, one in eight, or none",
        choices=("full", "sampled", "off"),
    )
    lease_seconds: float = setting(30.0, "how long blocks are held for a decode worker that is silent", minimum=0.1)


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of a process."""

    cluster: ClusterSettings = ClusterSettings()
    gateway: GatewaySettings = GatewaySettings()
    worker: WorkerSettings = WorkerSettings()
    engine: EngineSettings = EngineSettings()
    transfer: TransferSettings = TransferSettings()


def add_flags(parser: argparse.ArgumentParser, groups: Iterable[str], *, leave_out: Iterable[str] = ()) -> None:
    """Adds a flag for each setting of the groups, and `--config`."""
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings (KVRELAY_CONFIG)")
    for group in groups:
        section = parser.add_argument_group(f"{group} settings")
        for spec in dataclasses.fields(_group_type(group)):
            if spec.name not in set(leave_out):
                _add_flag(section, spec)


def _add_flag(section: Any, spec: "dataclasses.Field[Any]") -> None:
    flag = "--" + spec.name.replace("_", "-")
    text = f"{spec.metadata['help']} (default: {spec.default!s})".replace("default: )", "default: empty)")
    if spec.type is bool:
        section.add_argument(flag, dest=spec.name, default=None, action=argparse.BooleanOptionalAction, help=text)
    else:
        unit = spec.metadata["unit"] or ("text" if spec.type is str else "number")
        metavar = "|".join(spec.metadata["choices"]) or unit.upper()
        bare = spec.metadata["bare"]
        count = None if bare is None else "?"
        section.add_argument(flag, dest=spec.name, default=None, metavar=metavar, help=text, nargs=count, const=bare)


def load(flags: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Settings:
    """Reads the settings.

    Args:
        flags: what argparse found; None where a flag was not given. Names that are no settings are passed over.

    Raises:
        ConfigurationError: naming the place, the key, the value and the nearest valid one.
    """
    environment = os.environ if environment is None else environment
    path = flags.get("config") or environment.get("KVRELAY_CONFIG")
    values = _from_file(Path(path)) if path else {}
    for name, text in environment.items():
        if name.startswith(ENVIRONMENT_PREFIX) and name not in NOT_SETTINGS:
            key = name.removeprefix(ENVIRONMENT_PREFIX).lower()
            if key not in _SPECS:
                raise ConfigurationError(f"{name}: unknown variable{_nearest(key, _SPECS, _variable)}")
            values[key] = _parse(_SPECS[key], text, name)
    for key, value in flags.items():
        if key in _SPECS and value is not None:
            values[key] = _parse(_SPECS[key], value, "--" + key.replace("_", "-"))
    return Settings(
        **{
            group.name: _group_type(group.name)(**{key: values[key] for key in _GROUP_KEYS[group.name] & values.keys()})
            for group in dataclasses.fields(Settings)
        }
    )


def dump_toml(settings: Settings) -> str:
    """The settings as a file that `load` reads back to the same value."""
    lines: list[str] = []
    for group in dataclasses.fields(Settings):
        lines.append(f"[{group.name}]")
        for key, value in dataclasses.asdict(getattr(settings, group.name)).items():
            lines.append(f"{key} = {_toml_value(value)}")
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # Plain ASCII, so that the file is read back in any locale.
        plain = (c if c.isascii() and c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value)
        return f'"{"".join(plain)}"'
    return repr(value)


def _from_file(path: Path) -> dict[str, Any]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # of the encoding, the syntax, or a number of thousands of digits
        raise ConfigurationError(f"{path}: not valid TOML: {error}") from error
    values: dict[str, Any] = {}
    for group, table in tables.items():
        if group not in _GROUP_KEYS:
            raise ConfigurationError(f"{path}: [{group}]: unknown table{_nearest(group, _GROUP_KEYS)}")
        if not isinstance(table, dict):
            raise ConfigurationError(f"{path}: {group}: {table!r} is not a table; write [{group}] above its keys")
        for key, value in table.items():
            if key not in _GROUP_KEYS[group]:
                raise ConfigurationError(f"{path}: [{group}] {key}: unknown key{_nearest(key, _GROUP_KEYS[group])}")
            values[key] = _parse(_SPECS[key], value, f"{path}: [{group}] {key}")
    return values


def _variable(key: str) -> str:
    return ENVIRONMENT_PREFIX + key.upper()


def _nearest(word: str, valid: Iterable[str], style: Any = str) -> str:
    matches = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {style(matches[0])}?" if matches else f"; valid are {', '.join(map(style, sorted(valid)))}"


def _parse(spec: "dataclasses.Field[Any]", value: Any, place: str) -> Any:
    parsed = _convert(spec, value, place)
    low, high, choices = (spec.metadata[name] for name in ("minimum", "maximum", "choices"))
    if low is not None and not parsed >= low:
        raise ConfigurationError(f"{place}: {value} is too small; the least is {low:g}")
    if high is not None and not parsed <= high:
        raise ConfigurationError(f"{place}: {value} is too large; the most is {high:g}")
    if choices and parsed not in choices:
        raise ConfigurationError(f"{place}: {value!r} is not a choice{_nearest(str(value), choices)}")
    return parsed


def _convert(spec: "dataclasses.Field[Any]", value: Any, place: str) -> Any:
    kind: Any = spec.type
    try:
        if kind is bool:
            return value if isinstance(value, bool) else _BOOLEANS[value.lower()]
        if isinstance(value, bool) or (kind is str and not isinstance(value, str)):
            raise TypeError
        if spec.metadata["unit"] == "bytes" and isinstance(value, str):
            return _parse_bytes(value)
        if kind is int and isinstance(value, float):
            raise TypeError
        return kind(value)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        wanted = "a number of bytes, such as 512MiB" if spec.metadata["unit"] == "bytes" else _TYPE_NAMES[kind]
        raise ConfigurationError(f"{place}: {value!r} is not {wanted}") from None


_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
_TYPE_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_BYTE_UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def _parse_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None:
        raise ValueError(text)
    return int(Decimal(match[1]) * _BYTE_UNITS[match[2].upper()])


def _group_type(group: str) -> Any:
    return next(spec.type for spec in dataclasses.fields(Settings) if spec.name == group)


_GROUP_KEYS: dict[str, set[str]] = {
    group.name: {spec.name for spec in dataclasses.fields(_group_type(group.name))}
    for group in dataclasses.fields(Settings)
}
_SPECS: dict[str, "dataclasses.Field[Any]"] = {
    spec.name: spec for group in _GROUP_KEYS for spec in dataclasses.fields(_group_type(group))
}
