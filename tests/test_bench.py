"""The suites of ``sandbox bench`` run on the smallest settings and give well-formed results.

No figure is compared with a limit: times belong to the machine.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from guests.samples import PREBUILTS
from sandbox.bench import programs
from sandbox.bench.measure import Effort, Figure, Note, Result
from sandbox.bench.suites import SUITES
from sandbox.bench.table import Table, number, summary

TINY = Effort(rounds=1, scale=0.0001)


def check(results: list[Result], suite: str) -> None:
    assert results
    for result in results:
        assert result.suite == suite
        assert result.peer_name
        if isinstance(result, Note):
            assert result.text
        else:
            assert result.name
            assert result.ours > 0 and result.peer > 0
            assert 0 < result.ratio_low <= result.ratio <= result.ratio_high < math.inf
    table = Table()
    assert all(table.line(result) for result in results)


@pytest.mark.parametrize(
    ("suite", "only"),
    [("fastpath", "alu|sse"), ("fallback", ""), ("operations", "vpaddd"), ("startup", "")],
)
def test_suite(suite: str, only: str) -> None:
    effort = Effort(TINY.rounds, TINY.scale, only)
    results = list(SUITES[suite](effort))
    check(results, suite)
    assert any(isinstance(result, Figure) for result in results)


def test_suite_gives_only_what_is_asked_for() -> None:
    for suite in SUITES:
        names = {result.name for result in SUITES[suite](Effort(1, 0.0001, "nothing like this"))}
        assert names <= {""}


def test_programs_compares_output_and_time_with_every_peer_installed() -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    results = list(SUITES["programs"](Effort(1, 0.0001, "programs (hash v1|longdouble v2)$")))
    check(results, "programs")
    figures = {(result.name, result.peer_name) for result in results if isinstance(result, Figure)}
    assert ("hash v1", "unicorn") in figures
    wrong = [result for result in results if isinstance(result, Note) and result.name]
    assert {(note.name, note.text) for note in wrong} == {("longdouble v2", "wrong output")}
    assert {note.peer_name for note in wrong} == {"unicorn", "unicorn-protected"}
    assert {line.partition(":")[0] for line in summary(results)} >= {
        "programs v1 against unicorn"
    }  # fmt: skip


def test_peers_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    notes = list(SUITES["programs"](Effort(1, 0.0001, "nothing")))
    absent = {note.peer_name for note in notes if isinstance(note, Note)}
    assert programs.QEMU in absent


def test_prebuilt_programs_are_taken_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "")
    made = list(programs.make_programs(tmp_path, Effort()))
    assert [program.path for program in made] == list(PREBUILTS.values())


def test_numbers_keep_three_digits() -> None:
    assert [number(value) for value in (0.00354, 0.97, 7.0, 123.4, 12345.0)] == [
        "0.00354", "0.970", "7.00", "123", "12345"
    ]  # fmt: skip
