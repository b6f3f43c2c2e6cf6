"""Shuffles, blends, broadcasts, inserts and extracts.

Those whose pattern is known from the instruction alone are declared by that pattern: for each
lane of the result the index of a lane in the sources put end to end, or ZERO. The rest depend on
data: PSHUFB, VPERMD/VPERMPS, variable VPERMILPS/PD, variable blends. SDM Vol. 2, by mnemonic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from handlers.operands import Form, Lanes, Step
from handlers.vector import (
    Extent,
    Operation,
    any_form,
    immediate,
    loads,
    no_immediate,
    operation,
    planned,
    stores,
)

ZERO = -1

Accepts = Callable[[Form], bool]

Pattern = Callable[[Form], Sequence[int]]
"""Source lane of each lane of the result; lanes that are not listed are ZERO."""

BlockPattern = Callable[[int, int], Sequence[int]]
"""``(immediate, number of the 128-bit block)`` to source lanes within the block: the second
source's lanes follow those of the first."""


def permute(names: str, signature: str, pattern: Pattern, accepts: Accepts = any_form) -> Operation:
    """Declare a shuffle by its pattern."""

    def plan(form: Form, *views: Lanes) -> Step:
        *sources, out = views
        return _bind_permutation(sources, list(pattern(form)), out)

    return planned(names, signature, plan, Extent.WHOLE, accepts=accepts)


