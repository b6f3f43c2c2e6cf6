"""Floating-point add, subtract, multiply, divide, square root.

SDM Vol. 2: ADDPS ... SQRTSD.
"""

from __future__ import annotations

import numpy as np

from handlers import softfloat as soft
from handlers.fenv import Reference
from handlers.float_forms import PACKED as _PACKED
from handlers.float_forms import SCALAR as _SCALAR
from handlers.float_forms import by_ufunc, family
from handlers.vector import Operation


def _forms(name: str, arity: int, ufunc: np.ufunc, reference: Reference) -> list[Operation]:
    plan = by_ufunc(ufunc, reference)
    return [
        *family(name, arity, plan, _PACKED),
        # one lane that is its own first operand is a reduction to NumPy, of another NaN order
        *family(name, arity, plan, _SCALAR, staged=True),
    ]


ARITHMETIC = [
    *_forms("add", 2, np.add, soft.add),
    *_forms("sub", 2, np.subtract, soft.sub),
    *_forms("mul", 2, np.multiply, soft.mul),
    *_forms("div", 2, np.divide, soft.div),
    *_forms("sqrt", 1, np.sqrt, soft.sqrt),
]
