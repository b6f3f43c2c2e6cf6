"""The demo tells the truth: what plain Unicorn does, what the sandbox does, what hardware does."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from guests import demo
from guests.samples import PREBUILTS, build
from sandbox.errors import GuestImageError


@pytest.mark.parametrize("name", PREBUILTS)
def test_expected_output_is_what_the_source_prints_natively(name: str, tmp_path: Path) -> None:
    if platform.machine() != "x86_64" or shutil.which("gcc") is None:
        pytest.skip("needs gcc on x86-64")
    try:
        program = build(name, "x86-64", "O2", tmp_path)
    except GuestImageError as error:
        pytest.skip(str(error))
    assert subprocess.run([program], capture_output=True).stdout == demo.expected(name)


def test_demo_shows_both_failures_of_plain_unicorn_and_runs_right(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # as on a machine without a compiler
    assert demo.main() == 0
    shown = capsys.readouterr().out
    assert "gives up at 'vpbroadcastd ymm7,xmm7'" in shown
    assert "ends with status 0, no error, and wrong results" in shown
    assert shown.count("prints what hardware prints") == len(PREBUILTS)
    assert shown.count("prebuilt, for there is no gcc") == len(PREBUILTS)
    assert shown.count("handler tier") == len(PREBUILTS)
    assert "vpaddd" in shown


def test_a_wrong_result_is_said_and_makes_the_demo_fail(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(demo, "PREBUILTS", {"demo": PREBUILTS["demo"]})
    monkeypatch.setattr(demo, "expected", lambda _name: b"something else\n")
    assert demo.main() == 1
    assert "WRONG, ended with ProcessExit(status=0" in capsys.readouterr().out