def in_blocks(
    names: str, signature: str, pattern: BlockPattern, accepts: Accepts = any_form
) -> Operation:
    """Declare a shuffle that works in each 128-bit block alike."""
    lanes = 16 // int(signature[1])
    sources = signature.count(",") + 1

    def whole_pattern(form: Form) -> list[int]:
        blocks = form.vector_size // 16
        offsets = [s * blocks * lanes for s in range(sources)]
        return [
            ZERO if lane < 0 else offsets[lane // lanes] + block * lanes + lane % lanes
            for block in range(blocks)
            for lane in pattern(form.imm, block)
        ]

    return permute(names, signature, whole_pattern, accepts)


def _bind_permutation(sources: list[Lanes], lanes: list[int], out: Lanes) -> Step:
    lanes += [ZERO] * (len(out) - len(lanes))
    starts = np.cumsum([0, *(len(s) for s in sources)])
    for source, start in zip(sources, starts, strict=False):
        if all(start <= lane < start + len(source) for lane in lanes):
            return partial(source.take, np.array(lanes) - start, None, out, "clip")
    pool: Any = np.zeros(starts[-1] + 1, out.dtype)  # the last lane is the zero
    copies = []
    raw = memoryview(pool).cast("B")
    for source, start in zip(sources, starts, strict=False):
        if any(start <= lane < start + len(source) for lane in lanes):
            at = int(start) * pool.itemsize
            copies.append((slice(at, at + source.nbytes), source.data.cast("B")))
    take = partial(pool.take, np.array(lanes), None, out, "wrap")
    if len(copies) == 1:
        ((only, data),) = copies

        def take_from_one() -> None:
            raw[only] = data
            take()

        return take_from_one

    def take_from_pool() -> None:
        for span, source_bytes in copies:
            raw[span] = source_bytes
        take()

    return take_from_pool


def _fields(imm: int, bits: int, count: int) -> list[int]:
    """The lowest ``count`` fields of ``bits`` bits in an immediate."""
    return [imm >> bits * i & (1 << bits) - 1 for i in range(count)]


def _interleave(lanes: int, high: bool) -> BlockPattern:
    start = lanes // 2 if high else 0
    order = [*chain(*((start + i, lanes + start + i) for i in range(lanes // 2)))]
    return lambda imm, block: order


def _align(imm: int, block: int) -> list[int]:
    """PALIGNR: the first source is the high half of what is shifted."""
    return [16 + i if i < 16 else i - 16 if i < 32 else ZERO for i in range(imm, imm + 16)]


def _shift_bytes(imm: int, left: bool) -> list[int]:
    count = min(imm, 16)
    if left:
        return [ZERO] * count + [*range(16 - count)]
    return [*range(count, 16)]


def _right(imm: int, block: int) -> list[int]:
    return _shift_bytes(imm, False) + [ZERO] * min(imm, 16)


def _blend(lanes: int) -> BlockPattern:
    """One immediate bit per lane, going on into the upper block."""
    return lambda imm, block: [i + lanes * (imm >> block * lanes + i & 1) for i in range(lanes)]


IN_BLOCKS = [
    in_blocks("pshufd vpermilps", "u4->u4", lambda imm, _: _fields(imm, 2, 4), immediate),
    in_blocks("pshuflw", "u2->u2", lambda imm, _: [*_fields(imm, 2, 4), 4, 5, 6, 7]),
    in_blocks(
        "pshufhw", "u2->u2", lambda imm, _: [0, 1, 2, 3, *(4 + f for f in _fields(imm, 2, 4))]
    ),
    in_blocks("vpermilpd", "u8->u8", lambda imm, block: _fields(imm >> 2 * block, 1, 2), immediate),
    in_blocks(
        "shufps",
        "u4,u4->u4",
        lambda imm, _: [f + 4 * (i > 1) for i, f in enumerate(_fields(imm, 2, 4))],
    ),
    in_blocks(
        "shufpd",
        "u8,u8->u8",
        lambda imm, block: [f + 2 * i for i, f in enumerate(_fields(imm >> 2 * block, 1, 2))],
    ),
    in_blocks("punpcklbw", "u1,u1->u1", _interleave(16, False)),
    in_blocks("punpcklwd", "u2,u2->u2", _interleave(8, False)),
    in_blocks("punpckldq unpcklps", "u4,u4->u4", _interleave(4, False)),
    in_blocks("punpcklqdq unpcklpd", "u8,u8->u8", _interleave(2, False)),
    in_blocks("punpckhbw", "u1,u1->u1", _interleave(16, True)),
    in_blocks("punpckhwd", "u2,u2->u2", _interleave(8, True)),
    in_blocks("punpckhdq unpckhps", "u4,u4->u4", _interleave(4, True)),
    in_blocks("punpckhqdq unpckhpd", "u8,u8->u8", _interleave(2, True)),
    in_blocks("palignr", "u1,u1->u1", _align),
    in_blocks("pslldq", "u1->u1", lambda imm, _: _shift_bytes(imm, True)),
    in_blocks("psrldq", "u1->u1", _right),
    in_blocks("blendps vpblendd", "u4,u4->u4", _blend(4)),
    in_blocks("blendpd", "u8,u8->u8", _blend(2)),
    in_blocks(
        "pblendw", "u2,u2->u2", lambda imm, _: [i + 8 * f for i, f in enumerate(_fields(imm, 1, 8))]
    ),
    in_blocks("movsldup", "u4->u4", lambda imm, _: [0, 0, 2, 2]),
    in_blocks("movshdup", "u4->u4", lambda imm, _: [1, 1, 3, 3]),
    in_blocks("movddup", "u8->u8", lambda imm, _: [0, 0]),
    in_blocks("movhlps", "u8,u8->u8", lambda imm, _: [3, 1]),
    in_blocks("movlhps", "u8,u8->u8", lambda imm, _: [0, 2]),
]


HIGH_MOVES = [
    permute("movhps movhpd", "u8,u8->u8", lambda form: [0, 2], loads),
    permute("movhps movhpd", "u8->u8", lambda form: [1], stores),
]


def _permute_halves(form: Form) -> list[int]:
    """VPERM2F128: four bits for each half, bit 3 zeroes it."""
    return [
        ZERO if select & 8 else 2 * (select & 3) + i
        for select in _fields(form.imm, 4, 2)
        for i in range(2)
    ]


def _insert_half(form: Form) -> list[int]:
    return [0, 1, 4, 5] if form.imm & 1 else [4, 5, 2, 3]


def _insert_lane(lanes: int) -> Pattern:
    return lambda form: [lanes if i == form.imm % lanes else i for i in range(lanes)]


def _insertps(form: Form) -> list[int]:
    """Bits 7:6 choose the lane of a register source, 5:4 where it goes, 3:0 what is zeroed."""
    source = 4 + (0 if form.memory else form.imm >> 6)
    lanes = [source if i == form.imm >> 4 & 3 else i for i in range(4)]
    return [ZERO if form.imm >> i & 1 else lane for i, lane in enumerate(lanes)]


def _first_lane(lane_size: int) -> Pattern:
    return lambda form: [0] * (form.places[0].size // lane_size)


ACROSS_BLOCKS = [
    permute("vpermq vpermpd", "u8->u8", lambda form: _fields(form.imm, 2, 4)),
    permute("vperm2f128 vperm2i128", "u8,u8->u8", _permute_halves),
    permute("vinsertf128 vinserti128", "u8,u8->u8", _insert_half),
    permute(
        "vextractf128 vextracti128",
        "u8->u8",
        lambda form: [2 * (form.imm & 1), 2 * (form.imm & 1) + 1],
    ),
    permute("vbroadcastf128 vbroadcasti128", "u8->u8", lambda form: [0, 1, 0, 1]),
    permute("vpbroadcastb", "u1->u1", _first_lane(1)),
    permute("vpbroadcastw", "u2->u2", _first_lane(2)),
    permute("vpbroadcastd vbroadcastss", "u4->u4", _first_lane(4)),
    permute("vpbroadcastq vbroadcastsd", "u8->u8", _first_lane(8)),
    permute("insertps", "u4,u4->u4", _insertps),
    permute("pinsrb", "u1,u1->u1", _insert_lane(16)),
    permute("pinsrw", "u2,u2->u2", _insert_lane(8)),
    permute("pinsrd", "u4,u4->u4", _insert_lane(4)),
    permute("pinsrq", "u8,u8->u8", _insert_lane(2)),
    permute("pextrb", "u1->u1", lambda form: [form.imm & 15]),
    permute("pextrw", "u2->u2", lambda form: [form.imm & 7]),
    permute("pextrd extractps", "u4->u4", lambda form: [form.imm & 3]),
    permute("pextrq", "u8->u8", lambda form: [form.imm & 1]),
]


@operation("pshufb", "b,b->b", Extent.WHOLE)
def pshufb(form: Form, data: memoryview, index: memoryview, out: memoryview) -> Step:
    """As a translation table: indices 0 to 127 wrap in the block's 16 bytes, others give 0."""
    blocks = [
        (data[i : i + 16], index[i : i + 16], slice(i, i + 16)) for i in range(0, len(out), 16)
    ]
    zeros = bytes(128)

    def step() -> None:
        for source, select, span in blocks:
            out[span] = bytes(select).translate(bytes(source) * 8 + zeros)

    return step


@operation("vpermd vpermps", "u4,u4->u4", Extent.WHOLE)
def vpermd(form: Form, index: Lanes, data: Lanes, out: Lanes) -> Step:
    low, lanes = np.array(len(data) - 1, "i8"), np.empty(len(index), "i8")

    def step() -> None:
        lanes[...] = index
        np.bitwise_and(lanes, low, lanes)
        data.take(lanes, None, out, "clip")

    return step


def _select_in_block(bit: int) -> Callable[[Form, Lanes, Lanes, Lanes], Step]:
    """A plan for VPERMILPS/PD by a vector: the index stands at ``bit`` of each lane."""

    def plan(form: Form, data: Lanes, index: Lanes, out: Lanes) -> Step:
        in_block = 16 // data.itemsize
        base = np.arange(len(data)) // in_block * in_block
        mask, lanes = np.array(in_block - 1), np.empty(len(data), "i8")
        fetch: Step = partial(lanes.__setitem__, Ellipsis, index)
        if bit:
            fetch = partial(np.right_shift, index.view("i8"), np.array(bit), lanes)

        def step() -> None:
            fetch()
            np.bitwise_and(lanes, mask, lanes)
            np.bitwise_or(lanes, base, lanes)
            data.take(lanes, None, out, "clip")

        return step

    return plan


VARIABLE_PERMIL = [
    planned("vpermilps", "u4,u4->u4", _select_in_block(0), Extent.WHOLE, accepts=no_immediate),
    planned("vpermilpd", "u8,u8->u8", _select_in_block(1), Extent.WHOLE, accepts=no_immediate),
]


def _blend_by_sign(form: Form, a: Lanes, b: Lanes, mask: Lanes, out: Lanes) -> Step:
    chosen, zero = np.zeros(len(out), bool), np.array(0, mask.dtype)

    def step() -> None:
        np.less(mask, zero, chosen)
        out[...] = a
        np.copyto(out, b, "same_kind", chosen)

    return step


VARIABLE_BLENDS = [
    planned("pblendvb", "u1,u1,i1->u1", _blend_by_sign, Extent.WHOLE),
    planned("blendvps", "u4,u4,i4->u4", _blend_by_sign, Extent.WHOLE),
    planned("blendvpd", "u8,u8,i8->u8", _blend_by_sign, Extent.WHOLE),
]
