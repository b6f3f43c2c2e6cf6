"""Shifts and rotates (SDM Vol. 1, 7.3.6; Vol. 2, SAL/SAR/SHL/SHR, RCL/RCR/ROL/ROR).

Counts are taken modulo 32, or 64 for 64-bit operands; a count of 0 leaves all flags. OF is
defined for a count of 1 alone: the rule of that case is applied to all counts. AF, undefined,
stays. The BMI2 forms have three operands and no flags.
"""

from __future__ import annotations

from collections.abc import Callable

from handlers.flags import MASK, SIGN, of_result
from handlers.integer import Operation
from sandbox.registers import CF, OF, PF, SF, ZF

SHIFTED = CF | OF | SF | ZF | PF
ROTATED = CF | OF


def masked_count(bits: int, count: int) -> int:
    """The count that the CPU uses: its low 5 bits, or 6 for 64-bit operands."""
    return count & (63 if bits == 64 else 31)


def signed(bits: int, value: int) -> int:
    """``value`` as a two's complement number of ``bits``."""
    return value - (1 << bits) if value & SIGN[bits] else value


def _carry_overflow(carry: int, overflow: int) -> int:
    return (CF if carry else 0) | (OF if overflow else 0)


def shl(bits: int, a: int, count: int, flags: int) -> tuple[int, int]:
    count = masked_count(bits, count)
    if not count:
        return a, flags & SHIFTED
    wide = a << count
    result, carry = wide & MASK[bits], wide >> bits & 1
    overflow = bool(result & SIGN[bits]) != carry
    return result, of_result(bits, result) | _carry_overflow(carry, overflow)


def shr(bits: int, a: int, count: int, flags: int) -> tuple[int, int]:
    count = masked_count(bits, count)
    if not count:
        return a, flags & SHIFTED
    result, carry = a >> count, a >> (count - 1) & 1
    return result, of_result(bits, result) | _carry_overflow(carry, a & SIGN[bits])


def sar(bits: int, a: int, count: int, flags: int) -> tuple[int, int]:
    count = masked_count(bits, count)
    if not count:
        return a, flags & SHIFTED
    number = signed(bits, a)
    result, carry = number >> count & MASK[bits], number >> (count - 1) & 1
    return result, of_result(bits, result) | _carry_overflow(carry, 0)


def rol(bits: int, a: int, count: int, flags: int) -> tuple[int, int]:
    count = masked_count(bits, count)
    if not count:
        return a, flags & ROTATED
    turn = count % bits
    result = (a << turn | a >> (bits - turn)) & MASK[bits]
    carry = result & 1
    return result, _carry_overflow(carry, bool(result & SIGN[bits]) != carry)


def ror(bits: int, a: int, count: int, flags: int) -> tuple[int, int]:
    count = masked_count(bits, count)
    if not count:
        return a, flags & ROTATED
    result = rotate_right(bits, a, count)
    return result, _carry_overflow(result & SIGN[bits], _top_two_differ(bits, result))


def rotate_right(bits: int, a: int, count: int) -> int:
    """``a`` turned right by ``count`` bits."""
    turn = masked_count(bits, count) % bits
    return (a >> turn | a << (bits - turn)) & MASK[bits]


def _top_two_differ(bits: int, value: int) -> bool:
    return bool((value ^ value << 1) & SIGN[bits])


def rcl(bits: int, a: int, count: int, flags: int) -> tuple[int, int]:
    count = masked_count(bits, count) % (bits + 1)
    if not count:
        return a, flags & ROTATED
    ring = (flags & CF) << bits | a
    ring = ring << count | ring >> (bits + 1 - count)
    result, carry = ring & MASK[bits], ring >> bits & 1
    return result, _carry_overflow(carry, bool(result & SIGN[bits]) != carry)


def rcr(bits: int, a: int, count: int, flags: int) -> tuple[int, int]:
    count = masked_count(bits, count) % (bits + 1)
    if not count:
        return a, flags & ROTATED
    ring = (flags & CF) << bits | a
    ring = ring >> count | ring << (bits + 1 - count)
    result, carry = ring & MASK[bits], ring >> bits & 1
    return result, _carry_overflow(carry, _top_two_differ(bits, result))


def shld(bits: int, a: int, b: int, count: int, flags: int) -> tuple[int, int]:
    """A 16-bit count above 16, undefined, goes on into ``a`` again."""
    count = masked_count(bits, count)
    if not count:
        return a, flags & SHIFTED
    wide = ((a << bits | b) << bits | a) << count
    result, carry = wide >> 2 * bits & MASK[bits], wide >> 3 * bits & 1
    overflow = (a ^ result) & SIGN[bits]
    return result, of_result(bits, result) | _carry_overflow(carry, overflow)


def shrd(bits: int, a: int, b: int, count: int, flags: int) -> tuple[int, int]:
    """A 16-bit count above 16, undefined, goes on into ``a`` again."""
    count = masked_count(bits, count)
    if not count:
        return a, flags & SHIFTED
    wide = (a << bits | b) << bits | a
    result, carry = wide >> count & MASK[bits], wide >> (count - 1) & 1
    overflow = (a ^ result) & SIGN[bits]
    return result, of_result(bits, result) | _carry_overflow(carry, overflow)


def _without_flags(
    shift: Callable[[int, int, int, int], tuple[int, int]],
) -> Callable[[int, int, int], int]:
    return lambda bits, a, count: shift(bits, a, count, 0)[0]


HANDLERS = [
    Operation("shl", "mr", shl, SHIFTED, takes_flags=True),
    Operation("sal", "mr", shl, SHIFTED, takes_flags=True),
    Operation("shr", "mr", shr, SHIFTED, takes_flags=True),
    Operation("sar", "mr", sar, SHIFTED, takes_flags=True),
    Operation("rol", "mr", rol, ROTATED, takes_flags=True),
    Operation("ror", "mr", ror, ROTATED, takes_flags=True),
    Operation("rcl", "mr", rcl, ROTATED, takes_flags=True),
    Operation("rcr", "mr", rcr, ROTATED, takes_flags=True),
    Operation("shld", "mrr", shld, SHIFTED, takes_flags=True),
    Operation("shrd", "mrr", shrd, SHIFTED, takes_flags=True),
    Operation("shlx", "wrr", _without_flags(shl)),
    Operation("shrx", "wrr", _without_flags(shr)),
    Operation("sarx", "wrr", _without_flags(sar)),
    Operation("rorx", "wrr", rotate_right),
]
