"""AMD's TBM: trailing bits (APM Vol. 3). BEXTR by an immediate: :mod:`handlers.integer_bits`.

Flags that the manual leaves undefined (AF, PF) stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable

from handlers.flags import MASK, of_result
from handlers.integer import Operation
from sandbox.registers import CF, OF, SF, ZF


def _counting_up(function: Callable[[int, int], int]) -> Callable[[int, int], tuple[int, int]]:
    """``function(a, a + 1)``; CF: the addition carries."""

    def compute(bits: int, a: int) -> tuple[int, int]:
        result = function(a, a + 1) & MASK[bits]
        return result, of_result(bits, result) & (SF | ZF) | (CF if a == MASK[bits] else 0)

    return compute


def _counting_down(function: Callable[[int, int], int]) -> Callable[[int, int], tuple[int, int]]:
    """``function(a, a - 1)``; CF: the subtraction borrows."""

    def compute(bits: int, a: int) -> tuple[int, int]:
        result = function(a, a - 1) & MASK[bits]
        return result, of_result(bits, result) & (SF | ZF) | (0 if a else CF)

    return compute


HANDLERS = [
    Operation(name, "wr", compute, SF | ZF | CF | OF)
    for name, compute in (
        ("blcfill", _counting_up(lambda a, up: a & up)),
        ("blci", _counting_up(lambda a, up: a | ~up)),
        ("blcic", _counting_up(lambda a, up: ~a & up)),
        ("blcmsk", _counting_up(lambda a, up: a ^ up)),
        ("blcs", _counting_up(lambda a, up: a | up)),
        ("t1mskc", _counting_up(lambda a, up: ~a | up)),
        ("blsfill", _counting_down(lambda a, down: a | down)),
        ("blsic", _counting_down(lambda a, down: ~a | down)),
        ("tzmsk", _counting_down(lambda a, down: ~a & down)),
    )
]
