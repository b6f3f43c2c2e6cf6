"""Conversions between floating-point formats and between floating point and integers.

SDM Vol. 2: CVTPS2PD ... CVTTSS2SI, VCVTPH2PS, VCVTPS2PH.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from handlers import softfloat as soft
from handlers.fenv import (
    Exact,
    Reference,
    bind_exact,
    bind_float,
    bind_mxcsr,
    bits_of,
    bracket,
    each_lane,
    quietly,
)
from handlers.float_forms import FORMATS, SHORT_WAY, SHORT_WAY_BITS, items, normal_range
from handlers.operands import Form, Lanes, Step
from handlers.softfloat import DAZ, DE, F16, F32, FTZ, IE, MASKS, PE, RNE, RZERO, Format, Result
from handlers.vector import Extent, lanewise, planned

_ROUNDING = 0x6000


def _assign(out: Lanes, value: Lanes) -> Step:
    """``out[...] = value``: NumPy's cast, without the cost of ``np.copyto``."""
    return partial(out.__setitem__, Ellipsis, value)


def _between_floats(form: Form, a: Lanes, out: Lanes) -> Step:
    source, target = FORMATS[a.itemsize], FORMATS[out.itemsize]

    def reference(_f: Format, bits: int, mxcsr: int) -> Result:
        return soft.convert(source, target, bits, mxcsr)

    return bind_float(form.cpu, [_assign(out, a)], each_lane(reference, source, a), out)


def _single_to_double(form: Form, a: Lanes, out: Lanes) -> Step:
    """CVTSS2SD: a normal number stays what it is."""
    take_full_way = _between_floats(form, a, out)
    low, high = normal_range(F32)
    source, target = items(a), items(out)

    def step() -> None:
        value = source[0]
        if low <= abs(value) <= high:
            target[0] = value
        else:
            take_full_way()

    return step


def _signed(bits: int, size: int) -> int:
    return bits - (1 << 8 * size) if bits >> (8 * size - 1) else bits


def _from_integers(a: Lanes) -> Reference:
    def reference(f: Format, bits: int, mxcsr: int) -> Result:
        return soft.from_int(f, _signed(bits, a.itemsize), mxcsr)

    return reference


def _integers_to_single(form: Form, a: Lanes, out: Lanes) -> Step:
    exact = each_lane(_from_integers(a), F32, a)
    return bind_float(form.cpu, [_assign(out, a)], exact, out)


def _integer_to_float(form: Form, a: Lanes, out: Lanes) -> Step:
    """CVTSI2SS/SD: an integer that fits the precision needs no rounding.

    Others take the short way if they can; to single only from integers that are doubles.
    """
    f = FORMATS[out.itemsize]
    careful = bind_exact(form.cpu, each_lane(_from_integers(a), f, a), out)
    limit, short_limit = 1 << f.precision, 1 << (53 if f is F32 else 64)
    source, target, read = items(a), items(out), bind_mxcsr(form.cpu)

    def step() -> None:
        value = source[0]
        if -limit <= value <= limit:
            target[0] = value
            return
        mxcsr = read()
        if mxcsr & SHORT_WAY_BITS == SHORT_WAY and -short_limit <= value <= short_limit:
            target[0] = value
        else:
            careful(mxcsr)

    return step


def _truncating(form: Form) -> bool:
    return "cvtt" in form.insn.mnemonic


def _to_integers_exact(form: Form, a: Lanes, out: Lanes) -> Exact:
    width, truncating = 8 * out.itemsize, _truncating(form)

    def reference(f: Format, bits: int, mxcsr: int) -> Result:
        return soft.to_int(f, bits, width, True, mxcsr | _ROUNDING if truncating else mxcsr)

    return each_lane(reference, FORMATS[a.itemsize], a)


_MAGIC = 1.5 * 2.0**52 + 2.0**31
"""Added to a double in the range of a 32-bit integer it rounds it to an integer, plus 2**31,
that stands in the low half of the sum."""
_MAGIC_HIGH = int(np.array([_MAGIC]).view("u8")[0]) >> 32


