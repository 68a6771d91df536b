"""Failpoints do nothing unless they are armed, and then exactly what was asked, when it was asked."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvrelay import failpoints
from kvrelay.cli import main
from kvrelay.errors import ConfigurationError
from kvrelay.failpoints import POINTS, Failpoint, InjectedFault, flip, parse, reach, reach_now

ROOT = Path(__file__).parents[2]
POINT, OTHER = "decode.frame", "release.before"


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


def block(content: bytes = bytes(8)) -> bytearray:
    return bytearray(content)


def test_a_text_says_what_happens_where_and_when() -> None:
    assert parse(" pull.after_blocks=kill@3 ;release.before=delay:0.5@1; decode.frame=flip;") == [
        Failpoint("pull.after_blocks", "kill", at=3),
        Failpoint("release.before", "delay", 0.5, 1),
        Failpoint("decode.frame", "flip"),
    ]


@pytest.mark.parametrize("text", ["pull.after_blocks=kill@3", "release.before=delay:0.5@1", "decode.frame=flip"])
def test_a_failpoint_reads_back(text: str) -> None:
    assert [str(each) for each in parse(text)] == [text]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("decode.frame", "is not POINT=ACTION"),
        ("decode.frame=kill@0", "is not POINT=ACTION"),
        ("decode.frame=delay:soon", "is not POINT=ACTION"),
        ("decode.frames=kill", "'decode.frames' is no failpoint; valid are prefill.admitted"),
        ("decode.frame=murder", "'murder' is no action; valid are kill, stop, raise, delay, flip"),
        ("decode.frame=delay", "delay takes seconds"),
        ("decode.frame=kill:3", "no other action does"),
    ],
)
def test_a_wrong_text_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(complaint)):
        failpoints.arm(text)


def test_a_process_with_a_wrong_text_ends_before_it_loads_anything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, "nowhere=kill")
    assert main(["decode"]) == 2
    assert "'nowhere' is no failpoint" in capsys.readouterr().err


async def test_nothing_happens_unarmed() -> None:
    data = block()
    reach_now(POINT)
    await reach(POINT)
    await flip(POINT, lambda: memoryview(data))
    assert data == block()


async def test_each_time_or_the_nth_time_only() -> None:
    failpoints.arm(f"{POINT}=raise@2;{OTHER}=raise")
    reach_now(POINT)
    for _ in range(2):
        with pytest.raises(InjectedFault, match=OTHER):
            await reach(OTHER)
    with pytest.raises(InjectedFault, match=POINT):
        await reach(POINT)
    await reach(POINT)


async def test_one_bit_of_one_byte_flips() -> None:
    failpoints.arm(f"{POINT}=flip")
    data = block()
    await flip(POINT, lambda: memoryview(data))
    assert sum(byte.bit_count() for byte in data) == 1
    await reach(POINT)  # has no bytes to offer


async def test_a_delay_lets_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr("asyncio.sleep", sleep)
    monkeypatch.setattr("time.sleep", lambda seconds: slept.append(-seconds))
    failpoints.arm(f"{POINT}=delay:0.25")
    await reach(POINT)
    await flip(POINT, lambda: memoryview(block()))
    reach_now(POINT)
    assert slept == [0.25, 0.25, -0.25]


async def test_a_file_may_change_while_the_process_runs(tmp_path: Path) -> None:
    path = tmp_path / "failpoints"
    failpoints.arm(f"@{path}")
    await reach(POINT)  # there is no file yet
    for text in (f"{POINT}=raise@2", f"{POINT}=raise@2 "):  # times are counted anew from each change
        new = tmp_path / "new"
        new.write_text(text)
        new.replace(path)
        await reach(POINT)
        with pytest.raises(InjectedFault):
            await reach(POINT)
    path.unlink()
    for _ in range(3):
        await reach(POINT)


def test_a_wrong_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "failpoints").write_text("decode.frame=murder")
    with pytest.raises(ConfigurationError, match="murder"):
        failpoints.arm(f"@{tmp_path / 'failpoints'}")


REACH = (
    "from kvrelay import failpoints as f; f.arm(__import__('sys').argv[1]); f.reach_now('decode.frame'); print('on')"
)


def run(text: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", REACH, text], stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_kill_is_a_kill() -> None:
    with run("decode.frame=kill") as process:
        assert process.wait(60) == -signal.SIGKILL


def test_stop_lasts_until_somebody_says_go_on() -> None:
    with run("decode.frame=stop") as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        output, _ = process.communicate(timeout=60)
        assert output == "on\n"


def test_every_point_is_somewhere_and_listed() -> None:
    rooms = ("prefill_worker", "decode_worker", "kv_transfer", "kvrelay")
    sources = [path for room in rooms for path in (ROOT / room).rglob("*.py") if path.name != "failpoints.py"]
    states = "|".join(sorted({name.partition(".")[0] for name in POINTS}))
    used = [name for path in sources for name in re.findall(rf'"((?:{states})\.[a-z_]+)"', path.read_text())]
    assert sorted(used) == sorted(POINTS)
