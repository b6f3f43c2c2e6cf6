"""Approximate reciprocals: RCPPS, RCPSS, RSQRTPS, RSQRTSS.

The manual gives an error bound of 1.5 * 2**-12 and no table, and CPUs differ within it. Here the
result is the exact value rounded to 12 significant bits, the same on every host. Denormals count
as zeros, results below the smallest normal are zeros, no flag is raised and MXCSR has no influence
(SDM Vol. 2, RCPPS, RSQRTPS).
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from handlers import float_forms
from handlers.fenv import bits_of, quietly
from handlers.float_forms import items
from handlers.operands import Form, Lanes, Step
from handlers.softfloat import F32

_DROPPED = F32.precision - 12
_HALF_INT, _KEPT_INT = 1 << (_DROPPED - 1), -1 << _DROPPED & 0xFFFF_FFFF
_HALF, _KEPT, _SIGN, _MAGNITUDE = (
    np.array(bits, "u4") for bits in (_HALF_INT, _KEPT_INT, F32.sign, F32.magnitude)
)


def _approximate(form: Form, a: Lanes, out: Lanes) -> Step:
    square_root = "rsqrt" in form.insn.mnemonic
    careful = quietly(partial(_compute, bits_of(a), bits_of(out), square_root))
    lowest, span = _plain_range(square_root)
    wide, one, bits = np.empty(len(a)), np.array(1.0), bits_of(out)
    distance, within = np.empty(len(a), "u4"), bytearray(len(a))
    is_plain, all_plain = np.frombuffer(within, np.bool_), b"\1" * len(a)
    source = bits_of(a)

    def step() -> None:
        if square_root:
            np.subtract(source, lowest, distance)  # wraps round for what lies below
        else:
            np.bitwise_and(source, _MAGNITUDE, distance)
            np.subtract(distance, lowest, distance)
        np.less(distance, span, is_plain)
        if within != all_plain:
            careful()
            return
        wide[...] = a
        if square_root:
            np.sqrt(wide, wide)
        np.divide(one, wide, wide)
        out[...] = wide
        np.add(bits, _HALF, bits)
        np.bitwise_and(bits, _KEPT, bits)

    return step


def _approximate_one(form: Form, a: Lanes, out: Lanes) -> Step:
    """One lane, by Python's floats where it needs no special care."""
    square_root = "rsqrt" in form.insn.mnemonic
    careful = quietly(partial(_compute, bits_of(a), bits_of(out), square_root))
    low, high = 2.0**-126, 2.0**128 if square_root else 2.0**126
    source, target, bits = items(a), items(out), items(bits_of(out))

    def step() -> None:
        x = source[0]
        if not low <= (x if square_root else abs(x)) < high:
            careful()
            return
        target[0] = 1.0 / math.sqrt(x) if square_root else 1.0 / x
        bits[0] = bits[0] + _HALF_INT & _KEPT_INT

    return step


def _plain_range(square_root: bool) -> tuple[Lanes, Lanes]:
    """The bits of the least number that needs no special care, and how many there are.

    These are normal, with a normal result; for a square root positive.
    """
    end = F32.infinity if square_root else 253 << F32.precision - 1  # 1 / 2**126 is the last
    return np.array(F32.min_normal, "u4"), np.array(end - F32.min_normal, "u4")


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
    operation
    for name in ("rcp", "rsqrt")
    for plan, suffixes in (
        (_approximate, float_forms.PACKED[:1]),
        (_approximate_one, float_forms.SCALAR[:1]),
    )
    for operation in float_forms.family(name, 1, plan, suffixes, staged=True)
]
