"""LDMXCSR and STMXCSR."""

from __future__ import annotations

import pytest

from handlers import float_control
from sandbox.cpu import GP, PF_, Fault
from sandbox.decode import decode
from sandbox.handler import Action
from sandbox.native import DATA, State
from sandbox.registers import RSI, Registers
from tests.differential import compare, resolve
from tests.doubles import make_cpu

LOADS = ("0fae16", "c5f8ae16")  # (v)ldmxcsr [rsi]
STORES = ("0fae1e", "c5f8ae1e")


def states() -> list[State]:
    found = []
    for value in (0, 0x1F80, 0xFFFF, 0x1F80 | 0x8040, 0x10000, 0x80001F80, 0x003F):
        state = State(mxcsr=0x1FA0)
        state.gpr[RSI] = DATA + 3
        state.store(DATA + 3, value.to_bytes(4, "little"))
        found.append(state)
    return found


@pytest.mark.parametrize("code", LOADS + STORES)
def test_equals_the_host(code: str) -> None:
    compare(code, float_control, states=states())


def bound(code: str, value: int, address: int = 0x10100) -> tuple[Action, Registers]:
    cpu = make_cpu()
    cpu.registers.xcr0 = 7
    cpu.gpr[RSI] = address
    cpu.write_int(0x10100, value, 4)
    found = resolve(float_control, cpu, decode(bytes.fromhex(code), 64))
    assert found is not None
    return found[1], cpu.registers


@pytest.mark.parametrize("code", LOADS)
@pytest.mark.parametrize("bit", range(16, 32))
def test_reserved_bits_are_refused(code: str, bit: int) -> None:
    action, registers = bound(code, 0x1F80 | 1 << bit)
    with pytest.raises(Fault) as fault:
        action()
    assert (fault.value.vector, fault.value.error_code) == (GP, 0)
    assert registers.mxcsr == 0x1F80


@pytest.mark.parametrize("code", LOADS + STORES)
def test_unmapped_memory_is_a_page_fault(code: str) -> None:
    action, _registers = bound(code, 0x1F80, 0x8000)
    with pytest.raises(Fault) as fault:
        action()
    assert fault.value.vector == PF_
