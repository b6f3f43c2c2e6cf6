"""Elementary functions by tables, and roundings that are shown to be right.

What :mod:`handlers.x87_series` computes to 256 bits is found here to some 120, several times
faster. The true value is within a bound of it. If all values within that bound round alike, the
result is that of the series; else, once in millions of times, the series is asked.

A number is an integer in units of ``2**-PLACES``. A table gives a function at the middle of an
interval; entries are computed by the series when they are first met.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Final

from handlers import x87_series as series
from handlers.softfloat import RDOWN, RNE, RUP
from handlers.x87_format import BIAS, SIGN
from handlers.x87_series import BITS

PLACES: Final = 128
ONE: Final = 1 << PLACES
ERROR: Final = 64
"""A function is off by less: each of some twenty truncations by one, at most doubled later."""
LEAST: Final = 1 << 100
"""Smaller results have too few digits here."""
_PRECISION: Final = 64
_CUT: Final = BITS - PLACES


def round_within(
    negative: bool, m: int, e: int, error: int, control: int
) -> tuple[int, bool] | None:
    """Round what is off from ``m * 2**e`` by less than ``error`` units to a normal number: its
    bits, and whether it was rounded away from zero.

    None if the rounding is not the same for all that it may be, or the result is none.
    """
    drop = m.bit_length() - _PRECISION
    half = 1 << drop - 1
    rest = m & (half << 1) - 1
    if not error < rest < (half << 1) - error or -error <= rest - half <= error:
        return None
    rounding = control >> 10 & 3
    up = rest > half if rounding == RNE else rounding == (RDOWN if negative else RUP)
    q, exponent = (m >> drop) + up, e + drop + _PRECISION - 1 + BIAS
    if q >> _PRECISION:
        q, exponent = q >> 1, exponent + 1
    if not 0 < exponent < 2 * BIAS:
        return None
    return (SIGN if negative else 0) | exponent << 64 | q, up


def _fixed(x: int) -> int:
    """A number of the series in the units of this module."""
    return x >> _CUT


# 2**x - 1

_COARSE, _FINE = PLACES - 7, PLACES - 14
_REST: Final = (1 << _FINE) - 1
_SMALLEST: Final = -16
"""Exponent from which on a power is found here."""


@lru_cache(maxsize=1)
def _powers() -> tuple[list[int], list[int], list[int]]:
    """``2**(n/128)`` for n from -128 to 127, ``2**(n/2**14)`` for n from 0 to 127, and the
    coefficients of ``2**x - 1``, the last first."""

    def powers(first: int, shift: int, count: int) -> list[int]:
        step, found = series.UNIT + series.exponential_less_one(series.ln2() >> shift), [first]
        while len(found) < count:
            found.append(found[-1] * step >> BITS)
        return [_fixed(x) for x in found]

    coefficient, coefficients = series.UNIT, []
    for k in range(1, 9):
        coefficient = (coefficient * series.ln2() >> BITS) // k
        coefficients.append(_fixed(coefficient))
    return powers(series.UNIT >> 1, 7, 256), powers(series.UNIT, 14, 128), coefficients[::-1]


def power_less_one(negative: bool, m: int, e: int) -> int | None:
    """``2**x - 1`` for ``x = m * 2**e``, below 1; None if it has too few digits."""
    if e + m.bit_length() <= _SMALLEST:
        return None
    x = -m << PLACES + e if negative else m << PLACES + e
    coarse, fine, coefficients = _powers()
    rest = x & _REST
    less_one = 0
    for coefficient in coefficients:
        less_one = (less_one + coefficient) * rest >> PLACES
    power = coarse[(x >> _COARSE) + 128] * fine[x >> _FINE & 127] >> PLACES
    return power + (power * less_one >> PLACES) - ONE


# log2(x)


@lru_cache(maxsize=1)
def _logarithm_coefficients() -> list[int]:
    """Of ``log2(1 + x)``, the last first."""
    inverse = (series.UNIT << BITS) // series.ln2()
    return [_fixed(inverse if k & 1 else -inverse) // k for k in range(7, 0, -1)]


@cache
def _factor(n: int, bits: int, places: int) -> tuple[int, int]:
    """About the inverse of ``1 + (n + 1/2) * 2**-bits`` to so many places, and minus its
    logarithm."""
    factor = (1 << places + bits + 1) // ((1 << bits + 1) + 2 * n + 1)
    one = 1 << places
    part = series.area_tangent((one - factor << BITS) // (one + factor))
    return factor, _fixed((2 * part << BITS) // series.ln2())


def logarithm(m: int, e: int) -> int | None:
    """``log2(m * 2**e)``; None if it is so small that it has too few digits."""
    length = m.bit_length()
    if length > PLACES:
        return None
    x = m << PLACES + 1 - length
    factor, result = _factor((x >> PLACES - 8) - 256, 8, 15)
    x = x * factor >> 15
    factor, more = _factor(x - ONE >> PLACES - 17, 17, 24)
    x = (x * factor >> 24) - ONE
    rest = 0
    for coefficient in _logarithm_coefficients():
        rest = (rest + coefficient) * x >> PLACES
    result += more + rest + (e + length - 1 << PLACES)
    return result if result >= LEAST or result <= -LEAST else None


# atan(y / x)


@lru_cache(maxsize=1)
def pi() -> int:
    return _fixed(series.pi())


@lru_cache(maxsize=1)
def _arc_coefficients() -> list[int]:
    """Of ``atan(x) / x`` in ``x**2``, the last first."""
    return [(ONE if k % 4 == 1 else -ONE) // k for k in range(11, 0, -2)]


@cache
def _arc(n: int) -> int:
    """``atan((2n + 1) / 1024)``."""
    return _fixed(series.arc_tangent((2 * n + 1 << BITS) // 1024))


def arc_tangent(y: int, x: int) -> int | None:
    """``atan(y / x)`` for a quotient up to 1; None if it has too few digits."""
    n = (y << 9) // x
    slope = 2 * n + 1
    rest = ((y << 10) - slope * x << PLACES) // ((x << 10) + slope * y)
    square = rest * rest >> PLACES
    ratio = 0
    for coefficient in _arc_coefficients():
        ratio = (ratio * square >> PLACES) + coefficient
    result = _arc(n) + (ratio * rest >> PLACES)
    return result if result >= LEAST else None
