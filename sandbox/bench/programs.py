"""Suite ``programs``: whole runs of the sample C programs, built for x86-64-v1, -v2 and -v3.

Each program is repeated within one process until it is worth timing. Times are CPU time, user and
system: of the whole process for native and qemu-user, of loading and running the program for the
emulators driven from Python (:mod:`sandbox.bench.child`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import sandbox
from guests.samples import LEVELS, PREBUILTS, SAMPLES, SOURCES
from sandbox.bench.child import EMULATORS
from sandbox.bench.measure import Effort, Note, Result, figure, progress
from sandbox.errors import GuestImageError

SUITE = "programs"
OURS = "sandbox"
ROUNDS = 2
LIMIT_SECONDS = 180
"""A run that takes longer is given up."""
LONG_SECONDS = 60
"""Where one round takes longer, it is the only one."""
REPEAT = {
    "decay": 6000,
    "demo": 1000, "dot": 1200, "hash": 3500, "json": 240, "longdouble": 800, "matmul": 120,
    "nbody": 4500, "sha256": 1500, "sort": 120, "strings": 80,
}  # fmt: skip
"""Repetitions that take qemu-user 0.4 to 0.8 s; others 50."""
_WORDS = b"Two tiers, one contract.\n\nThe fast path runs what it may;\tthe handlers the rest.\n"
INPUT = {"wc": (("-u", "the", "tier"), _WORDS * 24000)}
"""Arguments and standard input of programs that read; their input is what is repeated."""

QEMU = "qemu-x86_64"
_PACKAGE = {"bochs": "bochscpu-python", "unicorn": "unicorn"}


@dataclass(frozen=True, slots=True)
class Program:
    """An executable with what it is run with."""

    name: str
    level: str
    path: Path
    repeat: int
    arguments: tuple[str, ...] = ()
    stdin: bytes = b""


@dataclass(frozen=True, slots=True)
class Timed:
    """One run. ``trouble`` says why it does not count."""

    seconds: float
    output: bytes
    status: int | None
    trouble: str = ""


def programs(effort: Effort) -> Iterator[Result]:
    """Every program at every level, ours against each peer that is installed."""
    peers = []
    for peer in ("native", QEMU, "bochs", "unicorn"):
        if reason := missing(peer):
            yield Note(SUITE, "", peer, reason)
        else:
            peers.append(peer)
    with tempfile.TemporaryDirectory() as folder:
        for program in make_programs(Path(folder), effort):
            yield from _compare(program, peers, effort, Path(folder))


def missing(peer: str) -> str:
    """Why ``peer`` is left out; empty if it is there."""
    if peer == QEMU:
        found = shutil.which(QEMU)
        return "" if found else f"left out: {QEMU} is not installed (Debian: apt install qemu-user)"
    if peer in _PACKAGE:
        try:
            version(_PACKAGE[peer])
        except PackageNotFoundError:
            return f"left out: {_PACKAGE[peer]} is not installed (pip install {_PACKAGE[peer]})"
    return ""


def versions() -> dict[str, str]:
    """Versions of the sandbox and of what is measured beside it, as far as installed."""
    found = {}
    for package in ("unicorn-fallback", *sorted(_PACKAGE.values())):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    for command in (QEMU, "gcc"):
        if shutil.which(command):
            shown = subprocess.run([command, "--version"], capture_output=True, text=True)
            numbers = re.findall(r"\d+(?:\.\d+)+", shown.stdout)
            found[command] = numbers[0] if numbers else "unknown"
    return found


def make_programs(folder: Path, effort: Effort) -> Iterator[Program]:
    """The programs asked for, built into ``folder``; without a compiler the prebuilt ones."""
    compiler = shutil.which("gcc")
    for name in SAMPLES:
        for level in LEVELS:
            short = level.removeprefix("x86-64-") if "-v" in level else "v1"
            if not effort.wants(SUITE, f"{name} {short}"):
                continue
            arguments, stdin = INPUT.get(name, ((), b""))
            if compiler:
                repeat = 1 if stdin else effort.count(REPEAT.get(name, 50))
                lines = stdin[: effort.count(len(stdin))]
                path = _build(compiler, name, level, folder)
                yield Program(name, short, path, repeat, arguments, lines)
            elif short == "v3" and name in PREBUILTS:
                yield Program(name, short, PREBUILTS[name], 1)


def _build(compiler: str, name: str, level: str, folder: Path) -> Path:
    """Compile a sample with its main renamed, and the driver that repeats it."""
    sample, target = folder / f"{name}.o", folder / f"{name}-{level}"
    driver = Path(__file__).with_name("repeat.c")
    options = [compiler, "-O3", f"-march={level}"]
    for arguments in (
        ["-Dmain=sample_main", "-c", "-o", str(sample), str(SOURCES / f"{name}.c")],
        ["-static", "-o", str(target), str(driver), str(sample), "-lm"],
    ):
        command = [*options, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if line), "no message")
            raise GuestImageError(f"{' '.join(command)} failed: {reason}")
    return target


def _compare(program: Program, peers: list[str], effort: Effort, folder: Path) -> Iterator[Result]:
    """The first round says which runners get through; these run in turn in the others."""
    name = f"{program.name} {program.level}"
    start = time.monotonic()
    first = _round([OURS, *peers], program, folder, "first round")
    long = time.monotonic() - start > LONG_SECONDS
    fit = [runner for runner in first if not _trouble(runner, first)]
    rounds = [first]
    count = effort.rounds or ROUNDS
    for number in range(2, count + 1 if not long else 2):
        rounds.append(_round(fit, program, folder, f"round {number} of {count}"))
    failed = {
        runner: trouble for runs in rounds for runner in runs if (trouble := _trouble(runner, runs))
    }
    for runner in first:
        if runner in failed:
            yield Note(SUITE, name, runner, failed[runner], program.level)
        elif runner != OURS and OURS not in failed:
            pairs = [(runs[OURS].seconds, runs[runner].seconds) for runs in rounds]
            yield figure(SUITE, name, "ms", 1e3, pairs, runner, program.level)


def _round(runners: list[str], program: Program, folder: Path, text: str) -> dict[str, Timed]:
    runs = {}
    for runner in runners:
        progress(f"{SUITE} {program.name} {program.level}, {text}: {runner}")
        runs[runner] = run_once(runner, program, folder)
    return runs


def _trouble(runner: str, runs: dict[str, Timed]) -> str:
    """Why a run does not count: its own reason, or a result other than the host's or qemu's."""
    run = runs[runner]
    if run.trouble:
        return run.trouble
    for reference in ("native", QEMU, OURS):
        expected = runs.get(reference)
        if expected and not expected.trouble:
            same = (run.output, run.status) == (expected.output, expected.status)
            return "" if same else "wrong output"
    return ""


def run_once(runner: str, program: Program, folder: Path) -> Timed:
    """Run ``program`` once natively, in qemu-user or in one of the emulators."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    command = [str(program.path), *program.arguments]
    if runner == QEMU:
        command = [QEMU, "-cpu", "max", *command]
    elif runner in EMULATORS:
        command = [sys.executable, "-m", "sandbox.bench.child", runner, str(result), *command]
    seconds, output, status = _run(command, program, folder)
    if seconds is None:
        return Timed(0, b"", None, f"not finished after {LIMIT_SECONDS} s")
    if runner not in EMULATORS:
        trouble = f"ended by signal {-status}" if status < 0 else ""
        return Timed(seconds, output, status, trouble)
    if status:
        return Timed(seconds, output, None, f"the emulator ended with status {status}")
    said = json.loads(result.read_text())
    return Timed(said["seconds"], output, said["status"], said["refused"])


def _run(command: list[str], program: Program, folder: Path) -> tuple[float | None, bytes, int]:
    """CPU seconds (None if over the limit), standard output and status of a command."""
    environment = {"BENCH_REPEAT": str(program.repeat)}
    if command[0] == sys.executable:
        environment["PYTHONPATH"] = str(Path(sandbox.__file__).parents[1])
    stdin = folder / "stdin"
    stdin.write_bytes(program.stdin)
    with stdin.open("rb") as source, (folder / "stdout").open("w+b") as sink:
        process = subprocess.Popen(
            command, stdin=source, stdout=sink, stderr=subprocess.DEVNULL, env=environment
        )
        late = threading.Event()

        def give_up() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(LIMIT_SECONDS, give_up)
        timer.start()
        # Popen.wait does not tell the CPU time of this one process.
        _pid, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        if late.is_set():
            return None, b"", process.returncode
        sink.seek(0)
        return usage.ru_utime + usage.ru_stime, sink.read(), process.returncode
