"""Floating-point add, subtract, multiply, divide, square root.

SDM Vol. 2: ADDPS ... SQRTSD.
"""

from __future__ import annotations

import numpy as np

from handlers import softfloat as soft
from handlers.float_forms import by_ufunc, family

ARITHMETIC = [
    *family("add", 2, by_ufunc(np.add, soft.add)),
    *family("sub", 2, by_ufunc(np.subtract, soft.sub)),
    *family("mul", 2, by_ufunc(np.multiply, soft.mul)),
    *family("div", 2, by_ufunc(np.divide, soft.div)),
    *family("sqrt", 1, by_ufunc(np.sqrt, soft.sqrt)),
]
