"""IEEE 754 arithmetic as x86 SSE and AVX define it, on plain Python integers.

This is the portable reference of the handler tier: exact for every binary format, with all of
MXCSR: four rounding modes, FTZ, DAZ, six flags, NaN propagation in x86 operand order, tininess
detected after rounding (SDM Vol. 1, chapters 4.8, 4.9 and 11.5; Appendix E).

Every operation takes the format, the operands as bit patterns and MXCSR, and returns
``(bits, flags)``: the result that the *masked* responses would give, and the MXCSR flags the
operation raises. The masks in MXCSR matter where the manual says so: an underflow that is not
masked is raised for exact tiny results too, and suspends FTZ; an unmasked overflow or underflow
raises PE only if rounding to unbounded exponent range is inexact. :func:`unmasked` tells whether
the flags trap.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isqrt

IE, DE, ZE, OE, UE, PE = 1, 2, 4, 8, 0x10, 0x20
FLAGS = 0x3F
DAZ, FTZ = 0x40, 0x8000
PM, UM, OM = 0x1000, 0x800, 0x400
MASKS = 0x1F80
RNE, RDOWN, RUP, RZERO = range(4)
"""Rounding control, as in MXCSR[14:13] and in the immediates of ROUNDPS and VCVTPS2PH."""

Result = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Format:
    """A binary interchange format: ``precision`` in bits with the hidden one, exponent width."""

    precision: int
    exponent_bits: int
    bias: int = field(init=False)
    lowest: int = field(init=False)
    """Exponent of the unit of a subnormal: the smallest positive value is ``2**lowest``."""
    sign: int = field(init=False)
    magnitude: int = field(init=False)
    infinity: int = field(init=False)
    min_normal: int = field(init=False)
    quiet: int = field(init=False)
    default_nan: int = field(init=False)
    """The QNaN floating-point indefinite: negative, only the quiet bit set."""

    def __post_init__(self) -> None:
        p, width = self.precision, self.precision + self.exponent_bits
        bias = (1 << (self.exponent_bits - 1)) - 1
        infinity = ((1 << self.exponent_bits) - 1) << (p - 1)
        for name, value in {
            "bias": bias,
            "lowest": 2 - bias - p,
            "sign": 1 << (width - 1),
            "magnitude": (1 << (width - 1)) - 1,
            "infinity": infinity,
            "min_normal": 1 << (p - 1),
            "quiet": 1 << (p - 2),
            "default_nan": 1 << (width - 1) | infinity | 1 << (p - 2),
        }.items():
            object.__setattr__(self, name, value)


F16, F32, F64 = Format(11, 5), Format(24, 8), Format(53, 11)


def unmasked(flags: int, mxcsr: int) -> int:
    """The flags among ``flags`` that raise #XM under MXCSR's masks."""
    return flags & ~(mxcsr >> 7) & FLAGS


def committed(flags: int, mxcsr: int) -> int:
    """The flags an instruction leaves in MXCSR when its elements raised ``flags``.

    If a pre-computation exception (IE, DE, ZE) of any element is unmasked, the post-computation
    ones of all elements are not detected (SDM Vol. 1, 11.5.2.3 and 11.5.3.2).
    """
    if unmasked(flags & (IE | DE | ZE), mxcsr):
        return flags & (IE | DE | ZE)
    return flags


def is_nan(f: Format, a: int) -> bool:
    return a & f.magnitude > f.infinity


def is_signaling(f: Format, a: int) -> bool:
    return a & f.magnitude > f.infinity and not a & f.quiet


def _propagate(f: Format, *operands: int) -> Result:
    """The first NaN of the operands, quieted; IE if any of them is signaling."""
    flags = IE if any(is_signaling(f, a) for a in operands) else 0
    return next(a for a in operands if is_nan(f, a)) | f.quiet, flags


def flush(f: Format, a: int, mxcsr: int) -> int:
    """The operand as DAZ lets the operation see it: a denormal becomes a zero of its sign."""
    if mxcsr & DAZ and a & f.magnitude < f.min_normal:
        return a & f.sign
    return a


def _denormals(f: Format, *operands: int) -> int:
    """DE if one of the operands is a denormal."""
    low, magnitude = f.min_normal, f.magnitude
    for a in operands:
        if 0 < a & magnitude < low:
            return DE
    return 0


def _split(f: Format, a: int) -> tuple[int, int]:
    """``(m, e)`` with magnitude ``m * 2**e``, for finite ``a``."""
    magnitude = a & f.magnitude
    biased = magnitude >> (f.precision - 1)
    if biased:
        return (magnitude & (f.min_normal - 1)) | f.min_normal, biased + f.lowest - 1
    return magnitude, f.lowest


