"""Floating-point add, subtract, multiply, divide, square root.

SDM Vol. 2: ADDPS ... SQRTSD. Scalar operations take a short way on Python floats, which are IEEE
doubles rounded to nearest, when MXCSR asks for that, PE is set already and all values are zero or
normal, so that no other flag can be raised. (Rounding a double's sum, product, quotient or root
once more, to single, is what one rounding gives: 53 bits are enough for twice 24 and two more.)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import numpy as np

from handlers import softfloat as soft
from handlers.fenv import Reference, bind_mxcsr
from handlers.float_forms import (
    FORMATS,
    SHORT_WAY,
    SHORT_WAY_BITS,
    by_ufunc,
    family,
    items,
    normal_range,
)
from handlers.float_forms import PACKED as _PACKED
from handlers.float_forms import SCALAR as _SCALAR
from handlers.operands import Form, Lanes, Step
from handlers.vector import Operation, Plan


def _short_binary(compute: Callable[[float, float], float], full: Plan) -> Plan:
    def plan(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
        low, high = normal_range(FORMATS[out.itemsize])
        left, right, target = items(a), items(b), items(out)
        read, take_full_way = bind_mxcsr(form.cpu), full(form, a, b, out)

        def step() -> None:
            if read() & SHORT_WAY_BITS == SHORT_WAY:
                x, y = left[0], right[0]
                if (low <= abs(x) <= high or x == 0) and low <= abs(y) <= high:
                    z = compute(x, y)
                    if low <= abs(z) <= high or x == 0:
                        target[0] = z
                        return
            take_full_way()

        return step

    return plan


def _short_root(full: Plan) -> Plan:
    def plan(form: Form, a: Lanes, out: Lanes) -> Step:
        low, high = normal_range(FORMATS[out.itemsize])
        source, target = items(a), items(out)
        read, take_full_way = bind_mxcsr(form.cpu), full(form, a, out)

        def step() -> None:
            x = source[0]
            if low <= x <= high and read() & SHORT_WAY_BITS == SHORT_WAY:
                target[0] = math.sqrt(x)
            else:
                take_full_way()

        return step

    return plan


def _binary(
    name: str, ufunc: np.ufunc, reference: Reference, compute: Callable[[float, float], float]
) -> list[Operation]:
    plan = by_ufunc(ufunc, reference)
    return [
        *family(name, 2, plan, _PACKED),
        # one lane that is its own first operand is a reduction to NumPy, of another NaN order
        *family(name, 2, _short_binary(compute, plan), _SCALAR, staged=True),
    ]


_ROOT = by_ufunc(np.sqrt, soft.sqrt)

ARITHMETIC = [
    *_binary("add", np.add, soft.add, operator.add),
    *_binary("sub", np.subtract, soft.sub, operator.sub),
    *_binary("mul", np.multiply, soft.mul, operator.mul),
    *_binary("div", np.divide, soft.div, operator.truediv),
    *family("sqrt", 1, _ROOT, _PACKED),
    *family("sqrt", 1, _short_root(_ROOT), _SCALAR, staged=True),
]
