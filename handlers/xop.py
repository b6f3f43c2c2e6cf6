"""AMD's XOP: selections, permutations, comparisons, rotations, shifts, multiply-add, sums.

APM Vol. 4 (Vol. 6 in older editions), by mnemonic. Floating point is in :mod:`handlers.fma4`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from handlers.arithmetic import saturate_into
from handlers.operands import Form, Lanes, Step
from handlers.vector import Extent, Plan, immediate, lanewise, no_immediate, operation, planned

_INTEGERS = ("b", 1), ("w", 2), ("d", 4), ("q", 8)


def _conditional_move(a: Lanes, b: Lanes, selector: Lanes, out: Lanes) -> None:
    """Bits of ``a`` where the selector is 1, of ``b`` where it is 0."""
    np.bitwise_xor((a ^ b) & selector, b, out)


CONDITIONAL_MOVE = lanewise("vpcmov", "u8,u8,u8->u8", _conditional_move)


def _reversed_bits(x: int) -> int:
    return int(f"{x:08b}"[::-1], 2)


_BYTE_OPERATIONS: tuple[Callable[[int], int], ...] = (
    lambda x: x,
    lambda x: x ^ 0xFF,
    _reversed_bits,
    lambda x: _reversed_bits(x) ^ 0xFF,
    lambda x: 0,
    lambda x: 0xFF,
    lambda x: 0xFF if x & 0x80 else 0,
    lambda x: 0 if x & 0x80 else 0xFF,
)
_BYTE_TABLES = [bytes(map(function, range(256))) for function in _BYTE_OPERATIONS]


@operation("vpperm", "b,b,b->b", Extent.WHOLE)
def permute_bytes(form: Form, a: memoryview, b: memoryview, control: memoryview, out: Any) -> Step:
    """Of the 32 bytes ``a``, ``b`` each that bits 4:0 choose, changed as bits 7:5 say."""

    def step() -> None:
        data = bytes(a) + bytes(b)
        out[:] = bytes(_BYTE_TABLES[c >> 5][data[c & 31]] for c in control)

    return step


def _permute_two(form: Form, a: Lanes, b: Lanes, selector: Lanes, out: Lanes) -> Step:
    """VPERMIL2PS/PD: a lane of the same block of ``a`` or ``b``, or zero if bit 3 matches."""
    shift = 1 if out.itemsize == 8 else 0  # the selection ends at bit 2
    in_block = 16 // out.itemsize
    zeroing = form.imm & 2
    match = form.imm & 1

    def step() -> None:
        sources = a.tolist(), b.tolist()
        result = []
        for i, control in enumerate(selector.tolist()):
            lane = i // in_block * in_block + (control >> shift) % in_block
            is_zero = zeroing and control >> 3 & 1 != match
            result.append(0 if is_zero else sources[control >> 2 & 1][lane])
        out[:] = result

    return step


PERMUTE_TWO = [
    planned("vpermil2ps", "u4,u4,u4->u4", _permute_two, Extent.WHOLE),
    planned("vpermil2pd", "u8,u8,u8->u8", _permute_two, Extent.WHOLE),
]


_RELATIONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


def _compare(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    """All ones where the relation of immediate bits 2:0 holds; 6 is never, 7 always."""
    relation = form.imm & 7
    if relation >= len(_RELATIONS):
        return partial(out.fill, 0 if relation == 6 else np.array(-1).astype(out.dtype))
    compare, truth = _RELATIONS[relation], np.empty(len(a), bool)

    def step() -> None:
        compare(a, b, truth)
        out[...] = truth
        np.negative(out, out)

    return step


COMPARE = [
    planned(f"vpcom{sign}{x}", f"{kind}{n},{kind}{n}->{kind}{n}", _compare)
    for sign, kind in (("", "i"), ("u", "u"))
    for x, n in _INTEGERS
]


def _rotate(width: int, x: int, count: int) -> int:
    count %= width
    return (x << count | x >> width - count) & (1 << width) - 1


def _rotate_by_immediate(form: Form, a: Lanes, out: Lanes) -> Step:
    width, count = 8 * a.itemsize, form.imm

    def step() -> None:
        out[:] = [_rotate(width, x, count) for x in a.tolist()]

    return step


def _shift_logical(width: int, x: int, count: int) -> int:
    """To the left, or by a negative count to the right; the count is taken modulo the width."""
    if count < 0:
        return x >> -count % width
    return x << count % width & (1 << width) - 1


def _shift_arithmetic(width: int, x: int, count: int) -> int:
    if count >= 0:
        return _shift_logical(width, x, count)
    signed = x - (x >> width - 1 << width)
    return signed >> -count % width & (1 << width) - 1


def _by_lanes(function: Callable[[int, int, int], int]) -> Plan:
    """The count is the signed low byte of each lane of the second source."""

    def plan(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
        width, counts = 8 * a.itemsize, b.view("i1")[:: a.itemsize]

        def step() -> None:
            rows = zip(a.tolist(), counts.tolist(), strict=True)
            out[:] = [function(width, x, count) for x, count in rows]

        return step

    return plan


SHIFTS = [
    planned(f"{name}{x}", f"u{n},u{n}->u{n}", _by_lanes(function), accepts=no_immediate)
    for name, function in (
        ("vprot", _rotate),
        ("vpshl", _shift_logical),
        ("vpsha", _shift_arithmetic),
    )
    for x, n in _INTEGERS
]
ROTATIONS = [
    planned(f"vprot{x}", f"u{n}->u{n}", _rotate_by_immediate, accepts=immediate)
    for x, n in _INTEGERS
]


def _multiply_add(first: int, stride: int, *, saturate: bool) -> Plan:
    """``a * b + c`` of every ``stride``-th lane from ``first`` on; cut or saturated."""

    def plan(form: Form, a: Lanes, b: Lanes, c: Lanes, out: Lanes) -> Step:
        low, high = -1 << (8 * out.itemsize - 1), (1 << (8 * out.itemsize - 1)) - 1
        span = high - low + 1
        x_lanes, y_lanes = a[first::stride], b[first::stride]

        def step() -> None:
            rows = zip(x_lanes.tolist(), y_lanes.tolist(), c.tolist(), strict=True)
            sums = [x * y + z for x, y, z in rows]
            if saturate:
                out[:] = [max(low, min(high, total)) for total in sums]
            else:
                out[:] = [(total - low) % span + low for total in sums]

        return step

    return plan


MULTIPLY_ADD = [
    planned(f"vpmac{s}{name}", f"{a},{a},{c}->{c}",
            _multiply_add(first, stride, saturate=s == "ss"), Extent.WHOLE)
    for s in ("s", "ss")
    for name, a, c, first, stride in (
        ("ww", "i2", "i2", 0, 1),
        ("wd", "i2", "i4", 1, 2),
        ("dd", "i4", "i4", 0, 1),
        ("dql", "i4", "i8", 0, 2),
        ("dqh", "i4", "i8", 1, 2),
    )
]  # fmt: skip


def _multiply_add_pairs(*, saturate: bool) -> Plan:
    """Both products of a doubleword's words, and the third source."""

    def plan(form: Form, a: Lanes, b: Lanes, c: Lanes, out: Lanes) -> Step:
        wide_a, wide_b = np.empty((2, len(a)), "i8")
        even, odd, sums = wide_a[::2], wide_a[1::2], np.empty(len(out), "i8")
        store = saturate_into(sums, out) if saturate else partial(out.__setitem__, ..., sums)

        def step() -> None:
            wide_a[...] = a
            wide_b[...] = b
            np.multiply(wide_a, wide_b, wide_a)
            np.add(even, odd, sums)
            np.add(sums, c, sums)
            store()

        return step

    return plan


