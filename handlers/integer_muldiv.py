"""Multiplication and division (SDM Vol. 2, MUL, IMUL, DIV, IDIV, MULX).

After a multiplication CF = OF = "the upper half says something"; the other status flags, and all
of them after a division, are undefined and stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from iced_x86 import Register

from handlers.flags import MASK
from handlers.integer import Operand, Operation, bind_operand, bind_operands, general_register
from handlers.integer_shift import signed
from sandbox.cpu import DE, Fault
from sandbox.handler import Action, Handler
from sandbox.registers import CF, OF

if TYPE_CHECKING:
    from sandbox.cpu import Cpu
    from sandbox.decode import Insn

_PAIRS = {
    8: (Register.AH, Register.AL),
    16: (Register.DX, Register.AX),
    32: (Register.EDX, Register.EAX),
    64: (Register.RDX, Register.RAX),
}
"""Upper and lower half of a double-width accumulator, by operand width."""


def imul(bits: int, a: int, b: int) -> tuple[int, int]:
    """The truncated signed product."""
    product = signed(bits, a) * signed(bits, b)
    result = product & MASK[bits]
    return result, 0 if signed(bits, result) == product else CF | OF


def multiply_unsigned(bits: int, a: int, b: int) -> tuple[int, bool]:
    """The double-width product, and whether it needs its upper half."""
    product = a * b
    return product, bool(product >> bits)


def multiply_signed(bits: int, a: int, b: int) -> tuple[int, bool]:
    """The double-width signed product, and whether it needs its upper half."""
    product = signed(bits, a) * signed(bits, b)
    return product, signed(bits, product & MASK[bits]) != product


def divide_unsigned(bits: int, dividend: int, divisor: int) -> tuple[int, int]:
    """Quotient and remainder of a double-width dividend; #DE."""
    if not divisor:
        raise Fault(DE)
    quotient, remainder = divmod(dividend, divisor)
    if quotient >> bits:
        raise Fault(DE)
    return quotient, remainder


def divide_signed(bits: int, dividend: int, divisor: int) -> tuple[int, int]:
    """As :func:`divide_unsigned`, but signed and rounded towards zero."""
    if not divisor:
        raise Fault(DE)
    number, by = signed(2 * bits, dividend), signed(bits, divisor)
    quotient, remainder = divmod(abs(number), abs(by))
    if (number < 0) != (by < 0):
        quotient = -quotient
    if not -(1 << (bits - 1)) <= quotient < 1 << (bits - 1):
        raise Fault(DE)
    return quotient, -remainder if number < 0 else remainder


class _Wide(Handler):
    """An instruction with one explicit operand and a register pair, (E/R)DX:(E/R)AX or AX."""

    restartable = True

    def __init__(self, mnemonic: str, compute: Callable[[int, int, int], tuple[int, int]]) -> None:
        self.name = f"{__name__}.{mnemonic}"
        self.mnemonics = (mnemonic,)
        self.compute = compute

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        source = bind_operand(cpu, insn, 0) if insn.iced.op_count == 1 else None
        if source is None:
            return None
        upper, lower = (general_register(cpu, name) for name in _PAIRS[source.bits])
        return self.bind_wide(cpu, upper, lower, source)

    def bind_wide(self, cpu: Cpu, upper: Operand, lower: Operand, source: Operand) -> Action:
        raise NotImplementedError


class WideMultiply(_Wide):
    """MUL and one-operand IMUL."""

    def bind_wide(self, cpu: Cpu, upper: Operand, lower: Operand, source: Operand) -> Action:
        bits, compute, bank = source.bits, self.compute, cpu.registers.bank

        def action() -> None:
            product, overflow = compute(bits, lower.read(), source.read())
            lower.write(product)
            upper.write(product >> bits)
            rest = bank.read("rflags") & ~(CF | OF)
            bank.write("rflags", rest | (CF | OF if overflow else 0))

        return action


class WideDivide(_Wide):
    """DIV and IDIV."""

    def bind_wide(self, cpu: Cpu, upper: Operand, lower: Operand, source: Operand) -> Action:
        bits, compute = source.bits, self.compute

        def action() -> None:
            dividend = upper.read() << bits | lower.read()
            quotient, remainder = compute(bits, dividend, source.read())
            lower.write(quotient)
            upper.write(remainder)

        return action


class Mulx(Handler):
    """MULX high, low, source: unsigned, by (E/R)DX; the same register twice keeps the high half."""

    name = f"{__name__}.mulx"
    mnemonics = ("mulx",)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        bound = bind_operands(cpu, insn, 3)
        if bound is None:
            return None
        upper, lower, source = bound
        bits = source.bits
        read_factor = general_register(cpu, _PAIRS[bits][0]).read

        def action() -> None:
            product = read_factor() * source.read()
            lower.write(product)
            upper.write(product >> bits)

        return action


HANDLERS = [
    WideMultiply("mul", multiply_unsigned),
    WideMultiply("imul", multiply_signed),
    Operation("imul", "mr", imul, CF | OF),
    Operation("imul", "wrr", imul, CF | OF),
    WideDivide("div", divide_unsigned),
    WideDivide("idiv", divide_signed),
    Mulx(),
]