def _shift(m: int, by: int, negative: int, rounding: int) -> Result:
    """``m * 2**-by`` rounded to an integer, and PE if that is inexact."""
    if by <= 0:
        return m << -by, 0
    q = m >> by
    rest = m - (q << by)
    if not rest:
        return q, 0
    if rounding == RNE:
        half = 1 << (by - 1)
        if rest > half or (rest == half and q & 1):
            q += 1
    elif rounding == (RDOWN if negative else RUP):
        q += 1
    return q, PE


def round_pack(f: Format, sign: int, m: int, e: int, mxcsr: int) -> Result:
    """Round ``m * 2**e`` (``m`` > 0) to the format; ``sign`` is 0 or the format's sign bit.

    A value that is not a finite binary fraction is given with at least ``precision + 2`` bits of
    ``m``, the last of which is set to say that something follows.
    """
    p = f.precision
    rounding = mxcsr >> 13 & 3
    drop = m.bit_length() - p
    floor = f.lowest - e  # how many bits to drop so that the unit is a subnormal's
    if drop < floor:
        return _round_tiny(f, sign, m, floor, drop, mxcsr)
    q, inexact = _shift(m, drop, sign, rounding)
    magnitude = ((drop - floor) << (p - 1)) + q  # a carry out of q goes to the exponent
    if magnitude < f.infinity:
        return sign | magnitude, inexact
    if rounding == RNE or rounding == (RDOWN if sign else RUP):
        magnitude = f.infinity
    else:
        magnitude = f.infinity - 1
    return sign | magnitude, OE | (PE if mxcsr & OM else inexact)


def _round_tiny(f: Format, sign: int, m: int, floor: int, drop: int, mxcsr: int) -> Result:
    """:func:`round_pack` for a magnitude below the smallest normal."""
    rounding = mxcsr >> 13 & 3
    unbounded, unbounded_inexact = _shift(m, drop, sign, rounding)
    tiny = drop + 1 < floor or not unbounded >> f.precision
    if tiny and not mxcsr & UM:
        return sign | _shift(m, floor, sign, rounding)[0], UE | unbounded_inexact
    if tiny and mxcsr & FTZ:
        return sign, UE | PE
    q, inexact = _shift(m, floor, sign, rounding)
    return sign | q, (UE | PE if tiny else PE) if inexact else 0


def _sum(f: Format, a: tuple[int, int, int], b: tuple[int, int, int], mxcsr: int) -> Result:
    """Add two finite values ``(sign, m, e)`` with one rounding."""
    if a[2] < b[2]:
        a, b = b, a
    sign_a, m_a, e_a = a
    sign_b, m_b, e_b = b
    if not m_b:
        if m_a:
            return round_pack(f, sign_a, m_a, e_a, mxcsr)
        return _zero(f, sign_a, sign_b, mxcsr), 0
    if not m_a:
        return round_pack(f, sign_b, m_b, e_b, mxcsr)
    guard = f.precision + 3
    if e_b + m_b.bit_length() < e_a - guard:  # b only says that something follows a
        m_a <<= guard + 1
        e_b = e_a - guard - 1
        m_b = 1
    else:
        m_a <<= e_a - e_b
    total = m_a + m_b if sign_a == sign_b else m_a - m_b
    if total > 0:
        return round_pack(f, sign_a, total, e_b, mxcsr)
    if total < 0:
        return round_pack(f, sign_b, -total, e_b, mxcsr)
    return _zero(f, sign_a, sign_b, mxcsr), 0


def _zero(f: Format, sign_a: int, sign_b: int, mxcsr: int) -> int:
    """The zero that a sum of opposite values, or of two zeros, is."""
    if sign_a == sign_b:
        return sign_a
    return f.sign if mxcsr >> 13 & 3 == RDOWN else 0


def add(f: Format, a: int, b: int, mxcsr: int) -> Result:
    infinity, magnitude = f.infinity, f.magnitude
    if a & magnitude > infinity or b & magnitude > infinity:
        return _propagate(f, a, b)
    if mxcsr & DAZ:
        a, b = flush(f, a, mxcsr), flush(f, b, mxcsr)
    if a & magnitude == infinity:
        if b == a ^ f.sign:
            return f.default_nan, IE
        return a, _denormals(f, b)
    flags = _denormals(f, a, b)
    if b & magnitude == infinity:
        return b, flags
    bits, more = _sum(f, (a & f.sign, *_split(f, a)), (b & f.sign, *_split(f, b)), mxcsr)
    return bits, flags | more


def sub(f: Format, a: int, b: int, mxcsr: int) -> Result:
    return add(f, a, b if is_nan(f, b) else b ^ f.sign, mxcsr)


