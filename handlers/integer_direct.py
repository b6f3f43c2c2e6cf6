"""Stores of whole cache lines: MOVDIR64B and AMD's CLZERO (SDM Vol. 2; APM Vol. 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from handlers.integer import general_register
from handlers.integer_wait import bind_implied_address
from sandbox.cpu import GP, Fault, bind_address
from sandbox.handler import Action, Handler
from sandbox.registers import ES, RAX

if TYPE_CHECKING:
    from sandbox.cpu import Cpu
    from sandbox.decode import Insn

LINE = 64


class MoveLine(Handler):
    """MOVDIR64B: 64 bytes to the address that the register holds, always in ES; aligned or #GP."""

    name = f"{__name__}.movdir64b"
    mnemonics = ("movdir64b",)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        read, write, source = cpu.read, cpu.write, bind_address(cpu, insn)
        offset = general_register(cpu, insn.iced.op0_register).read
        segment_base, long = cpu.registers.bank.segment_base, insn.bitness == 64

        def action() -> None:
            target = offset() if long else offset() + segment_base(ES) & 0xFFFF_FFFF
            if target % LINE:
                raise Fault(GP, 0)
            write(target, read(source(), LINE))

        return action


class ZeroLine(Handler):
    """CLZERO: the cache line around [rAX]."""

    name = f"{__name__}.clzero"
    mnemonics = ("clzero",)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        bits = {"W": 16, "D": 32, "Q": 64}[insn.form[-1]]
        address, write = bind_implied_address(cpu, insn, RAX, bits), cpu.write
        return lambda: write(address() & -LINE, bytes(LINE))


HANDLERS = [MoveLine(), ZeroLine()]
