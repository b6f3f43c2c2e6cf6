"""Whole programs on the machine: what they print and how they end is what happens natively."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from guests.assemble import assemble
from guests.load import load_elf
from handlers.linux import Files, ProcessExit, Root
from sandbox import abi
from sandbox.errors import GuestImageError
from sandbox.exits import EmulationFailure, Intr
from sandbox.process import boot_process
from sandbox.vm import Vm

BASE = 0x40_0000
BUSYBOX = "/bin/busybox"


def elf(source: str) -> bytes:
    """An assembly program as the smallest static executable: one segment, all rights."""
    code = assemble(source, BASE + 120)
    size = 120 + len(code)
    header = struct.pack(
        "<4s5B7x2HI3QI6H",
        *(b"\x7fELF", 2, 1, 1, 0, 0, 2, 62, 1, BASE + 120, 64, 0, 0, 64, 56, 1, 64, 0, 0),
    )
    return header + struct.pack("<2I6Q", 1, 7, 0, BASE, BASE, size, size, 4096) + code


@dataclass
class Outcome:
    """How a program ended and what it wrote to standard output."""

    left: Any
    output: bytes
    unknown: dict[str, int]


def run(
    program: str | Path,
    *arguments: str,
    root: Path | None = None,
    stdin: int | None = None,
    timeout: float = 60,
    packs: Sequence[str] = ("avx2", "linux"),
) -> Outcome:
    """Run a program; its output must fit into a pipe."""
    result, stdout = os.pipe()
    null = os.open("/dev/null", os.O_RDWR)
    allowed = Root(root) if root else None
    files = Files.standard(null if stdin is None else stdin, stdout, null, allowed)
    try:
        with Vm("baseline", list(packs)) as vm:
            vm.enable_cap(abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE)
            machine = boot_process(vm, program, [str(program), *arguments], files=files)
            left = machine.vcpu.run(timeout)
            unknown = machine.vcpu.cpu.services["linux"].unknown
    finally:
        os.close(stdout)
        os.close(null)
    with open(result, "rb") as pipe:
        return Outcome(left, pipe.read(), unknown)


def natively(*command: str, cwd: Path | None = None) -> tuple[int, bytes]:
    null = subprocess.DEVNULL
    done = subprocess.run(command, cwd=cwd, stdin=null, stderr=null, stdout=subprocess.PIPE)
    return done.returncode, done.stdout


def made(tmp_path: Path, source: str) -> Path:
    program = tmp_path / "program"
    program.write_bytes(elf(source))
    return program


WRITE_AND_EXIT = """
    mov eax, 1
    mov edi, 1
    lea rsi, [rip + text]
    mov edx, 3
    syscall
    lea rdi, [rax + 4]
    mov eax, 231
    syscall
text:
    .ascii "hi\\n"
"""


def test_a_program_of_ten_instructions(tmp_path: Path) -> None:
    outcome = run(made(tmp_path, WRITE_AND_EXIT))
    assert (outcome.left, outcome.output) == (ProcessExit(7), b"hi\n")


def test_system_calls_reach_linux_whatever_the_order_of_the_packs(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(elf("mov eax, 60\n mov edi, 7\n syscall"))
    for packs in (["linux", "system"], ["system", "linux"]):
        assert run(program, packs=packs).left == ProcessExit(7)
    assert isinstance(run(program, packs=["system"]).left, EmulationFailure)


def test_registers_of_a_new_process(tmp_path: Path) -> None:
    """All zero but RSP, which is aligned; RCX and R11 as SYSCALL leaves them."""
    source = """
        or rax, rbx
        or rax, rcx
        or rax, rdx
        or rax, rsi
        or rax, rdi
        or rax, rbp
        or rax, r8
        or rax, r15
        mov rdi, rsp
        and rdi, 15
        or rdi, rax
        mov eax, 39
        syscall
    next:
        lea rdx, [rip + next]
        sub rcx, rdx
        or rdi, rcx
        pushfq
        pop rdx
        sub r11, rdx
        or rdi, r11
        cmp rax, 1000
        setne al
        movzx eax, al
        or rdi, rax
        mov eax, 60
        syscall
    """
    assert run(made(tmp_path, source)).left == ProcessExit(0)


HELLO = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <errno.h>
static __thread int counter = 40;
int main(int argc, char **argv) {
    char *big = malloc(20 << 20);
    memset(big, 1, 20 << 20);
    big = realloc(big, 30 << 20);
    double sum = 0;
    for (int i = 0; i < 1000; i++) sum += big[i * 20000] / 3.0;
    counter += argc;
    printf("%d %s %.17g\n", counter, argv[argc - 1], sum);
    FILE *none = fopen("/etc/passwd", "r");
    printf("%s\n", none ? "open" : strerror(errno));
    fflush(stdout);
    if (argc > 2) abort();
    return counter;
}
"""


