"""Integer arithmetic on lanes: add, subtract, multiply, average, minimum, maximum, absolute, sign.

SDM Vol. 2: PADD* PSUB* PMUL* PMADD* PAVG* PSADBW MPSADBW PABS* PSIGN* PMIN* PMAX* PH*.
NumPy's integer ufuncs wrap around, as the hardware does; where a result needs more bits, the
lanes are first copied to wider ones. What is slow in NumPy on so few lanes is avoided: ufuncs
that cast, broadcast an array or walk two strided axes (three times slower), reductions, and
``minimum`` and ``maximum``, which ``fmin`` and ``fmax`` do six times faster on integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from handlers.operands import Form, Lanes, Step
from handlers.vector import Extent, Plan, lanewise, operation, planned

_INTEGERS = ("b", 1), ("w", 2), ("d", 4), ("q", 8)


def _wide(size: int) -> list[tuple[str, int]]:
    return [(letter, width) for letter, width in _INTEGERS if width <= size]


ADD = [lanewise(f"padd{x}", f"u{n},u{n}->u{n}", np.add) for x, n in _wide(8)]
SUB = [lanewise(f"psub{x}", f"u{n},u{n}->u{n}", np.subtract) for x, n in _wide(8)]
MULTIPLY_LOW = [
    lanewise("pmullw", "u2,u2->u2", np.multiply),
    lanewise("pmulld", "u4,u4->u4", np.multiply),
]
MIN_MAX = [
    lanewise(f"p{name}{sign}{x}", f"{kind}{n},{kind}{n}->{kind}{n}", function)
    for name, function in (("min", np.fmin), ("max", np.fmax))
    for sign, kind in (("s", "i"), ("u", "u"))
    for x, n in _wide(4)
]
ABS = [lanewise(f"pabs{x}", f"i{n}->i{n}", np.absolute) for x, n in _wide(4)]


def saturate_into(wide: Lanes, out: Lanes) -> Step:
    """A step that clips ``wide`` in place to the range of ``out`` and stores it there."""
    limits = np.iinfo(out.dtype)
    low, high = np.array(limits.min, wide.dtype), np.array(limits.max, wide.dtype)

    def step() -> None:
        np.fmin(wide, high, wide)
        np.fmax(wide, low, wide)
        out[...] = wide

    return step


def _add_unsigned(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    """No more is added than there is room for: a + min(b, ~a)."""
    room = np.empty_like(a)

    def step() -> None:
        np.invert(a, room)
        np.fmin(room, b, room)
        np.add(a, room, out)

    return step


def _subtract_unsigned(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    """No more is subtracted than there is: a - min(a, b)."""
    taken = np.empty_like(a)

    def step() -> None:
        np.fmin(a, b, taken)
        np.subtract(a, taken, out)

    return step


def _signed_saturating(ufunc: Callable[..., Any]) -> Plan:
    def plan(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
        wide_a, wide_b = np.empty((2, len(a)), f"i{2 * a.itemsize}")
        store = saturate_into(wide_a, out)

        def step() -> None:
            wide_a[...] = a
            wide_b[...] = b
            ufunc(wide_a, wide_b, wide_a)
            store()

        return step

    return plan


SATURATING = [
    planned(f"{name}{x}", f"{kind}{n},{kind}{n}->{kind}{n}", plan)
    for name, kind, plan in (
        ("padds", "i", _signed_saturating(np.add)),
        ("psubs", "i", _signed_saturating(np.subtract)),
        ("paddus", "u", _add_unsigned),
        ("psubus", "u", _subtract_unsigned),
    )
    for x, n in _wide(2)
]


def _multiply_high(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    wide_a, wide_b = np.empty((2, len(a)), f"{a.dtype.kind}4")
    high = wide_a.view(out.dtype)[1::2]

    def step() -> None:
        wide_a[...] = a
        wide_b[...] = b
        np.multiply(wide_a, wide_b, wide_a)
        out[...] = high

    return step


MULTIPLY_HIGH = [
    planned("pmulhw", "i2,i2->i2", _multiply_high),
    planned("pmulhuw", "u2,u2->u2", _multiply_high),
]


@operation("pmulhrsw", "i2,i2->i2")
def multiply_round_scale(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    """(a * b >> 14) + 1 >> 1, as a sum and a shift: its low 16 bits, so -1 * -1 gives -1."""
    wide_a, wide_b = np.empty((2, len(a)), "i4")
    low = wide_a.view("i2")[::2]
    half, fifteen = np.array(1 << 14, "i4"), np.array(15, "i4")

    def step() -> None:
        wide_a[...] = a
        wide_b[...] = b
        np.multiply(wide_a, wide_b, wide_a)
        np.add(wide_a, half, wide_a)
        np.right_shift(wide_a, fifteen, wide_a)
        out[...] = low

    return step


def _multiply_even(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    """PMULUDQ/PMULDQ: 64-bit products of the even 32-bit lanes."""
    wide_a, wide_b = np.empty((2, len(out)), out.dtype)
    even_a, even_b = a[::2], b[::2]

    def step() -> None:
        wide_a[...] = even_a
        wide_b[...] = even_b
        np.multiply(wide_a, wide_b, out)

    return step


MULTIPLY_EVEN = [
    planned("pmuludq", "u4,u4->u8", _multiply_even, Extent.WHOLE),
    planned("pmuldq", "i4,i4->i8", _multiply_even, Extent.WHOLE),
]


@operation("pmaddwd", "i2,i2->i4", Extent.WHOLE)
def multiply_add_words(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    """Sums of adjacent products; four times 8000h wraps to 80000000h."""
    wide_a, wide_b = np.empty((2, len(a)), "i4")
    even, odd = wide_a[::2], wide_a[1::2]

    def step() -> None:
        wide_a[...] = a
        wide_b[...] = b
        np.multiply(wide_a, wide_b, wide_a)
        np.add(even, odd, out)

    return step


@operation("pmaddubsw", "u1,i1->i2", Extent.WHOLE)
def multiply_add_bytes(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    """Unsigned bytes by signed bytes; sums of adjacent products saturate."""
    wide_a, wide_b = np.empty((2, len(a)), "i4")
    even, odd, total = wide_a[::2], wide_a[1::2], np.empty(len(out), "i4")
    store = saturate_into(total, out)

    def step() -> None:
        wide_a[...] = a
        wide_b[...] = b
        np.multiply(wide_a, wide_b, wide_a)
        np.add(even, odd, total)
        store()

    return step


def _average(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    """a + b + 1 >> 1 without a wider type: (a | b) - ((a ^ b) >> 1)."""
    union, half, one = np.empty_like(a), np.empty_like(a), np.array(1, a.dtype)

    def step() -> None:
        np.bitwise_or(a, b, union)
        np.bitwise_xor(a, b, half)
        np.right_shift(half, one, half)
        np.subtract(union, half, out)

    return step


AVERAGE = [planned(f"pavg{x}", f"u{n},u{n}->u{n}", _average) for x, n in _wide(2)]


@operation("psadbw", "u1,u1->u8", Extent.WHOLE)
def sum_of_differences(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    """Sums of eight absolute differences: their products with ones."""
    larger, smaller, wide = np.empty_like(a), np.empty_like(a), np.empty(len(a), "u2")
    eights, sums, ones = wide.reshape(-1, 8), np.empty(len(a) // 8, "u2"), np.ones(8, "u2")

    def step() -> None:
        np.fmax(a, b, larger)
        np.fmin(a, b, smaller)
        np.subtract(larger, smaller, larger)
        wide[...] = larger
        np.vecdot(eights, ones, sums)
        out[...] = sums

    return step


@operation("mpsadbw", "u1,u1->u2", Extent.WHOLE)
def sums_of_differences(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    """Eight sums per block: four bytes of ``b`` against eleven of ``a``, sliding.

    Three immediate bits for each block: bit 2 gives the start in ``a``, bits 1:0 in ``b``.
    """
    from_a, from_b = [], []
    for byte in range(4):  # all first bytes of the sums, then all second ones ...
        for start in range(0, len(a), 16):
            control = form.imm >> 3 * (start // 16)
            from_a += [start + (control & 4) + byte + i for i in range(8)]
            from_b += [start + 4 * (control & 3) + byte] * 8
    index_a, index_b = np.array(from_a), np.array(from_b)
    bytes_a, bytes_b, smaller = np.empty((3, len(from_a)), "u1")
    wide = np.empty((4, len(out)), "u2")
    flat, (first, second, third, fourth) = wide.reshape(-1), wide

    def step() -> None:
        a.take(index_a, None, bytes_a, "clip")
        b.take(index_b, None, bytes_b, "clip")
        np.fmin(bytes_a, bytes_b, smaller)
        np.fmax(bytes_a, bytes_b, bytes_a)
        np.subtract(bytes_a, smaller, bytes_a)
        flat[...] = bytes_a
        np.add(first, second, first)
        np.add(third, fourth, third)
        np.add(first, third, out)

    return step


def _sign(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    sign = np.empty_like(b)

    def step() -> None:
        np.sign(b, sign)
        np.multiply(a, sign, out)

    return step


SIGN = [planned(f"psign{x}", f"i{n},i{n}->i{n}", _sign) for x, n in _wide(4)]


def _pairs(a: Lanes, b: Lanes, dtype: str) -> tuple[Lanes, Lanes, Lanes, Lanes]:
    """Places for ``a`` and ``b`` in each block's order, and all their even and odd lanes."""
    pool = np.empty((len(a), 2, a.shape[1]), dtype)
    flat = pool.reshape(-1)
    return pool[:, 0], pool[:, 1], flat[::2], flat[1::2]


