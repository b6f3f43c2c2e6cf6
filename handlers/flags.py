"""The status flags as pure functions of operands and result, and the sixteen conditions.

Every function takes and returns flag bits at their places in RFLAGS (SDM Vol. 1, 3.4.3).
"""

from __future__ import annotations

from collections.abc import Callable

from iced_x86 import ConditionCode

from sandbox.registers import AF, CF, OF, PF, SF, ZF

STATUS = CF | PF | AF | ZF | SF | OF

MASK = {bits: (1 << bits) - 1 for bits in (8, 16, 32, 64, 128)}
"""All ones, by operand width in bits."""
SIGN = {bits: 1 << (bits - 1) for bits in (8, 16, 32, 64, 128)}
"""The sign bit, by operand width in bits."""

_PARITY = bytes(PF if value.bit_count() % 2 == 0 else 0 for value in range(256))


def of_result(bits: int, result: int) -> int:
    """SF, ZF and PF of a result that is within ``bits``."""
    flags = _PARITY[result & 0xFF]
    if not result:
        return flags | ZF
    return flags | SF if result & SIGN[bits] else flags


def of_sum(bits: int, a: int, b: int, total: int) -> int:
    """All status flags of ``total = a + b (+ carry)``, the sum not yet cut to ``bits``."""
    flags = of_result(bits, total & MASK[bits]) | (a ^ b ^ total) & AF
    if total >> bits:
        flags |= CF
    if (a ^ total) & (b ^ total) & SIGN[bits]:
        flags |= OF
    return flags


def of_difference(bits: int, a: int, b: int, difference: int) -> int:
    """All status flags of ``difference = a - b (- borrow)``, not yet cut to ``bits``."""
    flags = of_result(bits, difference & MASK[bits]) | (a ^ b ^ difference) & AF
    if difference < 0:
        flags |= CF
    if (a ^ b) & (a ^ difference) & SIGN[bits]:
        flags |= OF
    return flags


def _less(flags: int) -> bool:
    return bool(flags & SF) != bool(flags & OF)


Condition = Callable[[int], bool]

CONDITIONS: dict[int, Condition] = {
    ConditionCode.O: lambda flags: flags & OF != 0,
    ConditionCode.NO: lambda flags: flags & OF == 0,
    ConditionCode.B: lambda flags: flags & CF != 0,
    ConditionCode.AE: lambda flags: flags & CF == 0,
    ConditionCode.E: lambda flags: flags & ZF != 0,
    ConditionCode.NE: lambda flags: flags & ZF == 0,
    ConditionCode.BE: lambda flags: flags & (CF | ZF) != 0,
    ConditionCode.A: lambda flags: flags & (CF | ZF) == 0,
    ConditionCode.S: lambda flags: flags & SF != 0,
    ConditionCode.NS: lambda flags: flags & SF == 0,
    ConditionCode.P: lambda flags: flags & PF != 0,
    ConditionCode.NP: lambda flags: flags & PF == 0,
    ConditionCode.L: _less,
    ConditionCode.GE: lambda flags: not _less(flags),
    ConditionCode.LE: lambda flags: flags & ZF != 0 or _less(flags),
    ConditionCode.G: lambda flags: flags & ZF == 0 and not _less(flags),
}
"""iced-x86 condition code to a predicate of RFLAGS (SDM Vol. 1, appendix B)."""

CONDITION_NAMES = "o no b ae e ne be a s ns p np l ge le g".split()
"""The suffixes that the decoder uses in ``jcc``, ``setcc`` and ``cmovcc``."""
