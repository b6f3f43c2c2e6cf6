"""Unicorn as an independent implementation of single 16- and 32-bit instructions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import unicorn as u
import unicorn.x86_const as x

SIZE = 0x60000
"""Bytes of memory, from address 0."""
SELECTORS = {"es": 0x2000, "cs": 0, "ss": 0x3000, "ds": 0x1000, "fs": 0x4000, "gs": 0x4800}
"""In 16-bit code; 32-bit code has flat segments."""

_NAMES = "EAX ECX EDX EBX ESP EBP ESI EDI".split()
_GPR = [getattr(x, f"UC_X86_REG_{name}") for name in _NAMES]


@dataclass(frozen=True, slots=True)
class Ran:
    """EAX ECX EDX EBX ESP EBP ESI EDI and the rest of the state after one instruction."""

    gpr: list[int]
    rflags: int
    ip: int
    memory: bytes


class UnicornCpu:
    """One engine for many runs."""

    def __init__(self, bitness: int) -> None:
        real = bitness == 16
        self._engine: Any = u.Uc(u.UC_ARCH_X86, u.UC_MODE_16 if real else u.UC_MODE_32)
        self._engine.mem_map(0, SIZE)
        self._engine.hook_add(u.UC_HOOK_INTR, self._on_exception)
        self._raised = False
        for name, selector in SELECTORS.items() if real else ():
            self._engine.reg_write(getattr(x, f"UC_X86_REG_{name.upper()}"), selector)

    def _on_exception(self, engine: Any, _vector: int, _data: object) -> None:
        self._raised = True
        engine.emu_stop()

    def run(
        self, ip: int, gpr: Sequence[int], rflags: int, memory: bytes, repeat: int = 1
    ) -> Ran | None:
        """Run what ``memory`` holds at ``ip``; None if that faults.

        ``repeat``: how often at most while it stays there (Unicorn leaves after each element).
        """
        engine = self._engine
        engine.mem_write(0, memory)
        engine.ctl_remove_cache(ip, ip + 16)  # an earlier branch may have had it translated
        for register, value in zip(_GPR, gpr, strict=False):
            engine.reg_write(register, value)
        engine.reg_write(x.UC_X86_REG_EFLAGS, rflags)
        self._raised = False
        try:
            for _ in range(repeat):
                engine.emu_start(ip, SIZE, count=1)
                if self._raised:
                    return None
                if engine.reg_read(x.UC_X86_REG_EIP) != ip:
                    break
        except u.UcError:
            return None
        registers = [engine.reg_read(register) for register in _GPR]
        flags, after = engine.reg_read(x.UC_X86_REG_EFLAGS), engine.reg_read(x.UC_X86_REG_EIP)
        return Ran(registers, flags, after, bytes(engine.mem_read(0, SIZE)))
