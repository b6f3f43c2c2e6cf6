"""The main job, shown: x86-64-v3 programs that plain Unicorn cannot run, and the sandbox can.

``python -m guests.demo`` (or ``make demo``) ends with status 0 if the sandbox printed what
hardware prints. Where gcc is installed it builds the programs; what plain Unicorn runs is always
the prebuilt program, because that comparison answers only the few system calls of musl.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from guests.bare import BareRun, run_bare
from guests.samples import PREBUILTS, build
from handlers.linux import Files, ProcessExit
from sandbox import abi
from sandbox.errors import GuestImageError
from sandbox.process import boot_process
from sandbox.run import DEFAULT_PACKS
from sandbox.stats import Stats
from sandbox.trace import summary
from sandbox.vm import Vm

LEVEL, OPTIMIZATION = "x86-64-v3", "O3"
TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class SandboxRun:
    """``left`` is what ``Vcpu.run()`` returned: for a program that ended, a ProcessExit."""

    left: object
    output: bytes
    stats: Stats


def expected(name: str) -> bytes:
    """What the program prints on hardware."""
    return PREBUILTS[name].with_name(f"{name}.out").read_bytes()


def run_sandboxed(program: Path) -> SandboxRun:
    """Run a program in the sandbox, its standard output caught in a file."""
    with (
        open(os.devnull, "r+b") as null,
        tempfile.TemporaryFile() as out,
        Vm(handlers=[*DEFAULT_PACKS, "linux"]) as vm,
    ):
        vm.enable_cap(abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE)
        vm.settings.count_lowered = True
        files = Files.standard(null.fileno(), out.fileno(), null.fileno())
        machine = boot_process(vm, program, files=files)
        left = machine.vcpu.run(TIMEOUT_SECONDS)
        out.seek(0)
        return SandboxRun(left, out.read(), machine.vcpu.stats)


def program_of(name: str, folder: str) -> tuple[Path, str]:
    """The program to run in the sandbox, and where it comes from."""
    try:
        program = build(name, LEVEL, OPTIMIZATION, folder)
    except GuestImageError:
        return PREBUILTS[name], "prebuilt, for there is no gcc with a static libc here"
    return program, f"built here: gcc -{OPTIMIZATION} -march={LEVEL} -static"


def show_bare(run: BareRun, wanted: bytes) -> Iterator[str]:
    """What plain Unicorn made of it, in words."""
    if run.status is None:
        yield f"gives up at '{run.refused}'; printed {len(run.output)} of {len(wanted)} bytes"
    elif run.output == wanted:
        yield "prints what hardware prints"
    else:
        yield f"ends with status {run.status}, no error, and wrong results:"
        got = run.output.decode(errors="replace").splitlines()
        for ours, right in zip(got, wanted.decode().splitlines(), strict=False):
            if ours != right:
                yield f"    {ours}"
                yield f"    {right}   <- hardware"


def show_sandboxed(run: SandboxRun, wanted: bytes) -> Iterator[str]:
    """What the sandbox made of it, and what ran where."""
    right = run.left == ProcessExit(0) and run.output == wanted
    yield "prints what hardware prints:" if right else f"WRONG, ended with {run.left}:"
    for line in run.output.decode(errors="replace").splitlines():
        yield f"    {line}"
    yield "what ran where:"
    for line in summary(run.stats):
        yield f"    {line}"


def show(name: str, folder: str) -> bool:
    """Run one sample both ways; whether the sandbox was right."""
    program, origin = program_of(name, folder)
    wanted = expected(name)
    print(f"{name}.c ({origin})")
    _print("plain Unicorn", show_bare(run_bare(PREBUILTS[name]), wanted))
    run = run_sandboxed(program)
    _print("the sandbox", show_sandboxed(run, wanted))
    print()
    return run.left == ProcessExit(0) and run.output == wanted


def _print(title: str, lines: Iterator[str]) -> None:
    for line in lines:
        print(f"  {title:<14} {line}", flush=True)
        title = ""


def main() -> int:
    """Show all samples; 0 if the sandbox ran every one of them right."""
    print("Programs for x86-64-v3 (AVX2, FMA, BMI), in plain Unicorn and in the sandbox\n")
    with tempfile.TemporaryDirectory() as folder:
        right = [show(name, folder) for name in PREBUILTS]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