def _to_integers(form: Form, a: Lanes, out: Lanes) -> Step:
    """CVT(T)PS2DQ, CVT(T)PD2DQ. They raise IE and PE but never DE."""
    read, write = bind_mxcsr(form.cpu), form.cpu.registers.bank.write
    truncating = _truncating(form)
    careful = bind_exact(form.cpu, _to_integers_exact(form, a, out), out)
    truncate, round_off = _by_cast(a, out), _by_addition(a, out)
    if truncate is None or round_off is None:
        return lambda: careful(read())

    def step() -> None:
        mxcsr = read()
        if mxcsr & MASKS != MASKS:
            careful(mxcsr)
            return
        to_zero = truncating or mxcsr & _ROUNDING == _ROUNDING
        flags = truncate(mxcsr) if to_zero else round_off(mxcsr)
        if flags & IE:
            careful(mxcsr)
        elif flags & ~mxcsr & PE:
            write("mxcsr", mxcsr | PE)

    return step


def _by_cast(a: Lanes, out: Lanes) -> Callable[[int], int] | None:
    """Truncate by the C cast; ``out`` is written and the flags are right unless IE is raised."""
    return bracket(_assign(out, a))


def _by_addition(a: Lanes, out: Lanes) -> Callable[[int], int] | None:
    """Round as MXCSR says, not to zero, by the addition of a magic number.

    ``out`` is written and the flags are right unless IE is raised.
    """
    doubles, magic = np.zeros(len(a)), np.full(len(a), _MAGIC)

    def compute() -> None:
        doubles[...] = a
        np.add(doubles, magic, doubles)

    halves = doubles.view("u4")
    low, high = halves[0::2], halves[1::2]
    in_range = np.full(len(a), _MAGIC_HIGH, "u4").tobytes()
    flip = partial(np.bitwise_xor, low, np.full(len(a), 1 << 31, "u4"), bits_of(out))
    run = bracket(compute)
    if run is None:
        return None

    def round_off(mxcsr: int) -> int:
        flags = run(mxcsr)
        if high.tobytes() != in_range:
            return IE
        flip()
        return flags

    return round_off


_ROUNDERS: tuple[Callable[[float], int], ...] = (round, math.floor, math.ceil, int)


def _float_to_integer(form: Form, a: Lanes, out: Lanes) -> Step:
    """CVT(T)SS2SI, CVT(T)SD2SI on Python numbers, which are exact."""
    cpu, truncating = form.cpu, _truncating(form)
    careful = bind_exact(cpu, _to_integers_exact(form, a, out), out)
    low, high = -1 << (8 * out.itemsize - 1), 1 << (8 * out.itemsize - 1)
    below, above = float(low) - 1.0, float(high)
    source, target = items(a), items(out)
    read, write = bind_mxcsr(cpu), cpu.registers.bank.write

    def step() -> None:
        mxcsr = read()
        value = source[0]
        if below <= value < above and mxcsr & MASKS == MASKS:
            result = _ROUNDERS[RZERO if truncating else mxcsr >> 13 & 3](value)
            if low <= result < high and (value == 0 or abs(value) > 1e-30):
                target[0] = result
                if result != value and not mxcsr & PE:
                    write("mxcsr", mxcsr | PE)
                return
        careful(mxcsr)

    return step


def _halves_to_singles(form: Form, a: Lanes, out: Lanes) -> Step:
    """VCVTPH2PS: exact; DAZ does not apply and DE is not raised."""

    def reference(f: Format, bits: int, mxcsr: int) -> Result:
        single, flags = soft.convert(f, F32, bits, mxcsr & ~DAZ)
        return single, flags & ~DE

    careful = bind_exact(form.cpu, each_lane(reference, F16, a), out)
    nans = bytearray(len(a))
    widen = quietly(_assign(out, a))
    find_nans = partial(np.isnan, out, np.frombuffer(nans, np.bool_))

    def step() -> None:
        widen()
        find_nans()
        if any(nans):
            careful(form.cpu.mxcsr)

    return step


