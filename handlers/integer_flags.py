"""Instructions on RFLAGS itself (SDM Vol. 1, 7.3.13)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from iced_x86 import Register

from handlers.flags import STATUS
from handlers.integer import general_register
from sandbox.cpu import GP, SHADOW, Fault
from sandbox.handler import Action, Handler
from sandbox.registers import CF, DF, IF, IOPL, OF

if TYPE_CHECKING:
    from sandbox.cpu import Cpu
    from sandbox.decode import Insn

_LOADED = STATUS & ~OF


def may_change_interrupts(cpu: Cpu, flags: int) -> bool:
    """Whether CPL <= IOPL; so always at level 0 and in real mode (SDM Vol. 1, 19.5.1)."""
    return cpu.cpl <= (flags & IOPL) >> 12


class ChangeFlags(Handler):
    """RFLAGS = change(RFLAGS)."""

    restartable = True

    def __init__(self, mnemonic: str, change: Callable[[int], int]) -> None:
        self.name = f"{__name__}.{mnemonic}"
        self.mnemonics = (mnemonic,)
        self.change = change

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        bank, change = cpu.registers.bank, self.change
        return lambda: bank.write("rflags", change(bank.read("rflags")))


class ChangeInterruptFlag(Handler):
    """CLI and STI: #GP(0) above IOPL. Virtual interrupts (VME, PVI) are not modelled."""

    restartable = True

    def __init__(self, mnemonic: str, value: int) -> None:
        self.name = f"{__name__}.{mnemonic}"
        self.mnemonics = (mnemonic,)
        self.value = value

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        bank, value, services = cpu.registers.bank, self.value, cpu.services

        def action() -> None:
            flags = bank.read("rflags")
            if not may_change_interrupts(cpu, flags):
                raise Fault(GP, 0)
            bank.write("rflags", flags & ~IF | value)
            if value & ~flags & IF:
                services[SHADOW] = cpu.rip + insn.length

        return action


class FlagsInAccumulator(Handler):
    """LAHF, SAHF and the undocumented SALC."""

    name = f"{__name__}.lahf"
    mnemonics = ("lahf", "sahf", "salc")
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        high, low = general_register(cpu, Register.AH), general_register(cpu, Register.AL)
        read_ah, write_ah, write_al, bank = high.read, high.write, low.write, cpu.registers.bank

        def lahf() -> None:
            write_ah(bank.read("rflags") & _LOADED | 2)

        def sahf() -> None:
            bank.write("rflags", bank.read("rflags") & ~_LOADED | read_ah() & _LOADED)

        def salc() -> None:
            write_al(0xFF if bank.read("rflags") & CF else 0)

        return {"lahf": lahf, "sahf": sahf, "salc": salc}[insn.mnemonic]


HANDLERS = [
    ChangeFlags("clc", lambda flags: flags & ~CF),
    ChangeFlags("stc", lambda flags: flags | CF),
    ChangeFlags("cmc", lambda flags: flags ^ CF),
    ChangeFlags("cld", lambda flags: flags & ~DF),
    ChangeFlags("std", lambda flags: flags | DF),
    ChangeInterruptFlag("cli", 0),
    ChangeInterruptFlag("sti", IF),
    FlagsInAccumulator(),
]