def mul(f: Format, a: int, b: int, mxcsr: int) -> Result:
    if a & f.magnitude > f.infinity or b & f.magnitude > f.infinity:
        return _propagate(f, a, b)
    if mxcsr & DAZ:
        a, b = flush(f, a, mxcsr), flush(f, b, mxcsr)
    sign = (a ^ b) & f.sign
    magnitudes = a & f.magnitude, b & f.magnitude
    if f.infinity in magnitudes:
        return (f.default_nan, IE) if 0 in magnitudes else (sign | f.infinity, _denormals(f, a, b))
    flags = _denormals(f, a, b)
    if 0 in magnitudes:
        return sign, flags
    (m_a, e_a), (m_b, e_b) = _split(f, a), _split(f, b)
    bits, more = round_pack(f, sign, m_a * m_b, e_a + e_b, mxcsr)
    return bits, flags | more


def div(f: Format, a: int, b: int, mxcsr: int) -> Result:
    if a & f.magnitude > f.infinity or b & f.magnitude > f.infinity:
        return _propagate(f, a, b)
    if mxcsr & DAZ:
        a, b = flush(f, a, mxcsr), flush(f, b, mxcsr)
    sign = (a ^ b) & f.sign
    dividend, divisor = a & f.magnitude, b & f.magnitude
    if dividend == divisor and dividend in (0, f.infinity):
        return f.default_nan, IE
    if dividend == f.infinity:
        return sign | f.infinity, _denormals(f, b)
    if not divisor:
        return sign | f.infinity, ZE
    flags = _denormals(f, a, b)
    if divisor == f.infinity or not dividend:
        return sign, flags
    (m_a, e_a), (m_b, e_b) = _split(f, a), _split(f, b)
    extra = max(0, f.precision + 2 + m_b.bit_length() - m_a.bit_length())
    q, rest = divmod(m_a << extra, m_b)
    bits, more = round_pack(f, sign, q << 1 | (rest != 0), e_a - e_b - extra - 1, mxcsr)
    return bits, flags | more


