"""FSIN, FCOS, FSINCOS, FPTAN, FPATAN (SDM Vol. 2; Vol. 1, 8.3.8 and 8.3.10).

Results have the full significand whatever precision control says, and are rounded once, as
rounding control says. Processors are right to within one unit in the last place, each with errors
of its own; here the error is half a unit. Angles are reduced by the processors' 66-bit pi.
"""

from __future__ import annotations

from collections.abc import Callable

from handlers import x87_quick as tables
from handlers import x87_series as series
from handlers.softfloat import IE
from handlers.x87_format import (
    DEFAULT_NAN,
    ONE,
    SIGN,
    SIGNIFICAND,
    TOP_EXPONENT,
    Kind,
    Rounded,
    kind_of,
    round_extended,
    split,
)
from handlers.x87_fpu import C2, Fpu, simple
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

PI_66 = 0xC90FDAA22168C234C
"""Pi as processors reduce by it, in units of ``2**-66`` (SDM Vol. 1, 8.3.8)."""
_HALF_PI_UNIT = -67
_NEAR = 28
"""Exponents so far apart, an angle is not found quickly."""
LIMIT = 63
"""Angles of ``2**LIMIT`` and more are out of range."""


def _rounded(fpu: Fpu, negative: bool, value: Magnitude) -> Rounded:
    return round_extended(negative, *value, fpu.cw, 64)


def reduce(m: int, e: int) -> tuple[int, bool, int, int]:
    """``(quadrant, negative, m, e)``: ``m * 2**e`` less a multiple of half the 66-bit pi.

    The rest is exact, from -pi/4 to pi/4, and never 0: its magnitude and its sign.
    """
    low = min(e, _HALF_PI_UNIT)
    if exponent_of(m, e) < -1:
        return 0, False, m, e
    half_pi = PI_66 << _HALF_PI_UNIT - low
    quadrant, rest = divmod(m << e - low, half_pi)
    if 2 * rest > half_pi:
        return quadrant + 1 & 3, True, half_pi - rest, low
    return quadrant & 3, False, rest, low


def sine_of(m: int, e: int) -> Magnitude:
    if exponent_of(m, e) < -SMALL:
        return just_below(m, e)
    return inexact(series.sine(fixed(m, e)))


def cosine_of(m: int, e: int) -> Magnitude:
    if exponent_of(m, e) < -SMALL:
        return just_below(1, 0)
    return inexact(series.cosine(fixed(m, e)))


