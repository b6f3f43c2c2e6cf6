"""Operands of x87 instructions: a number or an integer in memory, or another register."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from iced_x86 import Register

from handlers.softfloat import F32, F64
from handlers.x87_format import extend
from handlers.x87_fpu import Fpu, has_memory
from handlers.x87_integer import from_signed, size_of
from sandbox.cpu import Cpu, bind_address
from sandbox.decode import Insn

Source: TypeAlias = Callable[[], "int | None"]
"""Gives an operand as a register; None if it is an empty one."""

FORMATS = {"M32FP": F32, "M64FP": F64}


def stack_index(insn: Insn, operand: int) -> int:
    """Which ST(i) an operand is."""
    return insn.iced.op_register(operand) - Register.ST0


def bind_source(cpu: Cpu, fpu: Fpu, insn: Insn) -> Source:
    """The last operand. A denormal in memory is told to :attr:`Fpu.denormal_source`."""
    if not has_memory(insn):
        index = stack_index(insn, insn.iced.op_count - 1)
        return lambda: None if fpu.is_empty(index) else fpu.st(index)
    address, read_int = bind_address(cpu, insn), cpu.read_int
    f = FORMATS.get(insn.form.rpartition("_")[2])
    if f is None:
        size = size_of(insn)
        return lambda: from_signed(read_int(address(), size), size)
    form, width = f, (f.precision + f.exponent_bits) // 8

    def read() -> int:
        value, fpu.denormal_source = extend(form, read_int(address(), width))
        return value

    return read
