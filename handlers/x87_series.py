"""Elementary functions in fixed point, far more precise than any register.

A number is an integer in units of ``2**-BITS``. Results are off by some hundred units; a caller
that rounds a value to 64 bits, no smaller than ``2**-SMALL``, gets the nearest one but for cases
too rare to be met.
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt
from typing import Final, TypeAlias

BITS: Final = 256
UNIT: Final = 1 << BITS
SMALL: Final = 80
"""Below ``2**-SMALL`` a function is its leading term as far as 64 bits can tell."""


def _inverse_series(n: int, alternating: bool) -> int:
    """``atan(1/n)``, or ``atanh(1/n)`` if the signs do not alternate."""
    power = total = UNIT // n
    k, sign = 1, 1
    while power:
        power //= n * n
        k += 2
        sign = -sign if alternating else sign
        total += sign * (power // k)
    return total


Magnitude: TypeAlias = tuple[int, int]
"""``(m, e)``, for about ``m * 2**e``: the last bit of ``m`` says that something follows."""


def exponent_of(m: int, e: int) -> int:
    """The exponent of the leading bit of ``m * 2**e``."""
    return e + m.bit_length() - 1


def fixed(m: int, e: int) -> int:
    """``m * 2**e`` in fixed point."""
    shift = e + BITS
    return m << shift if shift >= 0 else m >> -shift


def inexact(m: int, e: int = -BITS) -> Magnitude:
    """A little more than ``m * 2**e``: all the rounding needs to know of a long fraction."""
    return m << 160 | 1, e - 160


def just_below(m: int, e: int) -> Magnitude:
    """A little less than ``m * 2**e``."""
    return (m << 160) - 1, e - 160


@lru_cache(maxsize=1)
def pi() -> int:
    """Machin's formula."""
    return 4 * (4 * _inverse_series(5, True) - _inverse_series(239, True))


@lru_cache(maxsize=1)
def ln2() -> int:
    """``ln 2 = 2 atanh(1/3)``."""
    return 2 * _inverse_series(3, False)


@lru_cache(maxsize=1)
def ln10() -> int:
    """``ln 10 = 3 ln 2 + ln(5/4)``, and ``ln(5/4) = 2 atanh(1/9)``."""
    return 3 * ln2() + 2 * _inverse_series(9, False)


def sine(x: int) -> int:
    """The sine of a number not above 1."""
    square = x * x >> BITS
    term = total = x
    k = 1
    while term not in (0, -1):
        term = -(term * square >> BITS) // ((k + 1) * (k + 2))
        total += term
        k += 2
    return total


def cosine(x: int) -> int:
    """The cosine of a number not above 1."""
    square = x * x >> BITS
    term = total = UNIT
    k = 0
    while term not in (0, -1):
        term = -(term * square >> BITS) // ((k + 1) * (k + 2))
        total += term
        k += 2
    return total


def exponential_less_one(x: int) -> int:
    """``e**x - 1`` for a number not above 1."""
    term = total = x
    k = 1
    while term not in (0, -1):
        k += 1
        term = (term * x >> BITS) // k
        total += term
    return total


def arc_tangent(x: int) -> int:
    """The arc tangent of a number from 0 to 1: halved three times, then its series."""
    for _ in range(3):
        x = (x << BITS) // (UNIT + isqrt((UNIT << BITS) + x * x))
    return 8 * _odd_powers(x, -(x * x >> BITS))


def area_tangent(x: int) -> int:
    """The inverse hyperbolic tangent of a number up to 0.2."""
    return _odd_powers(x, x * x >> BITS)


def _odd_powers(x: int, ratio: int) -> int:
    """The sum of ``x * ratio**k / (2k + 1)``."""
    power = total = x
    k = 1
    while power not in (0, -1):
        power = power * ratio >> BITS
        k += 2
        total += power // k
    return total