def _singles_to_halves(form: Form, a: Lanes, out: Lanes) -> Step:
    """VCVTPS2PH: rounded by the immediate, or by MXCSR if its bit 2 is set; FTZ does not apply."""
    imm = form.imm

    def reference(f: Format, bits: int, mxcsr: int) -> Result:
        if not imm & 4:
            mxcsr = mxcsr & ~_ROUNDING | (imm & 3) << 13
        return soft.convert(f, F16, bits, mxcsr & ~FTZ)

    careful = bind_exact(form.cpu, each_lane(reference, F32, a), out)
    read, write = bind_mxcsr(form.cpu), form.cpu.registers.bank.write
    narrow_to_nearest = _bind_narrowing(a, out)

    def step() -> None:
        mxcsr = read()
        rounding = mxcsr >> 13 & 3 if imm & 4 else imm & 3
        if rounding == RNE and mxcsr & MASKS == MASKS:
            flags = narrow_to_nearest()
            if flags is not None:
                if flags & ~mxcsr:
                    write("mxcsr", mxcsr | flags)
                return
        careful(mxcsr)

    return step


def _bind_narrowing(a: Lanes, out: Lanes) -> Callable[[], int | None]:
    """NumPy's cast to halves, which rounds to nearest, and its flags: PE or none.

    The answer is None if a lane is a NaN, overflows, or is inexact below the normal numbers.
    """
    back, halves = np.zeros_like(a), bits_of(out)
    inexact, tiny = bytearray(8), bytearray(8)
    is_inexact, is_abnormal = (np.frombuffer(x, np.bool_, len(a)) for x in (inexact, tiny))
    inexact_lanes, abnormal_lanes = (memoryview(x).cast("Q") for x in (inexact, tiny))
    low, high = np.uint16(F16.min_normal), np.uint16(F16.infinity - F16.min_normal)
    magnitude = np.zeros_like(halves)

    def narrow() -> int | None:
        out[...] = a
        back[...] = out
        np.not_equal(a, back, is_inexact)
        if not inexact_lanes[0]:
            return 0
        np.bitwise_and(halves, F16.magnitude, magnitude)
        np.subtract(magnitude, low, magnitude)  # wraps round for what lies below
        np.greater_equal(magnitude, high, is_abnormal)
        return None if inexact_lanes[0] & abnormal_lanes[0] else PE

    return quietly(narrow)


def _copy(a: Lanes, out: Any) -> None:
    out[...] = a


FLOAT_TO_FLOAT = [
    planned("cvtps2pd", "f4->f8", _between_floats, staged=True),
    planned("cvtpd2ps", "f8->f4", _between_floats, staged=True),
    planned("cvtss2sd", "f4->f8", _single_to_double, Extent.SCALAR),
    planned("cvtsd2ss", "f8->f4", _between_floats, Extent.SCALAR),
    planned("vcvtph2ps", "f2->f4", _halves_to_singles, staged=True),
    planned("vcvtps2ph", "f4->f2", _singles_to_halves, staged=True),
]

INTEGER_TO_FLOAT = [
    planned("cvtdq2ps", "i4->f4", _integers_to_single),
    lanewise("cvtdq2pd", "i4->f8", _copy, staged=True),
    planned("cvtsi2ss", "i*->f4", _integer_to_float, Extent.SCALAR),
    planned("cvtsi2sd", "i*->f8", _integer_to_float, Extent.SCALAR),
]

FLOAT_TO_INTEGER = [
    *(
        planned(f"cvt{t}{lane}2dq", f"{kind}->i4", _to_integers, staged=True)
        for t in ("", "t")
        for lane, kind in (("ps", "f4"), ("pd", "f8"))
    ),
    *(
        planned(f"cvt{t}{lane}2si", f"{kind}->i*", _float_to_integer, Extent.SCALAR)
        for t in ("", "t")
        for lane, kind in (("ss", "f4"), ("sd", "f8"))
    ),
]
