"""Exact operations on the exponent: FPREM, FPREM1, FSCALE, FXTRACT (SDM Vol. 2)."""

from __future__ import annotations

from handlers.softfloat import IE, ZE
from handlers.x87_format import (
    BIAS,
    DEFAULT_NAN,
    INFINITY,
    SIGN,
    SIGNIFICAND,
    Kind,
    kind_of,
    round_extended,
    split,
)
from handlers.x87_fpu import C0, C1, C2, C3, CONDITIONS, Fpu, simple


def _remainder(fpu: Fpu, nearest: bool) -> None:
    """ST(0) less a multiple of ST(1): the one that leaves the sign, or the ``nearest``."""
    fpu.sw &= ~C2
    found = fpu.operands(0, 0, 1)
    if found is None:
        return
    a, b = found
    kind_a, kind_b = kind_of(a), kind_of(b)
    if kind_a is Kind.INFINITE or kind_b is Kind.ZERO:
        fpu.signal(IE)
        fpu.set(0, DEFAULT_NAN)
        return
    fpu.denormals(a, b)
    fpu.sw &= ~CONDITIONS
    if kind_a is Kind.ZERO or kind_b is Kind.INFINITE:
        _exact(fpu, a & SIGN != 0, *split(a))
        return
    _reduce(fpu, a, b, nearest)


def _reduce(fpu: Fpu, a: int, b: int, nearest: bool) -> None:
    (m_a, e_a), (m_b, e_b) = split(a), split(b)
    negative = a & SIGN != 0
    distance = e_a + m_a.bit_length() - e_b - m_b.bit_length()
    if distance >= 64:
        # the manual leaves open by how many bits, 32 to 63, the exponent is reduced at a time;
        # this way the next times are multiples of 32
        skip = distance - 32 - distance % 32
        e = min(e_a, e_b + skip)
        rest = (m_a << e_a - e) % (m_b << e_b + skip - e)
        fpu.sw |= C2
        _exact(fpu, negative, rest, e)
        return
    e = min(e_a, e_b)
    divisor = m_b << e_b - e
    quotient, rest = divmod(m_a << e_a - e, divisor)
    if nearest and (2 * rest > divisor or (2 * rest == divisor and quotient & 1)):
        quotient, rest, negative = quotient + 1, divisor - rest, not negative
    for bit, condition in ((4, C0), (2, C3), (1, C1)):
        if quotient & bit:
            fpu.sw |= condition
    _exact(fpu, negative if rest else a & SIGN != 0, rest, e)


def _exact(fpu: Fpu, negative: bool, m: int, e: int) -> None:
    """Store an exact result; it underflows only where that is not masked."""
    if not m:
        fpu.set(0, SIGN if negative else 0)
        return
    result = round_extended(negative, m, e, fpu.cw, 64)
    fpu.note(result.flags)
    fpu.set(0, result.bits)


@simple("fprem")
def fprem(fpu: Fpu) -> None:
    """The remainder of a division that truncates, as of the 8087."""
    _remainder(fpu, nearest=False)


@simple("fprem1")
def fprem1(fpu: Fpu) -> None:
    """The remainder of IEEE 754."""
    _remainder(fpu, nearest=True)


@simple("fscale")
def fscale(fpu: Fpu) -> None:
    """ST(0) times two to the power of ST(1) truncated; precision control does not matter."""
    found = fpu.operands(0, 0, 1)
    if found is None:
        return
    a, b = found
    kind_a, kind_b = kind_of(a), kind_of(b)
    if kind_b is Kind.INFINITE:
        shrinks = b & SIGN
        if kind_a is (Kind.INFINITE if shrinks else Kind.ZERO):
            fpu.signal(IE)
            fpu.set(0, DEFAULT_NAN)
            return
        fpu.denormals(a)
        fpu.set(0, a & SIGN | (0 if shrinks else INFINITY))
        return
    fpu.denormals(a, b)
    if kind_a in (Kind.ZERO, Kind.INFINITE):
        fpu.set(0, a)
        return
    m, e = split(a)
    fpu.store(0, round_extended(a & SIGN != 0, m, e + _truncated(b), fpu.cw, 64))


def _truncated(b: int) -> int:
    """The integer part of a finite number, no further from zero than 2**17."""
    m, e = split(b)
    magnitude = 1 << 17 if e + m.bit_length() > 17 else m << e if e >= 0 else m >> -e
    return -magnitude if b & SIGN else magnitude


@simple("fxtract")
def fxtract(fpu: Fpu) -> None:
    """The exponent of ST(0) in its place, and the significand, as large as 1, pushed onto it."""
    if fpu.is_empty(0):
        fpu.underflow()
        exponent = significand = DEFAULT_NAN
    elif not fpu.check_room():
        exponent = significand = DEFAULT_NAN
    else:
        exponent, significand = _extracted(fpu, fpu.st(0))
    fpu.set(0, exponent)
    fpu.push(significand)


def _extracted(fpu: Fpu, a: int) -> tuple[int, int]:
    nan = fpu.special(a)
    if nan is not None:
        return nan, nan
    kind = kind_of(a)
    if kind is Kind.INFINITE:
        return INFINITY, a
    if kind is Kind.ZERO:
        fpu.signal(ZE)
        return SIGN | INFINITY, a
    fpu.denormals(a)
    m, e = split(a)
    shift = 64 - m.bit_length()
    exponent = e - shift + 63
    significand = a & SIGN | BIAS << 64 | m << shift & SIGNIFICAND
    if not exponent:
        return 0, significand
    return round_extended(exponent < 0, abs(exponent), 0, fpu.cw, 64).bits, significand


HANDLERS = [fprem, fprem1, fscale, fxtract]