@pytest.mark.parametrize(
    "compiler", [("gcc", "-static"), ("gcc", "-static-pie"), ("musl-gcc", "-static")], ids="-".join
)
def test_c_programs_start_print_allocate_and_end(tmp_path: Path, compiler: Sequence[str]) -> None:
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no {compiler[0]} on this machine")
    (tmp_path / "hello.c").write_text(HELLO)
    program = tmp_path / "hello"
    build = [*compiler, "-O2", str(tmp_path / "hello.c"), "-o", str(program)]
    if subprocess.run(build, capture_output=True).returncode:
        pytest.skip(f"{' '.join(compiler)} cannot link here")
    expected = natively(str(program), "x")[1].replace(b"open", b"No such file or directory")
    outcome = run(program, "x")
    assert (outcome.left, outcome.output) == (ProcessExit(42), expected)
    aborted = run(program, "x", "y")
    assert aborted.left.status == 134 and aborted.left.reason == "killed by SIGABRT"


@pytest.mark.parametrize(
    "command",
    [
        ("sha256sum", "numbers"),
        ("sort", "-rn", "numbers"),
        ("awk", "{s+=$1*1.5} END {print s, s % 7; exit 4}", "numbers"),
        ("sh", "-c", "for i in 1 2 3; do echo $((i*7)); done; echo *; cd /nowhere; exit 3"),
        ("ls", "-1", "."),
        ("grep", "-n", "missing", "text"),
    ],
    ids=lambda command: command[0],
)
def test_busybox_does_what_it_does_natively(tmp_path: Path, command: tuple[str, ...]) -> None:
    try:
        load_elf(BUSYBOX)
    except GuestImageError as error:
        pytest.skip(f"no static busybox on this machine: {error}")
    (tmp_path / "numbers").write_text("\n".join(str(i * i % 997) for i in range(1000)) + "\n")
    (tmp_path / "text").write_text("one\ntwo\n")
    status, output = natively(BUSYBOX, *command, cwd=tmp_path)
    outcome = run(BUSYBOX, *command, root=tmp_path)
    assert (outcome.left, outcome.output) == (ProcessExit(status), output)
    assert not set(outcome.unknown) - {"clone", "fork", "vfork"}


@pytest.mark.parametrize("call", ["sleep", "read", "pause"])
def test_a_waiting_program_is_stopped_by_the_timeout(tmp_path: Path, call: str) -> None:
    number = {"sleep": 35, "read": 0, "pause": 34}[call]
    source = f"""
        mov eax, {number}
        lea rdi, [rip + hour]
        mov r10d, {number}
        test r10d, r10d
        jnz ready
        xor edi, edi
    ready:
        lea rsi, [rsp - 64]
        mov edx, 8
        syscall
        hlt
    hour:
        .quad 3600
        .quad 0
    """
    reader, writer = os.pipe()
    try:
        outcome = run(made(tmp_path, source), stdin=reader, timeout=0.3)
    finally:
        os.close(reader)
        os.close(writer)
    assert isinstance(outcome.left, Intr)
