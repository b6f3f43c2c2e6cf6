"""AVX-NE-CONVERT: single precision from and to halves and bfloat16, without exceptions.

SDM Vol. 2: VBCSTNE*, VCVTNE*. MXCSR is neither looked at nor changed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from handlers import softfloat as soft
from handlers.operands import Form, Lanes, Step
from handlers.softfloat import F16, F32, MASKS
from handlers.vector import Extent, Plan, operation, planned

_LOWEST, _SPAN = (np.array(n, "u4") for n in (F32.min_normal, F32.infinity - F32.min_normal))
"""A magnitude is a normal number if it is at least the first and less than the sum of both."""


def _to_brain(bits: int) -> int:
    """Round to nearest even; denormals become zeros, NaNs quiet."""
    if bits & F32.magnitude > F32.infinity:
        return bits >> 16 | F32.quiet >> 16
    if bits & F32.magnitude < F32.min_normal:
        return (bits & F32.sign) >> 16
    return bits + 0x7FFF + (bits >> 16 & 1) >> 16


@operation("vcvtneps2bf16", "u4->u2", staged=True)
def to_bfloat16(form: Form, a: Lanes, out: Lanes) -> Step:
    """Lanes are bit patterns. Normal numbers in one go, else lane by lane."""
    rounded, excess = np.empty_like(a), np.empty_like(a)
    magnitudes, half, one, sixteen = (np.array(n, "u4") for n in (F32.magnitude, 0x7FFF, 1, 16))
    normal, all_normal = bytearray(len(a)), b"\1" * len(a)
    is_normal = np.frombuffer(normal, np.bool_)

    def step() -> None:
        np.bitwise_and(a, magnitudes, excess)
        np.subtract(excess, _LOWEST, excess)  # wraps round for what lies below
        np.less(excess, _SPAN, is_normal)
        if normal != all_normal:
            out[:] = [_to_brain(bits) for bits in a.tolist()]
            return
        np.right_shift(a, sixteen, rounded)
        np.bitwise_and(rounded, one, rounded)
        np.add(rounded, half, rounded)
        np.add(rounded, a, rounded)
        np.right_shift(rounded, sixteen, rounded)
        out[...] = rounded

    return step


@lru_cache(maxsize=1 << 16)
def _half_to_single(bits: int) -> int:
    """Exact, denormals too; a NaN becomes quiet."""
    return soft.convert(F16, F32, bits, MASKS)[0]


def _brain_to_single(bits: int) -> int:
    """Exact; even a signaling NaN stays as it is."""
    return bits << 16


def _each(convert: Callable[[int], int], column: int) -> Plan:
    """The even (0) or odd (1) lanes; the only one goes to all of the destination."""

    def plan(form: Form, a: Lanes, out: Lanes) -> Step:
        lanes = a[column::2]

        def step() -> None:
            out[:] = [convert(bits) for bits in lanes.tolist()]

        return step

    return plan


TO_SINGLE = [
    planned(name, "u2->u4", _each(convert, column), Extent.WHOLE)
    for name, convert, column in (
        ("vcvtneeph2ps", _half_to_single, 0),
        ("vcvtneoph2ps", _half_to_single, 1),
        ("vbcstnesh2ps", _half_to_single, 0),
        ("vcvtneebf162ps", _brain_to_single, 0),
        ("vcvtneobf162ps", _brain_to_single, 1),
        ("vbcstnebf162ps", _brain_to_single, 0),
    )
]
