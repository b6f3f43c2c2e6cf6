"""FCOM, FUCOM, FICOM, FCOMI, FUCOMI, FTST, FXAM (SDM Vol. 2; Vol. 1, 8.3.6).

What an unmasked exception leaves in the condition codes differs between processors: here it is the
relation, as on AMD's; Intel's manual keeps the old ones.
"""

from __future__ import annotations

from handlers.softfloat import DE, IE
from handlers.x87_format import NANS, SIGN, Kind, kind_of, value_of
from handlers.x87_fpu import (
    C0,
    C1,
    C2,
    C3,
    CONDITIONS,
    Body,
    Fpu,
    Instruction,
    instruction,
    simple,
)
from handlers.x87_fpu import (
    SF as STACK_FAULT,
)
from handlers.x87_source import Source, bind_source
from sandbox.cpu import Cpu
from sandbox.decode import Insn
from sandbox.registers import AF, CF, OF, PF, SF, ZF

UNORDERED, LESS, EQUAL, GREATER = C3 | C2 | C0, C0, C3, 0
"""The relations of ST(0) to the operand, as condition codes."""

_FLAGS = {UNORDERED: ZF | PF | CF, LESS: CF, EQUAL: ZF, GREATER: 0}


def compare(fpu: Fpu, a: int | None, b: int | None, quiet: bool) -> tuple[int, int]:
    """The relation of two registers, None for an empty one, and the exceptions to raise.

    ``quiet`` NaNs raise nothing.
    """
    if a is None or b is None:
        return UNORDERED, IE | STACK_FAULT
    kinds = {kind_of(a), kind_of(b)}
    if Kind.UNSUPPORTED in kinds or not NANS.isdisjoint(kinds):
        raises = not quiet or Kind.UNSUPPORTED in kinds or Kind.SIGNALING in kinds
        return UNORDERED, IE if raises else 0
    x, y = _key(a), _key(b)
    flags = DE if fpu.denormal_source or Kind.DENORMAL in kinds else 0
    return EQUAL if x == y else LESS if x < y else GREATER, flags


def _key(a: int) -> tuple[int, int]:
    """Orders as numbers do: sign and exponent of the leading bit, then the significand."""
    m, e = value_of(a)
    if not m:
        return 0, 0
    # an infinity has the exponent and the significand of a number larger than all
    normal = abs(m) << 64 - abs(m).bit_length()
    exponent = e + abs(m).bit_length() + (1 << 16)
    return (-exponent, -normal) if m < 0 else (exponent, normal)


def _top(fpu: Fpu) -> int | None:
    return None if fpu.is_empty(0) else fpu.st(0)


def _bind_operand(cpu: Cpu, fpu: Fpu, insn: Insn) -> Source:
    if insn.iced.op_count:
        return bind_source(cpu, fpu, insn)
    return lambda: None if fpu.is_empty(1) else fpu.st(1)


def _set_conditions(fpu: Fpu, relation: int, flags: int) -> None:
    """C0, C2, C3 tell the relation even if an exception then ends the instruction."""
    fpu.sw = fpu.sw & ~(C0 | C2 | C3) | relation
    fpu.signal(flags)


@instruction("fcom", "fcomp", "fcompp", "fucom", "fucomp", "fucompp", "ficom", "ficomp")
def fcom(cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
    """Compare ST(0) and set C0, C2, C3."""
    source, quiet = _bind_operand(cpu, fpu, insn), insn.mnemonic.startswith("fu")
    pops = 2 if insn.mnemonic.endswith("pp") else insn.mnemonic.endswith("p")

    def body() -> None:
        b = source()
        _set_conditions(fpu, *compare(fpu, _top(fpu), b, quiet))
        for _ in range(pops):
            fpu.pop()

    return body


@instruction("fcomi", "fcomip", "fucomi", "fucomip", begin=Fpu.begin_waiting)
def fcomi(cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
    """Compare ST(0) and set ZF, PF, CF; OF, SF, AF are cleared."""
    source, quiet = bind_source(cpu, fpu, insn), insn.mnemonic.startswith("fu")
    pops = insn.mnemonic.endswith("p")

    def body() -> None:
        relation, flags = compare(fpu, _top(fpu), source(), quiet)
        if flags & STACK_FAULT:
            fpu.sw &= ~C1
        cpu.rflags = cpu.rflags & ~(CF | PF | AF | ZF | SF | OF) | _FLAGS[relation]
        fpu.signal(flags)
        if pops:
            fpu.pop()

    return body


@simple("ftst")
def ftst(fpu: Fpu) -> None:
    """Compare ST(0) with zero."""
    _set_conditions(fpu, *compare(fpu, _top(fpu), 0, quiet=False))


_CLASSES = {
    Kind.UNSUPPORTED: 0,
    Kind.QUIET: C0,
    Kind.SIGNALING: C0,
    Kind.NORMAL: C2,
    Kind.INFINITE: C2 | C0,
    Kind.ZERO: C3,
    Kind.DENORMAL: C3 | C2,
}


def _fxam(_cpu: Cpu, fpu: Fpu, _insn: Insn) -> Body:
    def body() -> None:
        a = fpu.st(0)
        found = C3 | C0 if fpu.is_empty(0) else _CLASSES[kind_of(a)]
        fpu.sw = fpu.sw & ~CONDITIONS | found | (C1 if a & SIGN else 0)

    return body


fxam = Instruction(_fxam, ("fxam",), Fpu.begin_waiting)

HANDLERS = [fcom, fcomi, ftst, fxam]
