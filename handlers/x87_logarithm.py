"""F2XM1, FYL2X, FYL2XP1 (SDM Vol. 2; Vol. 1, 8.3.9 and 8.3.10).

Results have the full significand whatever precision control says, and are rounded once, as
rounding control says. As processors do, PE is raised without looking whether a result is exact.
"""

from __future__ import annotations

from handlers import x87_quick as tables
from handlers import x87_series as series
from handlers.softfloat import IE, PE, UE, ZE
from handlers.x87_format import (
    BIAS,
    DEFAULT_NAN,
    INFINITY,
    ONE,
    SIGN,
    Kind,
    kind_of,
    round_extended,
    split,
    value_of,
)
from handlers.x87_fpu import Fpu, simple
from handlers.x87_in_place import quick
from handlers.x87_series import (
    BITS,
    SMALL,
    Magnitude,
    exponent_of,
    fixed,
    inexact,
    just_below,
)


def _power_quickly(control: int, x: int, _y: int) -> tuple[int, bool] | None:
    m, e = split(x)
    value = tables.power_less_one(x >= SIGN, m, e) if e < -63 else None
    if value is None:
        return None
    return tables.round_within(x >= SIGN, abs(value), -tables.PLACES, tables.ERROR, control)


@quick(_power_quickly)
@simple("f2xm1")
def f2xm1(fpu: Fpu) -> None:
    """``2**ST(0) - 1`` for -1 to 1. What lies beyond, where the manual defines nothing, stays."""
    found = fpu.operands(0, 0)
    if found is None:
        return
    (a,) = found
    kind, negative = kind_of(a), a & SIGN != 0
    if kind is Kind.ZERO:
        return
    if kind is Kind.INFINITE:
        fpu.set(0, SIGN | ONE if negative else a)
        return
    fpu.denormals(a)
    m, e = split(a)
    if exponent_of(m, e) >= 0:
        fpu.note(PE)
        fpu.set(0, SIGN | BIAS - 1 << 64 | 1 << 63 if a == SIGN | ONE else a)
        return
    fpu.store(0, round_extended(negative, *_power_less_one(negative, m, e), fpu.cw, 64))


def _power_less_one(negative: bool, m: int, e: int) -> Magnitude:
    if exponent_of(m, e) < -SMALL:
        return inexact(m * series.ln2(), e - BITS)
    x = fixed(m, e) * series.ln2() >> BITS
    return inexact(abs(series.exponential_less_one(-x if negative else x)))


# y * log2(x)


def _invalid(fpu: Fpu) -> None:
    fpu.signal(IE)
    fpu.set(1, DEFAULT_NAN)


def _store_product(fpu: Fpu, y: int, negative: bool, logarithm: Magnitude) -> None:
    """ST(1) becomes a finite ``y`` times a logarithm."""
    m, e = split(y)
    product = m * logarithm[0], e + logarithm[1]
    sign = (y & SIGN != 0) != negative
    result = round_extended(sign, *product, fpu.cw, 64)
    flags = PE | UE if kind_of(result.bits) is Kind.DENORMAL else PE
    fpu.store(1, result._replace(flags=result.flags | flags))


def _product(control: int, y: int, logarithm: int | None) -> tuple[int, bool] | None:
    if logarithm is None:
        return None
    m, e = split(y)
    negative = (y >= SIGN) != (logarithm < 0)
    product = m * abs(logarithm), e - tables.PLACES, m * tables.ERROR
    return tables.round_within(negative, *product, control)


def _product_quickly(control: int, x: int, y: int) -> tuple[int, bool] | None:
    return None if x >= SIGN else _product(control, y, tables.logarithm(*split(x)))


def _product_above_one_quickly(control: int, x: int, y: int) -> tuple[int, bool] | None:
    m, e = value_of(x)
    if not -tables.PLACES < e < -63:
        return None
    return _product(control, y, tables.logarithm(m + (1 << -e), e))


@quick(_product_quickly, pops=True)
@simple("fyl2x")
def fyl2x(fpu: Fpu) -> None:
    """``ST(1) * log2(ST(0))`` in place of ST(1), and pop."""
    found = fpu.operands(1, 1, 0)
    if found is not None:
        y, x = found
        _fyl2x(fpu, y, x)
    fpu.pop()


