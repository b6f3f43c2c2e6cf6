"""The status flags that the SDM (Vol. 2, each instruction) leaves undefined, by mnemonic."""

from __future__ import annotations

from collections.abc import Sequence

from iced_x86 import MemorySizeExt, OpKind

from handlers.integer import REGISTERS
from sandbox.decode import Insn
from sandbox.registers import AF, CF, OF, PF, RCX, SF, ZF

STATUS = CF | PF | AF | ZF | SF | OF

_ALWAYS = {
    AF: "and or xor test",
    AF | PF: "andn bzhi blsi blsr blsmsk",
    AF | PF | SF: "bextr",
    SF | ZF | AF | PF: "mul imul",
    STATUS: "div idiv",
    OF | SF | PF | AF: "tzcnt lzcnt bt bts btr btc",
    CF | OF | SF | PF | AF: "bsf bsr",
    OF | SF | ZF | PF: "aaa aas",
    OF: "daa das",
    OF | AF | CF: "aam aad",
}
_BY_MNEMONIC = {m: flags for flags, mnemonics in _ALWAYS.items() for m in mnemonics.split()}
_SHIFTS = frozenset("shl sal shr sar shld shrd".split())
_ROTATES = frozenset("rol ror rcl rcr".split())


def undefined_flags(insn: Insn, gpr: Sequence[int]) -> int:
    """What a comparison has to leave out, for these values of the registers."""
    if insn.mnemonic in _SHIFTS:
        return _after_shift(insn, shift_count(insn, gpr))
    if insn.mnemonic in _ROTATES:
        return OF if shift_count(insn, gpr) > 1 else 0
    return _BY_MNEMONIC.get(insn.mnemonic, 0)


def operand_bits(insn: Insn) -> int:
    """The width of the first operand."""
    if insn.iced.op0_kind == OpKind.REGISTER:
        return REGISTERS[insn.iced.op0_register][1]
    return 8 * MemorySizeExt.size(insn.iced.memory_size)


def shift_count(insn: Insn, gpr: Sequence[int]) -> int:
    """The masked count of a shift: its last operand, CL or an immediate."""
    immediate = insn.iced.op_kind(insn.iced.op_count - 1) == OpKind.IMMEDIATE8
    value = insn.iced.immediate8 if immediate else gpr[RCX]
    return value & (63 if operand_bits(insn) == 64 else 31)


def _after_shift(insn: Insn, count: int) -> int:
    if count == 0:
        return 0
    lost = count >= operand_bits(insn) and insn.mnemonic in ("shl", "sal", "shr")
    return AF | (OF if count > 1 else 0) | (CF if lost else 0)
