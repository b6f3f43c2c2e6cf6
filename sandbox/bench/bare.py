"""The peer: Unicorn through its own Python binding, as its users drive it."""

from __future__ import annotations

import time
from typing import Any

from unicorn import UC_ARCH_X86, UC_HOOK_INSN_INVALID, UC_MODE_64, Uc
from unicorn.x86_const import UC_X86_REG_RIP, UC_X86_REG_RSP

from sandbox.bench.loops import SCRATCH

BASE = 0x1000
STACK_TOP = 0x80_0000
RAM = 0x100_0000


def _load(code: bytes) -> Any:
    uc = Uc(UC_ARCH_X86, UC_MODE_64)
    uc.mem_map(0, RAM)
    uc.mem_write(BASE, code)
    uc.reg_write(UC_X86_REG_RSP, STACK_TOP)
    assert SCRATCH + (1 << 20) < STACK_TOP
    return uc


def seconds(code: bytes) -> float:
    """Time to run ``code``, which ends in HLT."""
    uc = _load(code)
    start = time.perf_counter()
    uc.emu_start(BASE, BASE + len(code) - 1)
    return time.perf_counter() - start


def fallback_seconds(code: bytes, length: int) -> float:
    """The same where an invalid instruction of ``length`` bytes is skipped by a hook that reads
    and writes RIP."""
    uc = _load(code)

    def skip(uc: Any, _data: object) -> bool:
        uc.reg_write(UC_X86_REG_RIP, uc.reg_read(UC_X86_REG_RIP) + length)
        return True

    uc.hook_add(UC_HOOK_INSN_INVALID, skip)
    start = time.perf_counter()
    uc.emu_start(BASE, BASE + len(code) - 1)
    return time.perf_counter() - start