def sqrt(f: Format, a: int, mxcsr: int) -> Result:
    if is_nan(f, a):
        return _propagate(f, a)
    a = flush(f, a, mxcsr)
    if not a & f.magnitude or a == f.infinity:
        return a, 0
    if a & f.sign:
        return f.default_nan, IE
    m, e = _split(f, a)
    extra = 2 * f.precision + 4
    extra += (e - extra) & 1
    m <<= extra
    root = isqrt(m)
    bits, more = round_pack(f, 0, root << 1 | (root * root != m), (e - extra) // 2 - 1, mxcsr)
    return bits, _denormals(f, a) | more


def fma(
    f: Format,
    a: int,
    b: int,
    c: int,
    mxcsr: int,
    negate_product: bool = False,
    negate_addend: bool = False,
) -> Result:
    """``±(a * b) ± c`` with one rounding; the first NaN of ``a, b, c`` is what comes out.

    The digits of VFMADD132/213/231 name the operands in just this order.
    """
    infinity, magnitude = f.infinity, f.magnitude
    if a & magnitude > infinity or b & magnitude > infinity or c & magnitude > infinity:
        return _propagate(f, a, b, c)
    if mxcsr & DAZ:
        a, b, c = flush(f, a, mxcsr), flush(f, b, mxcsr), flush(f, c, mxcsr)
    sign = (a ^ b) & f.sign
    if negate_product:
        sign ^= f.sign
    if negate_addend:
        c ^= f.sign
    infinite = a & magnitude == infinity or b & magnitude == infinity
    if infinite and (not a & magnitude or not b & magnitude or c == (sign ^ f.sign) | infinity):
        return f.default_nan, IE
    flags = _denormals(f, a, b, c)
    if infinite:
        return sign | infinity, flags
    if c & magnitude == infinity:
        return c, flags
    (m_a, e_a), (m_b, e_b), (m_c, e_c) = _split(f, a), _split(f, b), _split(f, c)
    bits, more = _sum(f, (sign, m_a * m_b, e_a + e_b), (c & f.sign, m_c, e_c), mxcsr)
    return bits, flags | more


def minimum(f: Format, a: int, b: int, mxcsr: int) -> Result:
    """``a < b ? a : b``, as MINPS: the second operand for a NaN or two zeros."""
    return _select(f, a, b, mxcsr, LESS)


def maximum(f: Format, a: int, b: int, mxcsr: int) -> Result:
    """``a > b ? a : b``, as MAXPS."""
    return _select(f, a, b, mxcsr, GREATER)


def _select(f: Format, a: int, b: int, mxcsr: int, wanted: int) -> Result:
    relation, flags = compare(f, a, b, mxcsr, signaling=True)
    return flush(f, a if relation == wanted else b, mxcsr), flags


UNORDERED, LESS, EQUAL, GREATER = 1, 2, 4, 8


def compare(f: Format, a: int, b: int, mxcsr: int, signaling: bool) -> Result:
    """How ``a`` stands to ``b`` (UNORDERED, LESS, EQUAL or GREATER), and the flags.

    ``signaling`` comparisons raise IE for a quiet NaN too.
    """
    if is_nan(f, a) or is_nan(f, b):
        raises = signaling or is_signaling(f, a) or is_signaling(f, b)
        return UNORDERED, IE if raises else 0
    a, b = flush(f, a, mxcsr), flush(f, b, mxcsr)
    x, y = _ordinal(f, a), _ordinal(f, b)
    return LESS if x < y else GREATER if x > y else EQUAL, _denormals(f, a, b)


def _ordinal(f: Format, a: int) -> int:
    return -(a & f.magnitude) if a & f.sign else a


_U, _L, _E, _G = UNORDERED, LESS, EQUAL, GREATER
PREDICATES: tuple[int, ...] = 2 * (
    _E, _L, _L | _E, _U, _U | _L | _G, _U | _E | _G, _U | _G, _L | _E | _G,
    _U | _E, _U | _L, _U | _L | _E, 0, _L | _G, _E | _G, _G, _U | _L | _E | _G,
)  # fmt: skip
"""For each predicate of VCMPPS the relations it holds for (SDM Vol. 2, table 3-1)."""

SIGNALING_PREDICATES = frozenset({1, 2, 5, 6, 9, 10, 13, 14, 16, 19, 20, 23, 24, 27, 28, 31})
"""The predicates that raise IE for a quiet NaN: LT_OS and its like."""


def compare_predicate(f: Format, a: int, b: int, predicate: int, mxcsr: int) -> Result:
    """``(1 or 0, flags)`` of VCMPPS and its like, ``predicate`` 0 to 31."""
    relation, flags = compare(f, a, b, mxcsr, predicate in SIGNALING_PREDICATES)
    return int(PREDICATES[predicate] & relation != 0), flags


def convert(source: Format, target: Format, a: int, mxcsr: int) -> Result:
    """Change the format; a NaN keeps the top of its payload and becomes quiet."""
    if is_nan(source, a):
        payload = a & (source.quiet - 1)
        down = source.precision - target.precision
        payload = payload >> down if down >= 0 else payload << -down
        sign = target.sign if a & source.sign else 0
        flags = IE if is_signaling(source, a) else 0
        return sign | target.infinity | target.quiet | payload, flags
    a = flush(source, a, mxcsr)
    sign = target.sign if a & source.sign else 0
    magnitude = a & source.magnitude
    if not magnitude:
        return sign, 0
    if magnitude == source.infinity:
        return sign | target.infinity, 0
    bits, flags = round_pack(target, sign, *_split(source, a), mxcsr)
    return bits, flags | _denormals(source, a)


def to_int(f: Format, a: int, width: int, signed: bool, mxcsr: int) -> Result:
    """To an integer of ``width`` bits, as its bit pattern, in MXCSR's rounding mode.

    Out of range, infinite or NaN gives the integer indefinite (signed: only the top bit set;
    unsigned: all bits) and IE. Conversions to integers never raise DE.
    """
    indefinite = 1 << (width - 1) if signed else (1 << width) - 1
    if a & f.magnitude >= f.infinity:
        return indefinite, IE
    a = flush(f, a, mxcsr)
    negative = a & f.sign
    m, e = _split(f, a)
    if e > width:  # far out of range: do not build a huge number
        return indefinite, IE
    value, inexact = _shift(m, -e, negative, mxcsr >> 13 & 3)
    if negative:
        value = -value
    low, high = (-1 << (width - 1), 1 << (width - 1)) if signed else (0, 1 << width)
    if not low <= value < high:
        return indefinite, IE
    return value & ((1 << width) - 1), inexact


def from_int(f: Format, value: int, mxcsr: int) -> Result:
    """From a Python integer of any size."""
    if not value:
        return 0, 0
    return round_pack(f, f.sign if value < 0 else 0, abs(value), 0, mxcsr)


def round_integral(f: Format, a: int, mxcsr: int) -> Result:
    """To an integral value in the same format, in MXCSR's rounding mode, as ROUNDPS."""
    if is_nan(f, a):
        return _propagate(f, a)
    a = flush(f, a, mxcsr)
    sign = a & f.sign
    m, e = _split(f, a)
    if e >= 0 or not m:
        return a, 0
    value, inexact = _shift(m, -e, sign, mxcsr >> 13 & 3)
    if not value:
        return sign, inexact
    return round_pack(f, sign, value, 0, mxcsr)[0], inexact
