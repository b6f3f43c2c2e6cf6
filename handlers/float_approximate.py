"""Approximate reciprocals: RCPPS, RCPSS, RSQRTPS, RSQRTSS.

The manual gives an error bound of 1.5 * 2**-12 and no table, and CPUs differ within it. Here the
result is the exact value rounded to 12 significant bits, the same on every host. Denormals count
as zeros, results below the smallest normal are zeros, no flag is raised and MXCSR has no influence
(SDM Vol. 2, RCPPS, RSQRTPS).
"""

from __future__ import annotations

from functools import partial

import numpy as np

from handlers import float_forms
from handlers.fenv import bits_of, quietly
from handlers.operands import Form, Lanes, Step
from handlers.softfloat import F32
from handlers.vector import planned

_DROPPED = F32.precision - 12
_HALF, _KEPT = np.uint32(1 << (_DROPPED - 1)), np.uint32(~((1 << _DROPPED) - 1) & 0xFFFFFFFF)
_SIGN, _MAGNITUDE = np.uint32(F32.sign), np.uint32(F32.magnitude)


def _approximate(form: Form, a: Lanes, out: Lanes) -> Step:
    square_root = "rsqrt" in form.insn.mnemonic
    return quietly(partial(_compute, bits_of(a), bits_of(out), square_root))


def _compute(a: Lanes, out: Lanes, square_root: bool) -> None:
    sign, magnitude = a & _SIGN, a & _MAGNITUDE
    flushed = sign | np.where(magnitude < F32.min_normal, np.uint32(0), magnitude)
    wide = flushed.view("f4").astype("f8")
    single = (1 / np.sqrt(wide) if square_root else 1 / wide).astype("f4").view("u4")
    result = single + _HALF & _KEPT
    result = np.where(result & _MAGNITUDE < F32.min_normal, sign, result)
    result = np.where(np.isinf(single.view("f4")), sign | np.uint32(F32.infinity), result)
    if square_root:
        invalid = (sign != 0) & (flushed != _SIGN)
        result = np.where(invalid, np.uint32(F32.default_nan), result)
    out[...] = np.where(magnitude > F32.infinity, a | np.uint32(F32.quiet), result)


APPROXIMATE = [
    planned(f"{name}{suffix}", f"{lane}->{lane}", _approximate, extent, staged=True)
    for name in ("rcp", "rsqrt")
    for suffix, lane, extent in (float_forms.PACKED[0], float_forms.SCALAR[0])
]
