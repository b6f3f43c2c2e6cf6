"""Exchanges (SDM Vol. 1, 7.3.1.2): XCHG, XADD, CMPXCHG, CMPXCHG8B, CMPXCHG16B.

A memory destination is written in every case, also when a comparison fails (SDM Vol. 2, CMPXCHG).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import MemorySizeExt, OpKind, Register

from handlers.flags import MASK, STATUS
from handlers.integer import bind_operands, general_register
from handlers.integer_arithmetic import add, sub
from sandbox.cpu import GP, Fault, bind_address
from sandbox.handler import Action, Handler
from sandbox.registers import RAX, RBX, RCX, RDX, ZF

if TYPE_CHECKING:
    from sandbox.cpu import Cpu
    from sandbox.decode import Insn

_ACCUMULATOR = {8: Register.AL, 16: Register.AX, 32: Register.EAX, 64: Register.RAX}


class Xchg(Handler):
    name = f"{__name__}.xchg"
    mnemonics = ("xchg",)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        bound = bind_operands(cpu, insn, 2)
        if bound is None:
            return None
        first, second = bound
        if insn.iced.op1_kind == OpKind.MEMORY:  # memory is to be written first
            first, second = second, first

        def action() -> None:
            old, new = first.modify(), second.read()
            first.write(new)
            second.write(old)

        return action


class Xadd(Handler):
    name = f"{__name__}.xadd"
    mnemonics = ("xadd",)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        bound = bind_operands(cpu, insn, 2)
        if bound is None:
            return None
        target, source = bound
        bits, bank = target.bits, cpu.registers.bank
        aliased = insn.iced.op0_kind == OpKind.REGISTER

        def action() -> None:
            old, addend = target.modify(), source.read()
            total, flags = add(bits, old, addend)
            if aliased:  # of one register twice the sum stays
                source.write(old)
            target.write(total)
            if not aliased:
                source.write(old)
            bank.write("rflags", bank.read("rflags") & ~STATUS | flags)

        return action


class Cmpxchg(Handler):
    name = f"{__name__}.cmpxchg"
    mnemonics = ("cmpxchg",)
    restartable = True

    def on_host(self, insn: Insn) -> bool:
        return True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        bound = bind_operands(cpu, insn, 2)
        if bound is None:
            return None
        target, source = bound
        bits, bank = target.bits, cpu.registers.bank
        expected = general_register(cpu, _ACCUMULATOR[bits])
        in_memory = insn.iced.op0_kind == OpKind.MEMORY

        def action() -> None:
            old = target.modify()
            difference, flags = sub(bits, expected.read(), old)
            if not difference:
                target.write(source.read())
            elif in_memory:
                target.write(old)
            if difference:
                expected.write(old)
            bank.write("rflags", bank.read("rflags") & ~STATUS | flags)

        return action


class CmpxchgPair(Handler):
    """CMPXCHG8B and CMPXCHG16B, which wants its memory aligned: else #GP(0)."""

    name = f"{__name__}.cmpxchg_pair"
    mnemonics = ("cmpxchg8b", "cmpxchg16b")
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        size = MemorySizeExt.size(insn.iced.memory_size)
        bits, bank, gpr = 4 * size, cpu.registers.bank, cpu.gpr
        half, address = MASK[bits], bind_address(cpu, insn)

        def action() -> None:
            at = address()
            if size == 16 and at & 15:
                raise Fault(GP, 0)
            cpu.check_write(at, size)
            old = cpu.read_int(at, size)
            flags = bank.read("rflags")
            if old == (gpr[RDX] & half) << bits | gpr[RAX] & half:
                cpu.write_int(at, (gpr[RCX] & half) << bits | gpr[RBX] & half, size)
                bank.write("rflags", flags | ZF)
            else:
                cpu.write_int(at, old, size)
                gpr[RAX], gpr[RDX] = old & half, old >> bits
                bank.write("rflags", flags & ~ZF)

        return action


HANDLERS = [Xchg(), Xadd(), Cmpxchg(), CmpxchgPair()]
