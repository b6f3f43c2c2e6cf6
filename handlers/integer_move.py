"""Moves, extensions and byte swaps (SDM Vol. 1, 7.3.1; MOVBE, MOVNTI, MOVDIRI)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import OpKind, Register

from handlers.integer import (
    Operation,
    bind_memory,
    bind_moved_address,
    bind_operand,
    general_register,
)
from handlers.integer_shift import signed
from sandbox.cpu import bind_address, bind_offset
from sandbox.handler import Action, Handler
from sandbox.registers import SEGMENT_NAMES

if TYPE_CHECKING:
    from sandbox.cpu import Cpu
    from sandbox.decode import Insn

SEGMENTS = {
    getattr(Register, name.upper()): (index, name) for index, name in enumerate(SEGMENT_NAMES)
}
"""iced-x86 segment register to (encoding, name)."""


def copy(_bits: int, a: int) -> int:
    return a


def swap_bytes(bits: int, a: int) -> int:
    return int.from_bytes(a.to_bytes(bits // 8, "little"), "big")


def bswap(bits: int, a: int) -> int:
    """The 16-bit form, undefined, gives 0 as CPUs do."""
    return 0 if bits == 16 else swap_bytes(bits, a)


class MoveFromSegment(Handler):
    """MOV r/m, Sreg: 16 bits to memory, zero-extended to a register."""

    name = f"{__name__}.mov_from_segment"
    mnemonics = ("mov",)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        iced = insn.iced
        if iced.op1_kind != OpKind.REGISTER or iced.op1_register not in SEGMENTS:
            return None
        target = (
            bind_memory(cpu, bind_address(cpu, insn), 2)
            if iced.op0_kind == OpKind.MEMORY
            else bind_operand(cpu, insn, 0)
        )
        if target is None:
            return None
        write, bank, name = target.write, cpu.registers.bank, SEGMENTS[iced.op1_register][1]
        return lambda: write(bank.read_segment(name).selector)


class Lea(Handler):
    """LEA: the offset alone, cut or zero-extended to the destination."""

    name = f"{__name__}.lea"
    mnemonics = ("lea",)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        target = bind_operand(cpu, insn, 0)
        if target is None:
            return None
        write, offset = target.write, bind_offset(cpu, insn)
        return lambda: write(offset())


class Xlat(Handler):
    """XLAT: AL = [(E/R)BX + AL], the sum cut to the address size."""

    name = f"{__name__}.xlat"
    mnemonics = ("xlatb",)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        low = general_register(cpu, Register.AL)
        write, load, address = low.write, cpu.read, bind_moved_address(cpu, insn, low.read)
        return lambda: write(load(address(), 1)[0])


class SignExtend(Handler):
    """CBW CWDE CDQE within the accumulator; CWD CDQ CQO into (E/R)DX."""

    restartable = True

    def __init__(self, mnemonic: str, source: str, target: str) -> None:
        self.name = f"{__name__}.{mnemonic}"
        self.mnemonics = (mnemonic,)
        self.registers = getattr(Register, source), getattr(Register, target)

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        source, target = (general_register(cpu, register) for register in self.registers)
        read, write, bits = source.read, target.write, source.bits
        if target.bits > bits:
            return lambda: write(signed(bits, read()))
        return lambda: write(signed(bits, read()) >> bits)


HANDLERS = [
    Operation("mov", "wr", copy),
    MoveFromSegment(),
    Operation("movnti", "wr", copy),
    Operation("movdiri", "wr", copy),
    Operation("movzx", "wr", copy),
    Operation("movsx", "wr", signed, measure=1),
    Operation("movsxd", "wr", signed, measure=1),
    Operation("movbe", "wr", swap_bytes),
    Operation("bswap", "m", bswap),
    Lea(),
    Xlat(),
    SignExtend("cbw", "AL", "AX"),
    SignExtend("cwde", "AX", "EAX"),
    SignExtend("cdqe", "EAX", "RAX"),
    SignExtend("cwd", "AX", "DX"),
    SignExtend("cdq", "EAX", "EDX"),
    SignExtend("cqo", "RAX", "RDX"),
]
