"""The peer: loops in Unicorn through its own Python binding, as its users drive it.

Times are CPU time of the process: on a busy machine wall time would measure the neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from capstone import CS_ARCH_X86, CS_MODE_64, Cs
from unicorn import (
    UC_ARCH_X86,
    UC_HOOK_CODE,
    UC_HOOK_INSN_INVALID,
    UC_MODE_64,
    UC_PROT_ALL,
    UC_PROT_EXEC,
    UC_PROT_READ,
    UC_PROT_WRITE,
    Uc,
)
from unicorn.x86_const import (
    UC_X86_REG_RIP,
    UC_X86_REG_RSP,
    UC_X86_REG_YMM1,
    UC_X86_REG_YMM2,
    UC_X86_REG_YMM3,
)

BASE = 0x1000
STACK_TOP = 0x80_0000
RAM = 64 << 20
_PAGE = 4096
_NOWHERE = 0
"""Address at which a run would end; HLT ends it before."""
Prepare = Callable[[Any], None]


def make(code: bytes, *, protect: bool = False) -> Any:
    """Unicorn with ``code`` loaded. Memory has the binding's default protection, all of it
    executable; with ``protect`` only the pages of the code are, and they cannot be written."""
    uc = Uc(UC_ARCH_X86, UC_MODE_64)
    uc.mem_map(0, RAM, UC_PROT_READ | UC_PROT_WRITE if protect else UC_PROT_ALL)
    uc.mem_write(BASE, code)
    if protect:
        size = (len(code) + _PAGE - 1) & -_PAGE
        uc.mem_protect(BASE, size, UC_PROT_READ | UC_PROT_EXEC)
    uc.reg_write(UC_X86_REG_RSP, STACK_TOP)
    return uc


def run(code: bytes, *, protect: bool = False) -> float:
    """CPU seconds of the first run of ``code``, which ends in HLT."""
    uc = make(code, protect=protect)
    start = time.process_time()
    uc.emu_start(BASE, _NOWHERE)
    return time.process_time() - start


def rerun(code: bytes, prepare: Prepare | None = None, *, protect: bool = False) -> float:
    """CPU seconds from the first HLT of ``code`` to the second. ``prepare`` may add hooks."""
    uc = make(code, protect=protect)
    if prepare is not None:
        prepare(uc)
    uc.emu_start(BASE, _NOWHERE)
    rip = uc.reg_read(UC_X86_REG_RIP)
    start = time.process_time()
    uc.emu_start(rip, _NOWHERE)
    return time.process_time() - start


def per_instruction(uc: Any) -> None:
    """Call a Python function that does nothing before each instruction."""

    def look(_uc: Any, _address: int, _size: int, _data: object) -> None:
        pass

    uc.hook_add(UC_HOOK_CODE, look)


def skip(length: int) -> Prepare:
    """An invalid instruction of ``length`` bytes is skipped: RIP is read and written, no more."""

    def prepare(uc: Any) -> None:
        def skip_it(uc: Any, _data: object) -> bool:
            uc.reg_write(UC_X86_REG_RIP, uc.reg_read(UC_X86_REG_RIP) + length)
            return True

        uc.hook_add(UC_HOOK_INSN_INVALID, skip_it)

    return prepare


def _add_dwords(a: int, b: int) -> int:
    """The sum of two 256-bit integers by lanes of 32 bits."""
    high = int.from_bytes(b"\0\0\0\x80" * 8, "little")
    return ((a & ~high) + (b & ~high)) ^ ((a ^ b) & high)


def emulate_known(uc: Any) -> None:
    """VPADDD ymm1, ymm2, ymm3 written into the hook: nothing is fetched or decoded."""

    def emulate(uc: Any, _data: object) -> bool:
        first, second = uc.reg_read(UC_X86_REG_YMM2), uc.reg_read(UC_X86_REG_YMM3)
        uc.reg_write(UC_X86_REG_YMM1, _add_dwords(first, second))
        uc.reg_write(UC_X86_REG_RIP, uc.reg_read(UC_X86_REG_RIP) + 4)
        return True

    uc.hook_add(UC_HOOK_INSN_INVALID, emulate)


def emulate_decoded(uc: Any) -> None:
    """The usual script: fetch, disassemble, choose by mnemonic, read operands, write the result."""
    decoder = Cs(CS_ARCH_X86, CS_MODE_64)
    decoder.detail = True
    numbers = {
        "ymm1": UC_X86_REG_YMM1, "ymm2": UC_X86_REG_YMM2, "ymm3": UC_X86_REG_YMM3,
    }  # fmt: skip

    def emulate(uc: Any, _data: object) -> bool:
        rip = uc.reg_read(UC_X86_REG_RIP)
        insn = next(decoder.disasm(bytes(uc.mem_read(rip, 15)), rip, 1))
        if insn.mnemonic != "vpaddd":
            return False
        target, first, second = (numbers[insn.reg_name(operand.reg)] for operand in insn.operands)
        uc.reg_write(target, _add_dwords(uc.reg_read(first), uc.reg_read(second)))
        uc.reg_write(UC_X86_REG_RIP, rip + insn.size)
        return True

    uc.hook_add(UC_HOOK_INSN_INVALID, emulate)