def tangent_of(m: int, e: int) -> Magnitude:
    if exponent_of(m, e) < -SMALL:
        return inexact(m, e)
    x = fixed(m, e)
    return inexact((series.sine(x) << BITS) // series.cosine(x))


def cotangent_of(m: int, e: int) -> Magnitude:
    """For an angle that is a rest of a reduction: never so small that the quotient is."""
    x = fixed(m, e)
    return inexact((series.cosine(x) << BITS) // series.sine(x))


def _sine(fpu: Fpu, a: int) -> Rounded:
    quadrant, below, m, e = reduce(*split(a))
    value = cosine_of(m, e) if quadrant & 1 else sine_of(m, e)
    negative = (a & SIGN != 0) != (quadrant & 2 != 0)
    return _rounded(fpu, negative != (below and not quadrant & 1), value)


def _cosine(fpu: Fpu, a: int) -> Rounded:
    quadrant, below, m, e = reduce(*split(a))
    value = sine_of(m, e) if quadrant & 1 else cosine_of(m, e)
    negative = (quadrant + 1) & 2 != 0
    return _rounded(fpu, negative != (below and quadrant & 1 != 0), value)


def _tangent(fpu: Fpu, a: int) -> Rounded:
    quadrant, below, m, e = reduce(*split(a))
    value = cotangent_of(m, e) if quadrant & 1 else tangent_of(m, e)
    negative = (a & SIGN != 0) ^ below ^ (quadrant & 1 != 0)
    return _rounded(fpu, negative, value)


Function = Callable[[Fpu, int], Rounded]


def _operand(fpu: Fpu, pushes: bool) -> tuple[int, bool]:
    """ST(0), or the NaN that comes of it, and whether it is an angle in range.

    C2 tells of an angle that is out of range, and then nothing happens to it.
    """
    fpu.sw &= ~C2
    if fpu.is_empty(0):
        fpu.underflow()
        return DEFAULT_NAN, False
    if pushes and not fpu.check_room():
        return DEFAULT_NAN, False
    a = fpu.st(0)
    nan = fpu.special(a)
    if nan is not None:
        return nan, False
    kind = kind_of(a)
    if kind is Kind.INFINITE:
        fpu.signal(IE)
        return DEFAULT_NAN, False
    if kind is not Kind.ZERO and exponent_of(*split(a)) >= LIMIT:
        fpu.sw |= C2
        return a, False
    fpu.denormals(a)
    return a, True


def _replace(fpu: Fpu, function: Function, at_zero: Callable[[int], int]) -> None:
    """ST(0) becomes a function of itself."""
    a, is_angle = _operand(fpu, pushes=False)
    if not is_angle:
        fpu.set(0, a)
    elif kind_of(a) is Kind.ZERO:
        fpu.set(0, at_zero(a))
    else:
        fpu.store(0, function(fpu, a))


@simple("fsin")
def fsin(fpu: Fpu) -> None:
    """The sine of ST(0)."""
    _replace(fpu, _sine, lambda zero: zero)


@simple("fcos")
def fcos(fpu: Fpu) -> None:
    """The cosine of ST(0)."""
    _replace(fpu, _cosine, lambda _zero: ONE)


def _push_after(fpu: Fpu, first: Function, second: Callable[[Fpu, int], int]) -> None:
    """ST(0) becomes a function of itself, and another one is pushed onto it."""
    a, is_angle = _operand(fpu, pushes=True)
    if fpu.sw & C2:
        return
    if not is_angle:
        fpu.set(0, a)
        fpu.push(a)
        return
    pushed = second(fpu, a)
    if kind_of(a) is not Kind.ZERO:
        fpu.store(0, first(fpu, a))
    fpu.push(pushed)


@simple("fsincos")
def fsincos(fpu: Fpu) -> None:
    """The sine in place of ST(0), and the cosine pushed."""
    _push_after(fpu, _sine, lambda fpu, a: ONE if kind_of(a) is Kind.ZERO else _cosine(fpu, a).bits)


@simple("fptan")
def fptan(fpu: Fpu) -> None:
    """The tangent in place of ST(0), and 1.0 pushed, unless it is a NaN."""
    _push_after(fpu, _tangent, lambda _fpu, _a: ONE)


# The arc tangent


def _angle_quickly(control: int, x: int, y: int) -> tuple[int, bool] | None:
    distance = (y >> 64 & TOP_EXPONENT) - (x >> 64 & TOP_EXPONENT)
    if not -_NEAR < distance < _NEAR:
        return None
    a, b = y & SIGNIFICAND, x & SIGNIFICAND
    if distance > 0:
        a <<= distance
    else:
        b <<= -distance
    steep = a > b
    angle = tables.arc_tangent(b, a) if steep else tables.arc_tangent(a, b)
    if angle is None:
        return None
    if x >= SIGN:
        angle = (tables.pi() >> 1) + angle if steep else tables.pi() - angle
    elif steep:
        angle = (tables.pi() >> 1) - angle
    return tables.round_within(y >= SIGN, angle, -tables.PLACES, tables.ERROR, control)


@quick(_angle_quickly, pops=True)
@simple("fpatan")
def fpatan(fpu: Fpu) -> None:
    """The angle of the point (ST(0), ST(1)) in place of ST(1), and pop."""
    found = fpu.operands(1, 1, 0)
    if found is not None:
        y, x = found
        _store_angle(fpu, y, x)
    fpu.pop()


def _store_angle(fpu: Fpu, y: int, x: int) -> None:
    fpu.denormals(x, y)
    value = _angle(y, x)
    if value is None:
        fpu.set(1, y & SIGN)
    else:
        fpu.store(1, _rounded(fpu, y & SIGN != 0, value))


def _angle(y: int, x: int) -> Magnitude | None:
    """The angle's magnitude, None for 0 (SDM Vol. 2, FPATAN, table 3-30)."""
    kind_y, kind_x = kind_of(y), kind_of(x)
    left, pi = x & SIGN != 0, series.pi()
    if kind_y is Kind.INFINITE:
        if kind_x is not Kind.INFINITE:
            return inexact(pi >> 1)
        return inexact(3 * pi >> 2 if left else pi >> 2)
    if kind_x is Kind.INFINITE or kind_y is Kind.ZERO:
        return inexact(pi) if left else None
    if kind_x is Kind.ZERO:
        return inexact(pi >> 1)
    return _quotient_angle(split(y), split(x), left)


def _quotient_angle(y: tuple[int, int], x: tuple[int, int], left: bool) -> Magnitude:
    """The angle from the axis that is nearer is the arc tangent of a quotient up to 1."""
    (m_y, e_y), (m_x, e_x) = y, x
    distance = exponent_of(*y) - exponent_of(*x)
    if distance < -SMALL and not left:
        shift = 300 - m_y.bit_length()
        quotient, rest = divmod(m_y << shift, m_x)
        e = e_y - e_x - shift
        return inexact(quotient, e) if rest else just_below(quotient, e)
    if distance < -BITS or distance > BITS:
        angle = 0
        steep = distance > 0
    else:
        e = min(e_y, e_x)
        a, b = m_y << e_y - e, m_x << e_x - e
        steep = a > b
        angle = series.arc_tangent((min(a, b) << BITS) // max(a, b))
    if steep:
        angle = (series.pi() >> 1) + (angle if left else -angle)
    elif left:
        angle = series.pi() - angle
    return inexact(angle)


HANDLERS = [fsin, fcos, fsincos, fptan, fpatan]
