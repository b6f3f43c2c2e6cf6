"""Integer comparisons, tests of bits into the flags, and masks of sign bits.

SDM Vol. 2: PCMPEQ* PCMPGT* PTEST VTESTPS VTESTPD PMOVMSKB MOVMSKPS MOVMSKPD.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from handlers.operands import Form, Lanes, Step
from handlers.vector import Extent, Plan, planned
from sandbox.registers import CF, ZF


def _into_mask(ufunc: Callable[..., Any]) -> Plan:
    """All ones where the comparison holds: the boolean is widened, then negated."""

    def plan(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
        truth = np.empty(len(a), bool)
        if a.itemsize == 1:
            as_number = truth.view("i1")

            def step_bytes() -> None:
                ufunc(a, b, truth)
                np.negative(as_number, out)

            return step_bytes

        def step() -> None:
            ufunc(a, b, truth)
            out[...] = truth
            np.negative(out, out)

        return step

    return plan


_INTEGERS = ("b", 1), ("w", 2), ("d", 4), ("q", 8)
COMPARE = [
    planned(f"{name}{x}", f"i{n},i{n}->i{n}", _into_mask(ufunc))
    for name, ufunc in (("pcmpeq", np.equal), ("pcmpgt", np.greater))
    for x, n in _INTEGERS
]


def _test(lane_bits: int, tested: int) -> Plan:
    """ZF: a & b has none of the ``tested`` bits of its lanes; CF: nor has ~a & b."""

    def plan(form: Form, a: memoryview, b: memoryview) -> Step:
        lanes = 8 * len(a) // lane_bits
        mask = sum(tested << lane_bits * i for i in range(lanes))

        def step() -> int:
            first, second = int.from_bytes(a, "little"), int.from_bytes(b, "little") & mask
            both = first & second
            return (0 if both else ZF) | (CF if both == second else 0)

        return step

    return plan


TEST = [
    planned("ptest", "b,b->flags", _test(8, 0xFF), Extent.WHOLE),
    planned("vtestps", "b,b->flags", _test(32, 1 << 31), Extent.WHOLE),
    planned("vtestpd", "b,b->flags", _test(64, 1 << 63), Extent.WHOLE),
]

_SIGN_DIGIT = bytes(ord("0") + (value >> 7) for value in range(256))


def _sign_mask(lane: int) -> Plan:
    def plan(form: Form, source: memoryview, out: Lanes) -> Step:
        """Bytes that hold the signs, highest lane first, read as a binary number."""
        signs = source[lane - 1 :: lane][::-1]

        def step() -> None:
            out[0] = int(signs.tobytes().translate(_SIGN_DIGIT), 2)

        return step

    return plan


SIGN_MASKS = [
    planned("pmovmskb", "b->u*", _sign_mask(1), Extent.WHOLE),
    planned("movmskps", "b->u*", _sign_mask(4), Extent.WHOLE),
    planned("movmskpd", "b->u*", _sign_mask(8), Extent.WHOLE),
]
