"""Each command has the flags that it looks at, and no others."""

import re
from dataclasses import fields

import pytest

from kvrelay import config
from kvrelay.cli import main
from kvrelay.settings import EngineSettings, Settings

EVERY_FLAG = {setting.name for group in fields(Settings) for setting in fields(getattr(Settings(), group.name))}
GATEWAY_FLAGS = {setting.name for setting in fields(Settings().gateway)}
ENGINE_FLAGS = {setting.name for setting in fields(EngineSettings)}

LACKING = {
    "up": {"worker_id", "worker_port", "advertise_port", "local_rank", "local_size"},
    "gateway": {
        *("prefill", "decode", "worker_port", "advertise_port", "stuck_seconds"),
        *(ENGINE_FLAGS - {"model", "served_model_name", "context_length"}),
        *("transport", "require_transport", "checksum", "lease_seconds"),
    },
    "prefill": {"prefill", "decode", "itl_limit", "transport", "require_transport", "checksum", *GATEWAY_FLAGS},
    "decode": {"prefill", "decode", *GATEWAY_FLAGS},
}


@pytest.mark.parametrize("command", LACKING)
def test_the_flags_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    flags = set(re.findall(r"^  (?:-h, )?--([a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    assert {flag.replace("-", "_") for flag in flags} - {"help", "config"} == EVERY_FLAG - LACKING[command]


def test_who_has_no_flag_for_a_setting_may_find_it_in_the_environment() -> None:
    assert config.load({}, {"KVRELAY_PREFILL": "2", "KVRELAY_WORKER_PORT": "7000"}).worker.worker_port == 7000
