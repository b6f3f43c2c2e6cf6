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
from handlers.vector import Extent, Plan, lanewise, planned

_QUIET = np.uint32(F32.quiet >> 16)
_ONE, _HALF, _SIXTEEN = np.uint32(1), np.uint32(0x7FFF), np.uint32(16)
_SIGN, _MAGNITUDE = np.uint32(F32.sign), np.uint32(F32.magnitude)
_INFINITY, _MIN_NORMAL = np.uint32(F32.infinity), np.uint32(F32.min_normal)


def to_bfloat16(a: Lanes, out: Lanes) -> None:
    """Round to nearest even; denormals become zeros, NaNs quiet. Lanes as bit patterns."""
    magnitude = a & _MAGNITUDE
    rounded = a + _HALF + (a >> _SIXTEEN & _ONE) >> _SIXTEEN
    rounded = np.where(magnitude > _INFINITY, a >> _SIXTEEN | _QUIET, rounded)
    out[...] = np.where(magnitude < _MIN_NORMAL, (a & _SIGN) >> _SIXTEEN, rounded)


TO_BFLOAT16 = lanewise("vcvtneps2bf16", "u4->u2", to_bfloat16)


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
