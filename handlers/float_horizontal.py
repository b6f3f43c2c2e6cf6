"""Operations across lanes: ADDSUBPS/PD, HADDPS/PD, HSUBPS/PD, DPPS, DPPD (SDM Vol. 2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np

from handlers import float_forms
from handlers import softfloat as soft
from handlers.fenv import Exact, Reference, bind_float, bits_of, collect
from handlers.float_forms import FORMATS, family
from handlers.operands import Form, Lanes, Step
from handlers.softfloat import Format, unmasked
from handlers.vector import Plan, planned


def _blocks(lanes: Lanes) -> Lanes:
    """As rows of 128 bits."""
    return lanes.reshape(-1, 16 // lanes.itemsize)


def _add_subtract(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    """Even lanes are subtracted, odd lanes added."""
    f = FORMATS[a.itemsize]
    (a_even, a_odd), (b_even, b_odd), (even, odd) = ((x[0::2], x[1::2]) for x in (a, b, out))

    stages = partial(np.subtract, a_even, b_even, even), partial(np.add, a_odd, b_odd, odd)

    def exact(mxcsr: int) -> tuple[list[int], int]:
        pairs = zip(bits_of(a).tolist(), bits_of(b).tolist(), strict=True)
        operations = cycle((soft.sub, soft.add))
        return collect((next(operations)(f, x, y, mxcsr) for x, y in pairs), mxcsr)

    return bind_float(form.cpu, stages, exact, out)


def _neighbours(ufunc: Callable[..., Any], reference: Reference) -> Plan:
    """HADD, HSUB: in each block the pairs of the first source, then those of the second."""

    def plan(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
        f, (blocks_a, blocks_b) = FORMATS[a.itemsize], (_blocks(a), _blocks(b))
        pool = np.empty((len(blocks_a), 2, blocks_a.shape[1]), a.dtype)
        from_a, from_b, pairs_of = pool[:, 0], pool[:, 1], pool.reshape(-1)
        combine = partial(ufunc, pairs_of[0::2], pairs_of[1::2], out)

        def stage() -> None:
            from_a[...] = blocks_a
            from_b[...] = blocks_b
            combine()

        def exact(mxcsr: int) -> tuple[list[int], int]:
            both = zip(_blocks(bits_of(a)).tolist(), _blocks(bits_of(b)).tolist(), strict=True)
            lanes = [lane for x, y in both for lane in (*x, *y)]
            pairs = zip(lanes[0::2], lanes[1::2], strict=True)
            return collect((reference(f, x, y, mxcsr) for x, y in pairs), mxcsr)

        return bind_float(form.cpu, [stage], exact, out)

    return plan


def _dot_product(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    """The products that imm[7:4] selects, added in pairs, to the lanes that imm[3:0] selects."""
    f, count = FORMATS[a.itemsize], _blocks(out).shape[1]
    multiplied = [bool(form.imm >> 4 + i & 1) for i in range(count)]
    terms = np.zeros(len(out) + 1, out.dtype)  # the last lane is the zero
    stages: list[Step] = [partial(np.multiply, a, b, terms[:-1])]
    if not all(multiplied):
        stages = [_masked_product(a, b, multiplied, terms[:-1])]
    for _ in range(count.bit_length() - 1):
        sums = np.zeros(len(terms) // 2 + 1, out.dtype)
        stages.append(partial(np.add, terms[0:-1:2], terms[1:-1:2], sums[:-1]))
        terms = sums
    zero = len(terms) - 1
    lanes = [i // count if form.imm >> i % count & 1 else zero for i in range(len(out))]
    finish = partial(terms.take, np.array(lanes), None, out, "clip")
    exact = _bind_dot_product(f, a, b, multiplied, form.imm)
    return bind_float(form.cpu, stages, exact, out, finish)


def _masked_product(a: Lanes, b: Lanes, wanted: list[bool], out: Lanes) -> Step:
    """Products of the wanted lanes of each block, zeros elsewhere."""
    bits_a, bits_b = bits_of(a), bits_of(b)
    ones = (1 << 8 * a.itemsize) - 1
    mask = np.array([ones * w for w in wanted] * (len(a) // len(wanted)), bits_a.dtype)
    left, right = np.empty_like(bits_a), np.empty_like(bits_b)
    multiply = partial(np.multiply, left.view(a.dtype), right.view(b.dtype), out)

    def stage() -> None:
        np.bitwise_and(bits_a, mask, left)
        np.bitwise_and(bits_b, mask, right)
        multiply()

    return stage


def _bind_dot_product(f: Format, a: Lanes, b: Lanes, multiplied: list[bool], imm: int) -> Exact:
    """The same on integers, step by step: an unmasked exception of one step ends it."""

    def exact(mxcsr: int) -> tuple[list[int], int]:
        pairs = zip(bits_of(a).tolist(), bits_of(b).tolist(), cycle(multiplied))
        products = (soft.mul(f, x, y, mxcsr) if wanted else (0, 0) for x, y, wanted in pairs)
        lanes, flags = collect(products, mxcsr)
        for _ in range(len(multiplied).bit_length() - 1):
            if unmasked(flags, mxcsr):
                break
            sums = (soft.add(f, x, y, mxcsr) for x, y in zip(lanes[0::2], lanes[1::2], strict=True))
            lanes, raised = collect(sums, mxcsr)
            flags |= raised
        return [
            lane if imm >> i & 1 else 0 for lane in lanes for i in range(len(multiplied))
        ], flags

    return exact


HORIZONTAL = [
    *family("addsub", 2, _add_subtract, float_forms.PACKED, staged=True),
    *family("hadd", 2, _neighbours(np.add, soft.add), float_forms.PACKED, staged=True),
    *family("hsub", 2, _neighbours(np.subtract, soft.sub), float_forms.PACKED, staged=True),
    planned("dpps", "f4,f4->f4", _dot_product, staged=True),
    planned("dppd", "f8,f8->f8", _dot_product, staged=True),
]
