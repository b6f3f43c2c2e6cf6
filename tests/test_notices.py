"""What a run does not do exactly is told once: in the trace, the report and the summary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sandbox.engine.host_operands import host_features
from tests.command import Command, Ended

DIVIDE = "mov rdi, 0x8000\nmov dword ptr [rdi], 0x3f800000\nmov dword ptr [rdi + 4], 0x40400000\n"
GUESTS = {
    "MXCSR": "movss xmm0, [rdi]\ndivss xmm0, [rdi + 4]\nstmxcsr [rdi + 8]\nstmxcsr [rdi + 8]",
    "MXCSR after lowered code": "vdivps ymm1, ymm2, ymm3\nvstmxcsr [rdi + 8]",
    "the x87 status word": "fld dword ptr [rdi]\nfdiv dword ptr [rdi + 4]\n"
    "fnstsw ax\nand eax, 0x3d\nfnstenv [rdi + 64]\nfxsave [rdi + 128]",
}
READERS = {"MXCSR": "stmxcsr", "MXCSR after lowered code": "vstmxcsr",
           "the x87 status word": "fnstsw"}  # fmt: skip


@pytest.fixture
def sandbox(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def run(sandbox: Command, folder: Path, what: str, *options: str) -> tuple[Ended, list[object]]:
    guest, report = folder / "guest.asm", folder / "report.json"
    guest.write_text(DIVIDE + GUESTS[what] + "\nhlt\n")
    ended = sandbox("run", "--report", report, *options, guest)
    assert ended.status == 0, ended.err
    return ended, json.loads(report.read_text())["notices"]


@pytest.mark.parametrize("what", GUESTS)
def test_flags_that_were_not_tracked_are_told_once_everywhere(
    what: str, sandbox: Command, tmp_path: Path
) -> None:
    ended, notices = run(sandbox, tmp_path, what, "--trace", "--no-host")
    (notice,) = notices
    assert isinstance(notice, dict)
    text = f"notice: {notice['rip']}: {notice['text']}"
    assert what.split(" after")[0] in text and 'float_flags = "exact"' in text
    lines = ended.err.splitlines()
    first, last = (n for n, line in enumerate(lines) if line == text)
    reader = next(n for n, line in enumerate(lines) if READERS[what] in line)
    assert reader < first == reader + 1, "in the trace, behind the instruction that reads"
    assert lines[first:last], "and in the summary"


@pytest.mark.skipif(not host_features() >= {"avx2"}, reason="the host's CPU has no AVX2")
def test_the_hosts_cpu_leaves_no_flag_out(sandbox: Command, tmp_path: Path) -> None:
    assert run(sandbox, tmp_path, "MXCSR after lowered code")[1] == []


@pytest.mark.parametrize("what", GUESTS)
def test_nothing_is_told_where_the_flags_are_exact(
    what: str, sandbox: Command, tmp_path: Path
) -> None:
    ended, notices = run(sandbox, tmp_path, what, "--trace", "--float-flags", "exact")
    assert notices == [] and "notice" not in ended.err
