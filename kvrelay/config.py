"""Settings are parsed once, from flags, environment and one TOML file; what is unknown is an error.

A setting `block_size` of the group `engine` is the flag `--block-size`, the variable `KVRELAY_BLOCK_SIZE` and the key
`block_size` of the table `[engine]`. A flag beats the environment, the environment beats the file.
"""

import argparse
import dataclasses
import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from kvrelay.errors import ConfigurationError
from kvrelay.settings import Settings

__all__ = ["add_flags", "dump_toml", "load", "without_settings"]

ENVIRONMENT_PREFIX = "KVRELAY_"
NO_SETTINGS = {"KVRELAY_TARGET", "KVRELAY_FAILPOINTS"}
NOT_PARSED = NO_SETTINGS | {"KVRELAY_CONFIG"}


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
        if name.startswith(ENVIRONMENT_PREFIX) and name not in NOT_PARSED:
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


def without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process whose file of settings is complete: whatever would beat the file is missing."""
    return {
        name: text
        for name, text in environment.items()
        if not name.startswith(ENVIRONMENT_PREFIX) or name in NO_SETTINGS
    }


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