def _fyl2x(fpu: Fpu, y: int, x: int) -> None:
    kind_y, kind_x = kind_of(y), kind_of(x)
    if kind_x is Kind.ZERO:
        _logarithm_of_zero(fpu, y, kind_y)
        return
    if x & SIGN:
        _invalid(fpu)
        return
    m, e = split(x)
    grows = kind_x is Kind.INFINITE or exponent_of(m, e) >= 0
    if Kind.INFINITE in (kind_x, kind_y):
        if kind_y is Kind.ZERO or x == ONE:
            _invalid(fpu)
            return
        fpu.denormals(y, x)
        fpu.set(1, y & SIGN ^ (0 if grows else SIGN) | INFINITY)
        return
    fpu.denormals(y, x)
    if kind_y is Kind.ZERO or x == ONE:
        fpu.set(1, y & SIGN ^ (0 if grows else SIGN))
        return
    _store_product(fpu, y, not grows, binary_logarithm(m, e))


def _logarithm_of_zero(fpu: Fpu, y: int, kind_y: Kind) -> None:
    if kind_y is Kind.ZERO:
        _invalid(fpu)
        return
    if kind_y is not Kind.INFINITE:
        fpu.signal(ZE)
    fpu.set(1, y & SIGN ^ SIGN | INFINITY)


def binary_logarithm(m: int, e: int) -> Magnitude:
    """The magnitude of the logarithm of ``m * 2**e``, which is not 1."""
    exponent = exponent_of(m, e)
    unit = m.bit_length() - 1
    if m > 0xB504F333 << unit >> 31:  # the square root of two
        exponent, unit = exponent + 1, unit + 1
    # m / 2**unit is between sqrt(1/2) and sqrt(2); the logarithm is 2 atanh((m - 1) / (m + 1))
    difference, total = m - (1 << unit), m + (1 << unit)
    if not difference:
        return abs(exponent), 0
    if not exponent:
        return _near_one(abs(difference), total)
    part = 2 * series.area_tangent((abs(difference) << BITS) // total)
    part = (part << BITS) // series.ln2()
    return inexact(abs((exponent << BITS) + (part if difference > 0 else -part)))


def _near_one(difference: int, total: int) -> Magnitude:
    """``2 atanh(difference / total) / ln 2``, where no digits may be lost."""
    scale = total.bit_length() - difference.bit_length()
    quotient = (difference << BITS + scale) // total  # with as many digits as if it were near one
    if scale > SMALL:
        return inexact((2 * quotient << BITS) // series.ln2(), -BITS - scale)
    part = 2 * series.area_tangent(quotient >> scale)
    return inexact((part << BITS) // series.ln2())


@quick(_product_above_one_quickly, pops=True)
@simple("fyl2xp1")
def fyl2xp1(fpu: Fpu) -> None:
    """``ST(1) * log2(ST(0) + 1)`` in place of ST(1), and pop.

    Beyond the range that the manual defines: the logarithm down to -1, then ST(0) as it is.
    """
    found = fpu.operands(1, 1, 0)
    if found is not None:
        y, x = found
        _fyl2xp1(fpu, y, x)
    fpu.pop()


def _fyl2xp1(fpu: Fpu, y: int, x: int) -> None:
    kind_y, kind_x = kind_of(y), kind_of(x)
    sign = (x ^ y) & SIGN
    if Kind.INFINITE in (kind_x, kind_y):
        if Kind.ZERO in (kind_x, kind_y) or x == SIGN | INFINITY:
            _invalid(fpu)
            return
        fpu.denormals(y, x)
        fpu.set(1, sign | INFINITY)
        return
    fpu.denormals(y, x)
    if Kind.ZERO in (kind_x, kind_y):
        fpu.set(1, sign)
        return
    m, e = value_of(x)
    if m < 0 and exponent_of(-m, e) >= 0:
        fpu.note(PE)
        fpu.set(1, x)
        return
    _store_product(fpu, y, m < 0, _logarithm_above_one(m, e))


def _logarithm_above_one(m: int, e: int) -> Magnitude:
    """The magnitude of ``log2(1 + m * 2**e)`` for a number above -1 other than 0."""
    exponent = exponent_of(abs(m), e)
    if exponent < -2 * SMALL:
        leading = (abs(m) << 2 * BITS) // series.ln2(), e - BITS
        return inexact(*leading) if m < 0 else just_below(*leading)
    low = min(e, 0)
    return binary_logarithm((m << e - low) + (1 << -low), low)


HANDLERS = [f2xm1, fyl2x, fyl2xp1]
