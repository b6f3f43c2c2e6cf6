"""The system call table: one declaration per call, and what the ``syscall`` instruction does.

A call is declared with its number, its name and the kinds of its arguments::

    @syscall(3, "close", "int")
    def close(process, fd): ...

It returns its result; an ``OSError`` becomes ``-errno``, a guest pointer that faults ``-EFAULT``.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, NamedTuple

from handlers.linux.names import syscall_name
from handlers.linux.outcome import Again, Leave
from handlers.linux.process import Process
from sandbox.cpu import Cpu, Fault
from sandbox.decode import Insn
from sandbox.handler import Decline, Exit, Resume, Verdict, handler
from sandbox.registers import RAX, RCX, RDI, RDX, RSI

R8, R9, R10, R11 = 8, 9, 10, 11
ARGUMENTS = (RDI, RSI, RDX, R10, R8, R9)
"""Where the arguments stand (System V ABI for x86-64, A.2.1)."""

PATH_MAX = 4096


def _int(_process: Process, raw: int) -> int:
    return (raw & 0x7FFF_FFFF) - (raw & 0x8000_0000)


def _uint(_process: Process, raw: int) -> int:
    return raw & 0xFFFF_FFFF


def _long(_process: Process, raw: int) -> int:
    return (raw & 0x7FFF_FFFF_FFFF_FFFF) - (raw & 0x8000_0000_0000_0000)


def _unsigned_long(_process: Process, raw: int) -> int:
    return raw


def _path(process: Process, raw: int) -> bytes:
    return process.read_string(raw, PATH_MAX)


KINDS: dict[str, Callable[[Process, int], Any]] = {
    "int": _int,
    "uint": _uint,
    "long": _long,
    "size": _unsigned_long,
    "address": _unsigned_long,
    "path": _path,
}
"""Argument kinds by their C meaning; ``path`` is the string a pointer points to, as bytes."""


class Syscall(NamedTuple):
    """One declared system call."""

    name: str
    arguments: tuple[tuple[int, Callable[[Process, int], Any]], ...]
    function: Callable[..., int]


SYSCALLS: dict[int, Syscall] = {}
"""All declared calls by number."""


def syscall(
    number: int, name: str, kinds: str = ""
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Declare ``f(process, *arguments) -> result`` as system call ``number``."""
    arguments = tuple(
        (register, KINDS[kind]) for register, kind in zip(ARGUMENTS, kinds.split(), strict=False)
    )

    def declare(function: Callable[..., int]) -> Callable[..., int]:
        if number in SYSCALLS:
            raise ValueError(f"system call {number} ({name}) is declared twice")
        SYSCALLS[number] = Syscall(name, arguments, function)
        return function

    return declare


def call(process: Process, number: int) -> int:
    """Run system call ``number`` on the arguments in the registers; the result or ``-errno``.

    Raises :class:`Again` and :class:`Leave`.
    """
    found = SYSCALLS.get(number)
    if found is None:
        process.unknown[syscall_name(number)] += 1
        return -errno.ENOSYS
    gpr = process.cpu.gpr
    try:
        arguments = [convert(process, gpr[register]) for register, convert in found.arguments]
        result = found.function(process, *arguments)
    except Fault:
        result = -errno.EFAULT
    except OSError as failure:
        result = -(failure.errno or errno.EIO)
    process.calls[found.name] += 1
    return result


@handler("syscall")
def emulate_syscall(cpu: Cpu, insn: Insn) -> Verdict | None:
    """SYSCALL as a program sees it: RCX = next RIP, R11 = RFLAGS, RAX = result or -errno."""
    process: Process | None = cpu.services.get("linux")
    if process is None or cpu.bitness != 64:
        return Decline()
    gpr, rip = cpu.gpr, cpu.rip
    try:
        result = call(process, gpr[RAX] & 0xFFFF_FFFF)
    except Again:
        return Resume(rip)
    except Leave as leave:
        return Exit(leave.exit)
    process.waiting = None
    gpr[R11] = cpu.rflags
    gpr[RCX] = rip + insn.length & 0xFFFF_FFFF_FFFF_FFFF
    gpr[RAX] = result & 0xFFFF_FFFF_FFFF_FFFF
    return None


emulate_syscall.restartable = True  # it raises no Fault: a bad pointer is the result -EFAULT
