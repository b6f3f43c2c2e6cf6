"""The double extended-precision format and its rounding, on plain Python integers.

SDM Vol. 1, 4.2.2, 4.8.3, 8.2 and 8.5. A register is an 80-bit integer: sign, 15 bits of exponent,
64 bits of significand with an explicit integer bit. A finite magnitude is a pair ``(m, e)`` for
``m * 2**e``.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from handlers.softfloat import OE, PE, RDOWN, RNE, RUP, UE, Format

BIAS = 0x3FFF
SIGN = 1 << 79
INTEGER_BIT = 1 << 63
QUIET_BIT = 1 << 62
SIGNIFICAND = (1 << 64) - 1
MAGNITUDE = SIGN - 1
TOP_EXPONENT = 0x7FFF
INFINITY = TOP_EXPONENT << 64 | INTEGER_BIT
ONE = BIAS << 64 | INTEGER_BIT
DEFAULT_NAN = SIGN | INFINITY | QUIET_BIT
"""The QNaN floating-point indefinite."""

LOWEST = 1 - BIAS - 63
"""Exponent of the unit of a denormal of full precision."""

WRAP = 24576
"""By how much the exponent of an unmasked overflow or underflow is adjusted (8.5.4)."""

PRECISIONS = (24, 64, 53, 64)
"""Bits of significand by precision control; 1 is reserved."""


class Kind(Enum):
    """What an 80-bit pattern is. Unsupported: pseudo-NaN, pseudo-infinity, unnormal (8.2.2)."""

    ZERO = 0
    NORMAL = 1
    DENORMAL = 2
    INFINITE = 3
    QUIET = 4
    SIGNALING = 5
    UNSUPPORTED = 6


NANS = frozenset((Kind.QUIET, Kind.SIGNALING))


def kind_of(a: int) -> Kind:
    """The class of a register's content; pseudo-denormals count as denormals."""
    exponent, significand = a >> 64 & TOP_EXPONENT, a & SIGNIFICAND
    if not exponent:
        return Kind.DENORMAL if significand else Kind.ZERO
    if not significand & INTEGER_BIT:
        return Kind.UNSUPPORTED
    if exponent != TOP_EXPONENT:
        return Kind.NORMAL
    if significand == INTEGER_BIT:
        return Kind.INFINITE
    return Kind.QUIET if significand & QUIET_BIT else Kind.SIGNALING


def split(a: int) -> tuple[int, int]:
    """``(m, e)`` of a finite pattern, not normalized."""
    return a & SIGNIFICAND, max(a >> 64 & TOP_EXPONENT, 1) - BIAS - 63


def value_of(a: int) -> tuple[int, int]:
    """As :func:`split`, with the sign in ``m``."""
    m, e = split(a)
    return (-m if a & SIGN else m), e


class Rounded(NamedTuple):
    """A rounded result: its bits, the exception flags, whether it was rounded away from zero."""

    bits: int
    flags: int
    up: bool


def shift_right(m: int, by: int, negative: bool, rounding: int) -> tuple[int, bool, bool]:
    """``m * 2**-by`` rounded to an integer; whether that is inexact, and whether it grew."""
    if by <= 0:
        return m << -by, False, False
    q = m >> by
    rest = m - (q << by)
    if not rest:
        return q, False, False
    half = 1 << by - 1
    if rounding == RNE:
        up = rest > half or (rest == half and q & 1 == 1)
    else:
        up = rounding == (RDOWN if negative else RUP)
    return q + up, True, up


def pack(negative: bool, q: int, e: int) -> int:
    """The pattern of ``q * 2**e``, which must be representable."""
    exponent = e + q.bit_length() - 1 + BIAS
    unit = e + q.bit_length() - 64 if q and exponent > 0 else LOWEST
    q = q << e - unit if e >= unit else q >> unit - e
    return (SIGN if negative else 0) | max(exponent, 0) * (q >> 63) << 64 | q