def _horizontal(ufunc: Callable[..., Any]) -> Plan:
    """Adjacent pairs of each block: those of ``a`` below those of ``b``."""

    def plan(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
        low, high, even, odd = _pairs(a, b, a.dtype.str)

        def step() -> None:
            low[...] = a
            high[...] = b
            ufunc(even, odd, out)

        return step

    return plan


def _horizontal_saturating(ufunc: Callable[..., Any]) -> Plan:
    def plan(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
        low, high, even, odd = _pairs(a, b, "i4")
        wide = np.empty(len(out), "i4")
        store = saturate_into(wide, out)

        def step() -> None:
            low[...] = a
            high[...] = b
            ufunc(even, odd, wide)
            store()

        return step

    return plan


HORIZONTAL = [
    planned("phaddw", "i2x8,i2x8->i2", _horizontal(np.add), Extent.WHOLE),
    planned("phaddd", "i4x4,i4x4->i4", _horizontal(np.add), Extent.WHOLE),
    planned("phsubw", "i2x8,i2x8->i2", _horizontal(np.subtract), Extent.WHOLE),
    planned("phsubd", "i4x4,i4x4->i4", _horizontal(np.subtract), Extent.WHOLE),
    planned("phaddsw", "i2x8,i2x8->i2", _horizontal_saturating(np.add), Extent.WHOLE),
    planned("phsubsw", "i2x8,i2x8->i2", _horizontal_saturating(np.subtract), Extent.WHOLE),
]


@operation("phminposuw", "u2->u2", Extent.WHOLE)
def horizontal_minimum(form: Form, a: Lanes, out: Lanes) -> Step:
    """The smallest word, and the number of the first lane that holds it."""

    def step() -> None:
        out[1] = lane = a.argmin()
        out[0] = a[lane]

    return step
