"""x87 addition to square root against the host CPU, and against Python's floats."""

from __future__ import annotations

import operator
import random
import struct
from collections.abc import Callable

import pytest

from handlers import x87_arithmetic
from handlers.softfloat import F64
from handlers.x87_format import extend, round_memory
from sandbox.decode import decode
from sandbox.native import State
from tests.differential import HandlerSubject
from tests.x87_oracle import assert_same, needs_host

HANDLERS = x87_arithmetic.HANDLERS
OPERATIONS = {"fadd": 0, "fmul": 1, "fsub": 4, "fsubr": 5, "fdiv": 6, "fdivr": 7}
"""Name to the reg field of the ModRM byte."""

MEMORY = {"m32": 0xD8, "m64": 0xDC, "m16int": 0xDE, "m32int": 0xDA}
REGISTERS = {"st0 from sti": 0xD8, "sti from st0": 0xDC, "and pop": 0xDE}


@needs_host
@pytest.mark.parametrize("size", MEMORY)
@pytest.mark.parametrize("name", OPERATIONS)
def test_memory_forms_do_what_the_host_cpu_does(name: str, size: str) -> None:
    assert_same(f"{MEMORY[size]:02x}{0x47 | OPERATIONS[name] << 3:02x}10", HANDLERS, 150)


@needs_host
@pytest.mark.parametrize("form", REGISTERS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_register_forms_do_what_the_host_cpu_does(name: str, form: str) -> None:
    for register in (0, 1, 5):
        code = f"{REGISTERS[form]:02x}{0xC0 | OPERATIONS[name] << 3 | register:02x}"
        assert_same(code, HANDLERS, 100)


@needs_host
@pytest.mark.parametrize(
    "code", ["d9fa", "d9fc", "d9e0", "d9e1"], ids=["fsqrt", "frndint", "fchs", "fabs"]
)
def test_unary_operations_do_what_the_host_cpu_does(code: str) -> None:
    assert_same(code, HANDLERS)


def to_register(value: float) -> int:
    return extend(F64, struct.unpack("<Q", struct.pack("<d", value))[0])[0]


def to_float(a: int) -> float:
    bits = round_memory(F64, a, 0x37F).bits if a & (1 << 79) - 1 else a >> 79 << 63
    value: float = struct.unpack("<d", struct.pack("<Q", bits))[0]
    return value


PYTHON: dict[str, Callable[[float, float], float]] = {
    "d8c1": operator.add, "d8c9": operator.mul, "d8e1": operator.sub, "d8f1": operator.truediv,
}  # fmt: skip


@pytest.mark.parametrize("code", PYTHON)
def test_with_double_precision_control_results_are_pythons(code: str) -> None:
    subject, insn = HandlerSubject(HANDLERS), decode(bytes.fromhex(code), 64)
    rng = random.Random(code)
    for _ in range(200):
        x, y = (rng.uniform(-2, 2) * 2.0 ** rng.randrange(-60, 60) for _ in range(2))
        state = State(fptag=0, fpcw=0x27F)
        state.st[:2] = to_register(x), to_register(y)
        result = subject.run(insn, state).state.st[0]
        assert result & 0x7FF == 0
        assert to_float(result) == PYTHON[code](x, y)


def test_an_unmasked_overflow_wraps_the_exponent() -> None:
    """SDM Vol. 1, 8.5.4: the result is divided by 2**24576, and stored."""
    largest = 0x7FFE_FFFFFFFFFFFFFFFF
    state = State(fptag=0, fpcw=0x377)
    state.st[:2] = largest, 0x4000_8000000000000000
    after = HandlerSubject(HANDLERS).run(decode(bytes.fromhex("d8c9"), 64), state)
    assert after.state.st[0] == largest + (1 << 64) - (24576 << 64)
    assert after.state.fpsw == 0x8088 and after.fault is None
