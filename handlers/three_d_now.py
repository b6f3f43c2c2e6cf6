"""3DNow! and its extensions: pairs of single-precision numbers in MMX registers.

AMD 3DNow! Technology Manual (21928), Extensions to the 3DNow! and MMX Instruction Sets (22466).

The arithmetic rounds to nearest, takes denormals for zeros, gives zero for them, and the largest
number instead of an infinity. Infinities and NaNs as operands are undefined. There is no status.

PFRCP and PFRSQRT are approximations within a bound, which PFRCPIT1, PFRSQIT1 and PFRCPIT2 then
improve to full precision. Here they are of full precision at once, and the later steps pass on
their second operand, which in the sequences of the manual is the reciprocal.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from handlers import arithmetic
from handlers import softfloat as soft
from handlers.mmx import MmxOperation, on_mmx
from handlers.operands import Form, Lanes, Step
from handlers.shuffle import permute
from handlers.softfloat import DAZ, F32, F64, FTZ, MASKS, RZERO
from handlers.vector import Extent, Plan, planned

_NEAREST = MASKS | DAZ | FTZ
_ONE = F32.bias << F32.precision - 1
_ONE_64 = F64.bias << F64.precision - 1
_LARGEST = F32.infinity - 1

Binary = Callable[[int, int], int]


def _finite(bits: int) -> int:
    """The largest number instead of an infinity."""
    return bits & F32.sign | _LARGEST if bits & F32.magnitude == F32.infinity else bits


def _add(a: int, b: int) -> int:
    return _finite(soft.add(F32, a, b, _NEAREST)[0])


def _subtract(a: int, b: int) -> int:
    return _finite(soft.sub(F32, a, b, _NEAREST)[0])


def _multiply(a: int, b: int) -> int:
    return _finite(soft.mul(F32, a, b, _NEAREST)[0])


def _relation(a: int, b: int) -> int:
    return soft.compare(F32, a, b, _NEAREST, False)[0]


def _positive_zero(bits: int) -> int:
    """A zero has no sign; denormals are zeros."""
    return bits if bits & F32.magnitude >= F32.min_normal else 0


def _minimum(a: int, b: int) -> int:
    return _positive_zero(b if _relation(a, b) == soft.GREATER else a)


def _maximum(a: int, b: int) -> int:
    return _positive_zero(b if _relation(a, b) == soft.LESS else a)


def _holds(relations: int) -> Binary:
    return lambda a, b: 0xFFFF_FFFF if _relation(a, b) & relations else 0


def _lane_by_lane(function: Binary) -> Plan:
    def plan(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
        def step() -> None:
            out[:] = [function(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]

        return step

    return plan


def _within(low: Binary, high: Binary) -> Plan:
    """The two lanes of the first operand make the low lane, those of the second the high one."""

    def plan(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
        def step() -> None:
            out[:] = low(*a.tolist()), high(*b.tolist())

        return step

    return plan


def _operation(name: str, plan: Plan, signature: str = "u4,u4->u4") -> MmxOperation:
    return on_mmx(planned(name, signature, plan, Extent.WHOLE))


ARITHMETIC = [
    _operation(name, _lane_by_lane(function))
    for name, function in (
        ("pfadd", _add),
        ("pfsub", _subtract),
        ("pfsubr", lambda a, b: _subtract(b, a)),
        ("pfmul", _multiply),
        ("pfmin", _minimum),
        ("pfmax", _maximum),
        ("pfcmpeq", _holds(soft.EQUAL)),
        ("pfcmpgt", _holds(soft.GREATER)),
        ("pfcmpge", _holds(soft.GREATER | soft.EQUAL)),
        ("pfrcpit1", lambda a, b: b),
        ("pfrsqit1", lambda a, b: b),
        ("pfrcpit2", lambda a, b: b),
    )
]
ACCUMULATE = [
    _operation("pfacc", _within(_add, _add)),
    _operation("pfnacc", _within(_subtract, _subtract)),
    _operation("pfpnacc", _within(_subtract, _add)),
]


def _reciprocal(bits: int) -> int:
    return _finite(soft.div(F32, _ONE, bits, _NEAREST)[0])


def _reciprocal_root(bits: int) -> int:
    """Of the magnitude, with the sign of the operand."""
    magnitude = bits & F32.magnitude
    root = soft.sqrt(F64, soft.convert(F32, F64, magnitude, _NEAREST)[0], MASKS)[0]
    inverse = soft.div(F64, _ONE_64, root, MASKS)[0]
    return bits & F32.sign | _finite(soft.convert(F64, F32, inverse, _NEAREST)[0])


def _to_both(function: Callable[[int], int]) -> Plan:
    """Of the low lane, to both lanes."""

    def plan(form: Form, a: Lanes, out: Lanes) -> Step:
        def step() -> None:
            out[:] = function(int(a[0]))

        return step

    return plan


RECIPROCALS = [
    _operation("pfrcp", _to_both(_reciprocal), "u4->u4"),
    _operation("pfrsqrt", _to_both(_reciprocal_root), "u4->u4"),
]


def _to_integers(bits: int) -> Plan:
    """Truncated, and saturated to ``bits``, sign-extended."""
    low, high = -1 << bits - 1, (1 << bits - 1) - 1

    def plan(form: Form, a: Lanes, out: Lanes) -> Step:
        def step() -> None:
            out[:] = [max(low, min(high, int(value))) for value in np.nan_to_num(a).tolist()]

        return step

    return plan


def _from_integers(form: Form, a: Lanes, out: Lanes) -> Step:
    """Rounded toward zero."""

    def step() -> None:
        out[:] = [soft.from_int(F32, value, MASKS | RZERO << 13)[0] for value in a.tolist()]

    return step


def _from_words(form: Form, a: Lanes, out: Lanes) -> Step:
    """The low words of the lanes, which are exact."""
    words = a[::2]

    def step() -> None:
        out[...] = words

    return step


CONVERSIONS = [
    _operation("pf2id", _to_integers(32), "f4->i4"),
    _operation("pf2iw", _to_integers(16), "f4->i4"),
    _operation("pi2fd", _from_integers, "i4->u4"),
    _operation("pi2fw", _from_words, "i2->f4"),
]


def _multiply_high_rounded(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    def step() -> None:
        rows = zip(a.tolist(), b.tolist(), strict=True)
        out[:] = [x * y + 0x8000 >> 16 for x, y in rows]

    return step


INTEGERS = [
    _operation("pmulhrw", _multiply_high_rounded, "i2,i2->i2"),
    _operation("pavgusb", arithmetic.AVERAGE[0].plan, "u1,u1->u1"),
    on_mmx(permute("pswapd", "u4->u4", lambda form: [1, 0])),
]
