"""x87 loads, stores, conditional moves and constants against the host CPU."""

from __future__ import annotations

import pytest

from handlers import x87_move
from handlers.x87_move import constant
from sandbox.decode import decode
from sandbox.native import DATA, State
from sandbox.registers import RDI
from tests.differential import HandlerSubject
from tests.x87_oracle import assert_same, needs_host

HANDLERS = x87_move.HANDLERS
STORES = {
    "fst m32": "d95710", "fst m64": "dd5710", "fstp m32": "d95f10", "fstp m64": "dd5f10",
    "fstp m80": "db7f10", "fst sti": "ddd3", "fstp sti": "dddb", "fstp st0": "ddd8",
    "fstp sti, alias": "dfdb",
}  # fmt: skip
STACK = {
    "fld m80": "db6f10", "fld sti": "d9c3", "fld st7": "d9c7", "fxch": "d9cb", "fxch st0": "d9c8",
    "ffree": "ddc3", "ffreep": "dfc3", "fincstp": "d9f7", "fdecstp": "d9f6",
}  # fmt: skip
DENORMAL = 2
CONSTANTS = ["fld1", "fldl2t", "fldl2e", "fldpi", "fldlg2", "fldln2", "fldz"]
"""In the order of their encodings, from D9 E8."""


@needs_host
@pytest.mark.parametrize("code", STORES.values(), ids=STORES)
def test_stores_do_what_the_host_cpu_does(code: str) -> None:
    assert_same(code, HANDLERS)


@needs_host
@pytest.mark.parametrize("code", STACK.values(), ids=STACK)
def test_stack_instructions_do_what_the_host_cpu_does(code: str) -> None:
    assert_same(code, HANDLERS, 200)


@needs_host
@pytest.mark.parametrize("code", ["d94710", "dd4710"], ids=["fld m32", "fld m64"])
def test_loads_do_what_the_host_cpu_does(code: str) -> None:
    """With DE masked: if it is not, AMD pushes the number, and Intel's manual says not to."""
    assert_same(code, HANDLERS, masked=DENORMAL)


def test_an_unmasked_denormal_is_not_loaded() -> None:
    """SDM Vol. 1, 8.5.2: the top of the stack and the operand stay."""
    state = State(fpcw=0x37D)
    state.gpr[RDI] = DATA
    state.store(DATA, bytes([1, 0, 0, 0]))
    after = HandlerSubject(HANDLERS).run(decode(bytes.fromhex("d907"), 64), state).state
    assert (after.fpsw, after.fptag) == (0x8082, 0xFFFF)


@needs_host
@pytest.mark.parametrize("opcode", [0xDA, 0xDB], ids=["fcmovcc", "fcmovncc"])
def test_conditional_moves_do_what_the_host_cpu_does(opcode: int) -> None:
    for condition in range(4):
        assert_same(f"{opcode:02x}{0xC2 | condition << 3:02x}", HANDLERS, 150)


@needs_host
@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_are_those_of_the_host_cpu(name: str) -> None:
    assert_same(f"d9{0xE8 + CONSTANTS.index(name):02x}", HANDLERS, 150)


def test_pi_is_rounded_as_rounding_control_says() -> None:
    low, high = 0x4000_C90FDAA22168C234, 0x4000_C90FDAA22168C235
    assert [constant("fldpi", mode << 10) for mode in range(4)] == [high, low, high, low]