def round_extended(
    negative: bool, m: int, e: int, control: int, precision: int | None = None
) -> Rounded:
    """Round ``m * 2**e`` (``m`` > 0) to a register, as the control word says.

    ``precision`` overrides precision control. A value that is no finite binary fraction is given
    with at least 66 bits of ``m``, the last of which is set to say that something follows.
    Masked overflow and underflow give infinities, largest numbers and denormals; unmasked ones
    a result with its exponent wrapped (8.5.4, 8.5.5).
    """
    rounding = control >> 10 & 3
    if precision is None:
        precision = PRECISIONS[control >> 8 & 3]
    drop = m.bit_length() - precision
    q, inexact, up = shift_right(m, drop, negative, rounding)
    exponent = e + drop + q.bit_length() - 1  # of the leading bit
    flags = PE if inexact else 0
    if exponent > BIAS:
        if control & OE:
            return _overflow(negative, rounding, precision)
        if exponent - WRAP > BIAS:
            return Rounded(SIGN | INFINITY if negative else INFINITY, OE | PE, True)
        return Rounded(pack(negative, q, e + drop - WRAP), flags | OE, up)
    if exponent >= 1 - BIAS:
        return Rounded(pack(negative, q, e + drop), flags, up)
    if not control & UE:
        if exponent + WRAP < 1 - BIAS:
            return Rounded(SIGN if negative else 0, UE | PE, False)
        return Rounded(pack(negative, q, e + drop + WRAP), flags | UE, up)
    floor = 1 - BIAS - (precision - 1)
    q, inexact, up = shift_right(m, floor - e, negative, rounding)
    return Rounded(pack(negative, q, floor), UE | PE if inexact else 0, up)


def _overflow(negative: bool, rounding: int, precision: int) -> Rounded:
    """The masked response: infinity, or the largest number of the precision."""
    to_infinity = rounding == RNE or rounding == (RDOWN if negative else RUP)
    largest = INFINITY - (1 << 64) | SIGNIFICAND ^ ((1 << 64 - precision) - 1)
    magnitude = INFINITY if to_infinity else largest
    return Rounded(SIGN | magnitude if negative else magnitude, OE | PE, to_infinity)


# Single and double precision in memory


def extend(f: Format, bits: int) -> tuple[int, bool]:
    """The register that a number in memory is, and whether it is a denormal there."""
    magnitude = bits & f.magnitude
    fraction, exponent = magnitude & f.min_normal - 1, magnitude >> f.precision - 1
    sign = SIGN if bits & f.sign else 0
    if not magnitude:
        return sign, False
    if magnitude >= f.infinity:
        return sign | INFINITY | fraction << 64 - f.precision, False
    if exponent:
        significand = INTEGER_BIT | fraction << 64 - f.precision
        return sign | exponent - f.bias + BIAS << 64 | significand, False
    return sign | pack(False, fraction, f.lowest), True


def round_memory(f: Format, a: int, control: int) -> Rounded:
    """Round a finite register other than zero to the format of a number in memory.

    Overflow and underflow give what is stored if they are masked; UE is raised for every tiny
    result if it is not.
    """
    negative, rounding = a & SIGN != 0, control >> 10 & 3
    sign = f.sign if negative else 0
    m, e = split(a)
    drop = m.bit_length() - f.precision
    q, inexact, up = shift_right(m, drop, negative, rounding)
    if e + drop + q.bit_length() - 1 < 1 - f.bias:
        exact_tiny = 0 if control & UE else UE
        q, inexact, up = shift_right(m, f.lowest - e, negative, rounding)
        return Rounded(sign | q, UE | PE if inexact else exact_tiny, up)
    magnitude = (e + drop - f.lowest << f.precision - 1) + q
    if magnitude < f.infinity:
        return Rounded(sign | magnitude, PE if inexact else 0, up)
    to_infinity = rounding == RNE or rounding == (RDOWN if negative else RUP)
    return Rounded(sign | f.infinity - (not to_infinity), OE | PE, to_infinity)


def shrink(f: Format, a: int) -> int:
    """A zero, an infinity or a NaN in the format of a number in memory; a NaN becomes quiet."""
    sign = f.sign if a & SIGN else 0
    if not a & MAGNITUDE:
        return sign
    if a & MAGNITUDE == INFINITY:
        return sign | f.infinity
    return sign | f.infinity | f.quiet | (a & INTEGER_BIT - 1) >> 64 - f.precision
