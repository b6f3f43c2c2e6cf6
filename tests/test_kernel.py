"""The test kernel of ``guests/kernel``: it passes on both engines, and QEMU agrees."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from guests.build_kernel import PREBUILT, TOOLS, build_kernel
from tests.command import Command
from tests.kvm_guest import KVM

EXACT = ("--float-flags", "exact", "--alignment", "exact", "--timeout", 100)
PVM = Path("/sys/module/kvm_pvm").exists()
PVM_SKIPS = ("skip=split", "skip=int", "skip=syscall", "skip=window")
"""LOCAL: ``kvm_pvm`` emulates all code at CPL 0. A store across two pages writes the first before
the second faults; interrupts come late; and at CPL 3, INT n is #UD, and SYSCALL stays there."""
QEMU = "qemu-system-x86_64"
PASSED = 1
"""Status of isa-debug-exit."""


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def passes(command: Command, *arguments: object, image: Path = PREBUILT) -> list[str]:
    """Run the kernel; its verdicts. What has run once is remembered."""
    if (*arguments, image) in _SEEN:
        return _SEEN[(*arguments, image)]
    options = [a for a in arguments if not str(a).startswith("skip=")]
    skips = [a for a in arguments if str(a).startswith("skip=")]
    ended = command("run", *EXACT, *options, image, *skips)
    lines = ended.out.splitlines()
    failed = [line for line in lines if not line.startswith("PASS: ")]
    assert failed == ["SUMMARY: all passed, failures: 0x0"], ended.err
    assert ended.status == PASSED
    _SEEN[(*arguments, image)] = lines
    return lines


_SEEN: dict[tuple[object, ...], list[str]] = {}


@pytest.mark.parametrize("policy", ["verified", "kvm-emulator", "nothing"])
def test_passes_on_unicorn(policy: str, command: Command) -> None:
    lines = passes(command, *(() if policy == "verified" else ("--policy", policy)))
    assert len(lines) > 170


def test_a_lazy_policy_leaves_out_what_it_says(command: Command) -> None:
    ended = command("run", PREBUILT, "skip=alignment", "skip=flags", "skip=strict")
    assert ended.out.splitlines()[-1] == "SUMMARY: all passed, failures: 0x0"


@KVM
@pytest.mark.parametrize("irqchip", [(), ("--irqchip", "kernel")], ids=["ours", "the kernel's"])
def test_passes_on_kvm_with_the_same_output(irqchip: tuple[str, ...], command: Command) -> None:
    """With our interrupt controllers and with the kernel's."""
    skips = PVM_SKIPS if PVM else ()
    on_kvm = passes(command, "--engine", "kvm", *irqchip, *skips)
    assert on_kvm == passes(command, *skips)


@pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed")
def test_qemu_agrees(command: Command) -> None:
    """TCG does not check everything that a processor checks, hence skip=strict."""
    wanted = passes(command, "skip=strict")
    done = subprocess.run(
        [
            QEMU, "-accel", "tcg", "-cpu", "max", "-m", "128", "-display", "none", "-no-reboot",
            "-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=4",
            "-device", "pc-testdev", "-kernel", str(PREBUILT), "-append", "skip=strict",
        ],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.stdout.splitlines() == wanted, done.stderr
    assert done.returncode == PASSED


@pytest.mark.skipif(
    sys.platform != "linux" or any(shutil.which(tool) is None for tool in TOOLS),
    reason="needs gcc and objcopy",
)
def test_the_prebuilt_image_is_what_the_source_gives(tmp_path: Path, command: Command) -> None:
    build_kernel(tmp_path / "kernel.elf")
    assert passes(command, image=tmp_path / "kernel.elf") == passes(command)
