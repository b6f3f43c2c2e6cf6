"""The C samples print the same on this CPU at every level, and the prebuilt guest is the demo."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from guests.bare import run_bare
from guests.samples import LEVELS, OPTIMIZATIONS, PREBUILTS, SAMPLES, SOURCES, Run, build, main
from sandbox.errors import GuestImageError

V2 = {"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"}
NEEDS = {
    "x86-64": set(),
    "x86-64-v2": V2,
    "x86-64-v3": V2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"},
}
"""Flags in /proc/cpuinfo that a level needs (x86-64 psABI, 3.1.1)."""


def cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def native_levels() -> list[str]:
    if platform.machine() != "x86_64":
        return []
    return [level for level in LEVELS if cpu_flags() >= NEEDS[level]]


def static_libc(compiler: str) -> bool:
    """Whether the compiler is installed and links static programs."""
    if shutil.which(compiler) is None:
        return False
    command = [compiler, "-static", "-o", os.devnull, "-x", "c", "-"]
    return not subprocess.run(command, input=b"int main(void){}", capture_output=True).returncode


def execute(program: Path, run: Run) -> tuple[int, bytes, bytes]:
    done = subprocess.run(
        [program, *run.args], input=run.stdin, env=run.env, capture_output=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr.replace(os.fsencode(program), b"")


@pytest.mark.parametrize("compiler", ["gcc", "musl-gcc"])
@pytest.mark.parametrize("name", SAMPLES)
def test_sample_prints_the_same_at_every_level(name: str, compiler: str, tmp_path: Path) -> None:
    if not static_libc(compiler):
        pytest.skip(f"{compiler} is not installed, or has no static libc")
    levels = native_levels()
    if not levels:
        pytest.skip("this CPU does not run x86-64 programs")
    optimizations = OPTIMIZATIONS if compiler == "gcc" else ("O3",)
    programs = [build(name, lv, opt, tmp_path, compiler) for lv in levels for opt in optimizations]
    for run in SAMPLES[name]:
        results = {execute(program, run) for program in programs}
        assert len(results) == 1
        status, stdout, stderr = results.pop()
        assert status == run.status
        assert stdout or stderr


def test_sha256_sample_gives_the_published_digests(tmp_path: Path) -> None:
    if not static_libc("gcc") or not native_levels():
        pytest.skip("needs gcc with a static libc on x86-64")
    _, output, _ = execute(build("sha256", "x86-64", "O2", tmp_path), Run())
    assert b"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" in output
    assert b"ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" in output


@pytest.mark.parametrize("name", PREBUILTS)
def test_prebuilt_guest_prints_what_its_source_prints(name: str, tmp_path: Path) -> None:
    if not static_libc("gcc") or "x86-64-v3" not in native_levels():
        pytest.skip("needs gcc with a static libc on an x86-64-v3 CPU")
    program = shutil.copy(PREBUILTS[name], tmp_path / name)
    os.chmod(program, 0o755)
    built = build(name, "x86-64", "O2", tmp_path)
    assert execute(Path(program), Run()) == execute(built, Run())


def test_bare_unicorn_refuses_the_demo() -> None:
    result = run_bare(PREBUILTS["demo"])
    assert result.status is None
    assert result.refused.startswith("vpbroadcastd ymm")


def test_bare_unicorn_sorts_wrongly_without_a_word() -> None:
    result = run_bare(PREBUILTS["sort"])
    assert result.status == 0
    assert b"doubles a85edcb4c35f6257 -2096419.208..2096879.250\n" in result.output
    # The CPU prints:  doubles a85edcb4c35f6257 -2096419.207..2096879.211


def test_every_source_is_a_listed_sample() -> None:
    assert {path.stem for path in SOURCES.glob("*.c")} == set(SAMPLES)


def test_missing_compiler_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(GuestImageError, match=r"'no-such-cc' not found; install it .*prebuilt"):
        build("dot", "x86-64", "O2", tmp_path, "no-such-cc")


def test_unknown_sample_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(GuestImageError, match=r"no sample 'dott'; there are: decay, demo, "):
        build("dott", "x86-64", "O2", tmp_path)


def test_unknown_level_shows_the_compilers_reason(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    with pytest.raises(GuestImageError, match="x86-64-v9"):
        build("dot", "x86-64-v9", "O2", tmp_path)


def test_command_line_reports_errors_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["/dev/null/x", "no-such-cc"]) == 1
    assert "no-such-cc" in capsys.readouterr().err


def test_output_directory_that_cannot_be_made_is_named() -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    with pytest.raises(GuestImageError, match="cannot build into /dev/null/x: Not a directory"):
        build("dot", "x86-64", "O2", "/dev/null/x")
