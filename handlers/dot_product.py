"""Integer products added to an accumulator: AVX-VNNI, AVX-VNNI-INT8, AVX-VNNI-INT16, AVX-IFMA.

SDM Vol. 2: VPDPB*, VPDPW*, VPMADD52*.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from handlers.operands import Form, Lanes, Step
from handlers.vector import Extent, Operation, Plan, planned


def _accumulate(limits: tuple[int, int] | None) -> Plan:
    """``total + sum of products``, one sum per 32 bits, exact; saturated to ``limits`` or cut.

    The first source is the destination, the other two are rows of the lanes of one sum.
    """

    def plan(form: Form, total: Lanes, a: Lanes, b: Lanes, out: Lanes) -> Step:
        products, sums = np.zeros(a.shape, "i8"), np.zeros(len(out), "i8")
        multiply = partial(np.multiply, a, b, products, dtype="i8")

        def step() -> None:
            multiply()
            products.sum(1, None, sums)
            np.add(sums, total, sums)
            if limits:
                np.clip(sums, *limits, sums)
            out[...] = sums

        return step

    return plan


_SIGNED = (-1 << 31, (1 << 31) - 1)
_UNSIGNED = (0, (1 << 32) - 1)


def _dot_product(name: str, size: int, signs: str) -> list[Operation]:
    """The cutting and the saturating form; ``signs`` (u, i) are those of the two factors."""
    total = "u4" if signs == "uu" else "i4"
    limits = _UNSIGNED if signs == "uu" else _SIGNED
    first, second = (f"{sign}{size}x{4 // size}" for sign in signs)
    signature = f"{total},{first},{second}->{total}"
    return [
        planned(name, signature, _accumulate(None), Extent.WHOLE),
        planned(f"{name}s", signature, _accumulate(limits), Extent.WHOLE),
    ]


DOT_PRODUCTS = [
    operation
    for name, size, signs in (
        ("vpdpbusd", 1, "ui"),
        ("vpdpbuud", 1, "uu"),
        ("vpdpbsud", 1, "iu"),
        ("vpdpbssd", 1, "ii"),
        ("vpdpwssd", 2, "ii"),
        ("vpdpwuud", 2, "uu"),
        ("vpdpwusd", 2, "ui"),
        ("vpdpwsud", 2, "iu"),
    )
    for operation in _dot_product(name, size, signs)
]


def _multiply_52(shift: int) -> Plan:
    """The product of the low 52 bits, bits 51:0 or 103:52 of it, added to 64 bits."""
    low, wrap = (1 << 52) - 1, (1 << 64) - 1

    def plan(form: Form, total: Lanes, a: Lanes, b: Lanes, out: Lanes) -> Step:
        def step() -> None:
            rows = zip(total.tolist(), a.tolist(), b.tolist(), strict=True)
            out[:] = [t + ((x & low) * (y & low) >> shift & low) & wrap for t, x, y in rows]

        return step

    return plan


MULTIPLY_52 = [
    planned("vpmadd52luq", "u8,u8,u8->u8", _multiply_52(0), Extent.WHOLE),
    planned("vpmadd52huq", "u8,u8,u8->u8", _multiply_52(52), Extent.WHOLE),
]
