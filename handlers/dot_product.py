"""Integer products added to an accumulator: AVX-VNNI, AVX-VNNI-INT8, AVX-VNNI-INT16, AVX-IFMA.

SDM Vol. 2: VPDPB*, VPDPW*, VPMADD52*.
"""

from __future__ import annotations

import numpy as np

from handlers.arithmetic import saturate_into
from handlers.operands import Form, Lanes, Step
from handlers.vector import Extent, Operation, Plan, planned


def _accumulate(*, saturate: bool) -> Plan:
    """``total + sum of products``, one sum per 32 bits; saturated or cut.

    The first source is the destination. What is cut may wrap on the way.
    """

    def plan(form: Form, total: Lanes, a: Lanes, b: Lanes, out: Lanes) -> Step:
        wide_a, wide_b = np.empty((2, len(a)), "i8" if saturate else out.dtype)
        sums, accumulator = np.empty((2, len(out)), wide_a.dtype)
        rows_a, rows_b = (wide.reshape(len(out), -1) for wide in (wide_a, wide_b))
        store = saturate_into(accumulator, out)

        def step() -> None:
            wide_a[...] = a
            wide_b[...] = b
            np.vecdot(rows_a, rows_b, sums)
            np.add(sums, total, out)

        def step_saturating() -> None:
            wide_a[...] = a
            wide_b[...] = b
            accumulator[...] = total
            np.vecdot(rows_a, rows_b, sums)
            np.add(sums, accumulator, accumulator)
            store()

        return step_saturating if saturate else step

    return plan


def _dot_product(name: str, size: int, signs: str) -> list[Operation]:
    """The cutting and the saturating form; ``signs`` (u, i) are those of the two factors."""
    total = "u4" if signs == "uu" else "i4"
    first, second = (f"{sign}{size}" for sign in signs)
    signature = f"{total},{first},{second}->{total}"
    return [
        planned(name, signature, _accumulate(saturate=False), Extent.WHOLE),
        planned(f"{name}s", signature, _accumulate(saturate=True), Extent.WHOLE),
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
