"""Bitwise logic (SDM Vol. 1, 7.3.5). AF, undefined after these, is cleared as CPUs do."""

from __future__ import annotations

from handlers.flags import MASK, STATUS, of_result
from handlers.integer import Operation
from sandbox.registers import CF, OF, SF, ZF


def and_(bits: int, a: int, b: int) -> tuple[int, int]:
    result = a & b
    return result, of_result(bits, result)


def or_(bits: int, a: int, b: int) -> tuple[int, int]:
    result = a | b
    return result, of_result(bits, result)


def xor(bits: int, a: int, b: int) -> tuple[int, int]:
    result = a ^ b
    return result, of_result(bits, result)


def not_(bits: int, a: int) -> int:
    return a ^ MASK[bits]


def andn(bits: int, a: int, b: int) -> tuple[int, int]:
    """BMI1: AF and PF stay, they are undefined."""
    result = b & ~a
    return result, of_result(bits, result) & (SF | ZF)


HANDLERS = [
    Operation("and", "mr", and_, STATUS),
    Operation("or", "mr", or_, STATUS),
    Operation("xor", "mr", xor, STATUS),
    Operation("test", "rr", and_, STATUS),
    Operation("not", "m", not_),
    Operation("andn", "wrr", andn, SF | ZF | CF | OF),
]