MULTIPLY_ADD_PAIRS = [
    planned("vpmadcswd", "i2,i2,i4->i4", _multiply_add_pairs(saturate=False), Extent.WHOLE),
    planned("vpmadcsswd", "i2,i2,i4->i4", _multiply_add_pairs(saturate=True), Extent.WHOLE),
]


def _sums(form: Form, a: Lanes, out: Lanes) -> Step:
    """All narrow lanes of each wide one."""
    rows = a.reshape(len(out), -1)
    return lambda: rows.sum(1, out.dtype, out)


def _differences(form: Form, a: Lanes, out: Lanes) -> Step:
    """The even lane less the odd one."""
    wide, even, odd = np.empty(len(a), out.dtype), slice(0, None, 2), slice(1, None, 2)

    def step() -> None:
        wide[...] = a
        np.subtract(wide[even], wide[odd], out)

    return step


_WIDENED = {"bw": (1, 2), "bd": (1, 4), "bq": (1, 8), "wd": (2, 4), "wq": (2, 8), "dq": (4, 8)}
SUMS = [
    planned(f"vphadd{sign}{x}", f"{kind}{n}->{kind}{m}", _sums, Extent.WHOLE)
    for sign, kind in (("", "i"), ("u", "u"))
    for x, (n, m) in _WIDENED.items()
]
DIFFERENCES = [
    planned(f"vphsub{x}", f"i{n}->i{m}", _differences, Extent.WHOLE)
    for x, (n, m) in _WIDENED.items()
    if m == 2 * n
]
