"""The sample programs, run in the sandbox, print exactly what they print natively.

By default each sample runs once, built for x86-64-v3 at -O3, and some with -ffast-math as well;
``python -m tests.test_programs`` runs all samples at every level, optimization and compiler, with
and without -ffast-math, under the policy given (a few minutes).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.samples import FAST_MATH, LEVELS, OPTIMIZATIONS, PREBUILTS, SAMPLES, Run, build
from tests.test_guests_c import execute, native_levels, static_libc

HERE = Path(__file__).resolve().parent.parent


def sandboxed(program: Path, run: Run, *options: str) -> tuple[int, bytes, bytes]:
    """Exit status, standard output and error of ``sandbox run``."""
    variables = [part for n, v in run.env.items() for part in ("--env", f"{n}={v}")]
    command = [sys.executable, "-m", "sandbox", "run", *options, *variables]
    done = subprocess.run(
        [*command, str(program), *run.args],
        input=run.stdin,
        capture_output=True,
        timeout=1800,
        cwd=HERE,
    )
    return done.returncode, done.stdout, done.stderr.replace(os.fsencode(program), b"")


def check(program: Path, run: Run, *options: str) -> None:
    assert sandboxed(program, run, *options) == execute(program, run)


needs_v3 = pytest.mark.skipif(
    "x86-64-v3" not in native_levels(), reason="this CPU cannot run x86-64-v3 to compare with"
)


@needs_v3
@pytest.mark.parametrize("name", SAMPLES)
def test_sample_built_for_v3_prints_what_it_prints_natively(name: str, tmp_path: Path) -> None:
    if not static_libc("gcc"):
        pytest.skip("gcc is not installed, or has no static libc")
    program = build(name, "x86-64-v3", "O3", tmp_path)
    for run in SAMPLES[name]:
        check(program, run)


@needs_v3
@pytest.mark.parametrize("name", ["decay", "dot", "nbody", "sort"])
def test_sample_with_fast_math_prints_what_it_prints_natively(name: str, tmp_path: Path) -> None:
    """Its startup code sets FTZ and DAZ, so that no float form is left on the fast path."""
    if not static_libc("gcc"):
        pytest.skip("gcc is not installed, or has no static libc")
    program = build(name, "x86-64-v3", "O3", tmp_path, options=(FAST_MATH,))
    for run in SAMPLES[name]:
        check(program, run)


@needs_v3
def test_the_sample_of_decay_shows_whether_denormals_count(tmp_path: Path) -> None:
    if not static_libc("gcc"):
        pytest.skip("gcc is not installed, or has no static libc")
    programs = [build("decay", "x86-64-v3", "O3", tmp_path, options=o) for o in ((), (FAST_MATH,))]
    outputs = [sandboxed(program, Run())[1] for program in programs]
    assert [output.split()[-1] for output in outputs] == [b"1", b"0"]


@pytest.mark.parametrize("level", LEVELS[:2])
def test_string_sample_prints_the_same_at_lower_levels(level: str, tmp_path: Path) -> None:
    """At these levels no AVX is compiled in, but glibc's own dispatch takes its AVX2 paths."""
    if not static_libc("gcc"):
        pytest.skip("gcc is not installed, or has no static libc")
    if level not in native_levels():
        pytest.skip(f"this CPU cannot run {level} to compare with")
    check(build("strings", level, "O2", tmp_path), Run())


@needs_v3
@pytest.mark.parametrize("name", PREBUILTS)
def test_prebuilt_program_prints_what_it_prints_natively(name: str) -> None:
    check(PREBUILTS[name], Run())


def programs(folder: Path) -> Iterator[tuple[str, Path]]:
    for name, path in PREBUILTS.items():
        yield name, Path(shutil.copy(path, folder))
    for compiler in ("gcc", "musl-gcc"):
        if not static_libc(compiler):
            continue
        for name in SAMPLES:
            for level in native_levels():
                for opt in OPTIMIZATIONS:
                    yield name, build(name, level, opt, folder, compiler)
                yield name, build(name, level, "O3", folder, compiler, (FAST_MATH,))


def campaign(options: list[str]) -> int:
    """Everything, with ``options`` for ``sandbox run``; the number of failures."""
    failed = total = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, program in programs(Path(folder)):
            for run in SAMPLES[name]:
                same = sandboxed(program, run, *options) == execute(program, run)
                total += 1
                failed += not same
                print("ok  " if same else "FAIL", program.name, *run.args, flush=True)
    print(f"{total - failed} passed, {failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(bool(campaign(sys.argv[1:])))
