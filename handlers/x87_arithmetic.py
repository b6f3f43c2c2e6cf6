"""FADD, FSUB, FMUL, FDIV with their kin, FSQRT, FRNDINT, FABS, FCHS (SDM Vol. 2; Vol. 1, 8.3)."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import TypeAlias

from handlers.softfloat import IE, PE, RDOWN, ZE
from handlers.x87_format import (
    DEFAULT_NAN,
    INFINITY,
    SIGN,
    Kind,
    Rounded,
    kind_of,
    pack,
    round_extended,
    shift_right,
    split,
    value_of,
)
from handlers.x87_fpu import Body, Fpu, Instruction, has_memory, simple
from handlers.x87_source import bind_source, stack_index
from sandbox.cpu import Cpu
from sandbox.decode import Insn

Operation: TypeAlias = Callable[[Fpu, int, int], Rounded]
"""Two operands that are no NaNs to a result; raises what comes before it but for DE."""

_FAR = 130
"""Bits beyond which a summand only says that something follows the other."""


def _exact(bits: int) -> Rounded:
    return Rounded(bits, 0, False)


def _invalid(fpu: Fpu) -> Rounded:
    fpu.signal(IE)
    return _exact(DEFAULT_NAN)


def add(fpu: Fpu, a: int, b: int) -> Rounded:
    kind_a, kind_b = kind_of(a), kind_of(b)
    if kind_a is Kind.INFINITE:
        if kind_b is Kind.INFINITE and a != b:
            return _invalid(fpu)
        fpu.denormals(b)
        return _exact(a)
    fpu.denormals(a, b)
    if kind_b is Kind.INFINITE:
        return _exact(b)
    (m_a, e_a), (m_b, e_b) = value_of(a), value_of(b)
    if not m_a and not m_b:
        return _exact(a if a == b else _zero(fpu))
    if e_a < e_b:
        m_a, e_a, m_b, e_b = m_b, e_b, m_a, e_a
    if not m_a:
        m_a, e_a = m_b, e_b
    elif m_b and e_a - e_b > _FAR:
        m_a, e_a = (m_a << _FAR) + (1 if m_b > 0 else -1), e_a - _FAR
    else:
        m_a, e_a = (m_a << e_a - e_b) + m_b, e_b
    if not m_a:
        return _exact(_zero(fpu))
    return round_extended(m_a < 0, abs(m_a), e_a, fpu.cw)


def _zero(fpu: Fpu) -> int:
    """The zero that a sum of opposite values is."""
    return SIGN if fpu.cw >> 10 & 3 == RDOWN else 0


def subtract(fpu: Fpu, a: int, b: int) -> Rounded:
    return add(fpu, a, b ^ SIGN)


def multiply(fpu: Fpu, a: int, b: int) -> Rounded:
    kinds = kind_of(a), kind_of(b)
    sign = (a ^ b) & SIGN
    if Kind.INFINITE in kinds and Kind.ZERO in kinds:
        return _invalid(fpu)
    fpu.denormals(a, b)
    if Kind.INFINITE in kinds:
        return _exact(sign | INFINITY)
    if Kind.ZERO in kinds:
        return _exact(sign)
    (m_a, e_a), (m_b, e_b) = split(a), split(b)
    return round_extended(sign != 0, m_a * m_b, e_a + e_b, fpu.cw)


def divide(fpu: Fpu, a: int, b: int) -> Rounded:
    kind_a, kind_b = kind_of(a), kind_of(b)
    sign = (a ^ b) & SIGN
    if kind_a is kind_b and kind_a in (Kind.ZERO, Kind.INFINITE):
        return _invalid(fpu)
    if kind_b is Kind.ZERO and kind_a is not Kind.INFINITE:
        fpu.signal(ZE)
        return _exact(sign | INFINITY)
    fpu.denormals(a, b)
    if kind_a is Kind.INFINITE:
        return _exact(sign | INFINITY)
    if kind_a is Kind.ZERO or kind_b is Kind.INFINITE:
        return _exact(sign)
    (m_a, e_a), (m_b, e_b) = split(a), split(b)
    extra = max(0, 68 + m_b.bit_length() - m_a.bit_length())
    q, rest = divmod(m_a << extra, m_b)
    return round_extended(sign != 0, q << 1 | (rest != 0), e_a - e_b - extra - 1, fpu.cw)


def reverse_subtract(fpu: Fpu, a: int, b: int) -> Rounded:
    return subtract(fpu, b, a)


def reverse_divide(fpu: Fpu, a: int, b: int) -> Rounded:
    return divide(fpu, b, a)


def _binary(operation: Operation, *mnemonics: str) -> Instruction:
    """The forms with a source in memory or a register: the first operand is the destination."""

    def make(cpu: Cpu, fpu: Fpu, insn: Insn) -> Body:
        pops = insn.mnemonic.endswith("p")
        target = 0 if has_memory(insn) else stack_index(insn, 0)
        source = bind_source(cpu, fpu, insn)

        def body() -> None:
            b = source()
            if b is None or fpu.is_empty(target):
                fpu.underflow()
                fpu.set(target, DEFAULT_NAN)
            else:
                a = fpu.st(target)
                nan = fpu.special(a, b)
                if nan is not None:
                    fpu.set(target, nan)
                else:
                    fpu.store(target, operation(fpu, a, b))
            if pops:
                fpu.pop()

        return body

    return Instruction(make, mnemonics, Fpu.begin)


BINARY = [
    _binary(add, "fadd", "faddp", "fiadd"),
    _binary(subtract, "fsub", "fsubp", "fisub"),
    _binary(reverse_subtract, "fsubr", "fsubrp", "fisubr"),
    _binary(multiply, "fmul", "fmulp", "fimul"),
    _binary(divide, "fdiv", "fdivp", "fidiv"),
    _binary(reverse_divide, "fdivr", "fdivrp", "fidivr"),
]


@simple("fsqrt")
def fsqrt(fpu: Fpu) -> None:
    """The square root of ST(0)."""
    found = fpu.operands(0, 0)
    if found is None:
        return
    (a,) = found
    if kind_of(a) is Kind.ZERO:
        return
    if a & SIGN:
        fpu.signal(IE)
        fpu.set(0, DEFAULT_NAN)
    elif a != INFINITY:
        fpu.denormals(a)
        m, e = split(a)
        extra = 136 - (e & 1)
        m <<= extra
        root = isqrt(m)
        rounded = root << 1 | (root * root != m), (e - extra) // 2 - 1
        fpu.store(0, round_extended(False, *rounded, fpu.cw))


@simple("frndint")
def frndint(fpu: Fpu) -> None:
    """ST(0) rounded to an integral value."""
    found = fpu.operands(0, 0)
    if found is None:
        return
    (a,) = found
    if kind_of(a) in (Kind.ZERO, Kind.INFINITE):
        return
    fpu.denormals(a)
    m, e = split(a)
    if e < 0:
        negative = a & SIGN != 0
        q, inexact, up = shift_right(m, -e, negative, fpu.cw >> 10 & 3)
        fpu.store(0, Rounded(pack(negative, q, 0), PE if inexact else 0, up))


def _change(fpu: Fpu, change: Callable[[int], int]) -> None:
    """Whatever ST(0) is, NaNs too."""
    if fpu.is_empty(0):
        fpu.underflow()
        fpu.set(0, DEFAULT_NAN)
    else:
        fpu.set(0, change(fpu.st(0)))


@simple("fchs")
def fchs(fpu: Fpu) -> None:
    """Change the sign of ST(0)."""
    _change(fpu, lambda a: a ^ SIGN)


@simple("fabs")
def fabs(fpu: Fpu) -> None:
    """Clear the sign of ST(0)."""
    _change(fpu, lambda a: a & ~SIGN)


HANDLERS = [*BINARY, fsqrt, frndint, fchs, fabs]
