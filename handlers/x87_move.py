"""Loads, stores, exchanges and constants (SDM Vol. 2; Vol. 1, 8.3.2 to 8.3.4)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from handlers import x87_series as series
from handlers.softfloat import DE, IE, OE, UE
from handlers.x87_format import (
    DEFAULT_NAN,
    ONE,
    QUIET_BIT,
    Kind,
    Rounded,
    kind_of,
    round_extended,
    round_memory,
    shrink,
)
from handlers.x87_fpu import Body, Fpu, has_memory, instruction, simple
from handlers.x87_series import BITS, UNIT, inexact
from handlers.x87_source import FORMATS, bind_source, stack_index
from sandbox.cpu import Cpu, bind_address
from sandbox.decode import Insn
from sandbox.registers import CF, PF, ZF


@instruction("fld")
def fld(cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
    """Push a register or a number from memory."""
    if insn.form == "FLD_M80FP":
        return _load_extended(cpu, fpu, insn)
    source = bind_source(cpu, fpu, insn)

    def body() -> None:
        value = source()
        if value is None:
            fpu.underflow()
        if value is None or not fpu.check_room():
            value = DEFAULT_NAN
        elif has_memory(insn):
            if kind_of(value) is Kind.SIGNALING:
                fpu.signal(IE)
                value |= QUIET_BIT
            elif fpu.denormal_source:
                fpu.signal(DE)
        fpu.push(value)

    return body


def _load_extended(cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
    """No exception but a full stack: the number is not looked at."""
    address, read_int = bind_address(cpu, insn), cpu.read_int

    def body() -> None:
        value = read_int(address(), 10)
        fpu.push(value if fpu.check_room() else DEFAULT_NAN)

    return body


@instruction("fst", "fstp")
def fst(cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
    """Store ST(0) to a register or, rounded, to memory."""
    pops = insn.mnemonic == "fstp"
    if not has_memory(insn):
        return partial(_store_register, fpu, stack_index(insn, 0), pops)
    if insn.form == "FSTP_M80FP":
        return _store_extended(cpu, fpu, insn)
    f = FORMATS[insn.form.rpartition("_")[2]]
    size, address = (f.precision + f.exponent_bits) // 8, bind_address(cpu, insn)

    def body() -> None:
        at = address()
        cpu.check_write(at, size)
        if fpu.is_empty(0):
            fpu.underflow()
            result = Rounded(f.default_nan, 0, False)
        else:
            result = shrunk(fpu.st(0))
        unstored = result.flags & (OE | UE) & ~fpu.cw
        fpu.note(unstored or result.flags)
        if unstored:
            return
        cpu.write_int(at, result.bits, size)
        if result.flags:
            fpu.rounded_up(result.up)
        if pops:
            fpu.pop()

    def shrunk(a: int) -> Rounded:
        kind = kind_of(a)
        if kind in (Kind.NORMAL, Kind.DENORMAL):
            return round_memory(f, a, fpu.cw)
        if kind in (Kind.SIGNALING, Kind.UNSUPPORTED):
            fpu.signal(IE)
        bits = f.default_nan if kind is Kind.UNSUPPORTED else shrink(f, a)
        return Rounded(bits, 0, False)

    return body


def _store_extended(cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
    """No exception but an empty stack: the number is not looked at."""
    address = bind_address(cpu, insn)

    def body() -> None:
        at = address()
        cpu.check_write(at, 10)
        if fpu.is_empty(0):
            fpu.underflow()
        cpu.write_int(at, DEFAULT_NAN if fpu.is_empty(0) else fpu.st(0), 10)
        fpu.pop()

    return body


def _store_register(fpu: Fpu, index: int, pops: bool) -> None:
    if fpu.is_empty(0):
        fpu.underflow()
        fpu.set(index, DEFAULT_NAN)
    else:
        fpu.set(index, fpu.st(0))
    if pops:
        fpu.pop()


@instruction("fxch")
def fxch(_cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
    """Exchange ST(0) and ST(i)."""
    index = stack_index(insn, 1)

    def body() -> None:
        empty = [fpu.is_empty(0), fpu.is_empty(index)]
        if any(empty):
            fpu.underflow()
        a, b = (DEFAULT_NAN if e else fpu.st(i) for e, i in zip(empty, (0, index), strict=True))
        fpu.set(0, b)
        fpu.set(index, a)

    return body


# Conditional moves: which flags, and whether one of them must be set

_CONDITIONS = {"b": CF, "e": ZF, "be": CF | ZF, "u": PF}
_MOVES = {f"fcmov{c}": (flags, True) for c, flags in _CONDITIONS.items()}
_MOVES |= {f"fcmovn{c}": (flags, False) for c, flags in _CONDITIONS.items()}


@instruction(*_MOVES, begin=Fpu.begin_waiting)
def fcmov(cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
    """Copy ST(i) to ST(0) if the condition holds. Both must be in use even if it does not."""
    flags, wanted = _MOVES[insn.mnemonic]
    index = stack_index(insn, 1)

    def body() -> None:
        if fpu.is_empty(0) or fpu.is_empty(index):
            fpu.underflow()
            fpu.set(0, DEFAULT_NAN)
        elif (cpu.rflags & flags != 0) is wanted:
            fpu.set(0, fpu.st(index))

    return body


# Constants


def _push_constant(fpu: Fpu, name: str) -> None:
    fpu.push(constant(name, fpu.cw) if fpu.check_room() else DEFAULT_NAN)


def constant(name: str, control: int) -> int:
    """A constant as rounding control has it rounded, always to the full significand."""
    if name == "fldz":
        return 0
    if name == "fld1":
        return ONE
    return round_extended(False, *inexact(_CONSTANTS[name]()), control, 64).bits


_CONSTANTS: dict[str, Callable[[], int]] = {
    "fldpi": series.pi,
    "fldln2": series.ln2,
    "fldl2e": lambda: (UNIT << BITS) // series.ln2(),
    "fldl2t": lambda: (series.ln10() << BITS) // series.ln2(),
    "fldlg2": lambda: (series.ln2() << BITS) // series.ln10(),
}


@instruction("fld1", "fldz", "fldpi", "fldl2e", "fldl2t", "fldlg2", "fldln2")
def fld_constant(_cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
    """Push a constant."""
    return partial(_push_constant, fpu, insn.mnemonic)


# The stack alone


@simple("fincstp")
def fincstp(fpu: Fpu) -> None:
    """Turn the stack, the registers stay in use or empty."""
    fpu.move_top(1)


@simple("fdecstp")
def fdecstp(fpu: Fpu) -> None:
    """Turn the stack the other way."""
    fpu.move_top(-1)


@instruction("ffree", "ffreep")
def ffree(_cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
    """Mark ST(i) as empty; FFREEP, which no manual has but every processor, pops then."""
    index, pops = stack_index(insn, 0), insn.mnemonic == "ffreep"

    def body() -> None:
        fpu.free(index)
        if pops:
            fpu.pop()

    return body


@instruction("fstpnce")
def fstpnce(_cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
    """An undocumented FSTP ST(i) that raises no flag for an empty ST(0)."""
    index = stack_index(insn, 0)

    def body() -> None:
        fpu.set(index, fpu.st(index if fpu.is_empty(0) else 0))
        fpu.pop()

    return body


HANDLERS = [fld, fst, fxch, fcmov, fld_constant, fincstp, fdecstp, ffree, fstpnce]
