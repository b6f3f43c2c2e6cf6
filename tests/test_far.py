"""Far JMP and CALL by the rules of SDM Vol. 2 and Vol. 3, chapter 5."""

from __future__ import annotations

import struct

import pytest

from sandbox.cpu import GP, NP, TS
from sandbox.descriptors import Gate, serialise_gate
from sandbox.errors import EngineError
from sandbox.handler import Resume
from sandbox.registers import NT, RSP, Segment
from tests.far_machine import GATE, POINTER, fault, make, push, run, selector_of
from tests.machine import (
    ABSENT,
    ALWAYS,
    CODE0,
    CODE0_16,
    CODE3,
    CONFORMING0,
    DATA0,
    DATA3,
    GDT,
    HANDLER,
    STACK,
    TSS,
    TSS_SELECTOR,
    USER_STACK,
    Machine,
)


def far(mode: int, offset: int, selector: int) -> bytes:
    return offset.to_bytes(4 if mode == 32 else 8, "little") + struct.pack("<H", selector)


JMP, CALL = {32: "ff2b", 64: "48ff2b"}, {32: "ff1b", 64: "48ff1b"}


@pytest.mark.parametrize("mode", [32, 64])
def test_far_jump_and_call_to_code_of_the_same_level(mode: int) -> None:
    m = make(mode)
    m.memory.write(POINTER, far(mode, HANDLER, CODE0))
    assert run(m, JMP[mode]) == Resume(HANDLER)
    assert (selector_of(m, "cs"), m.cpu.gpr[RSP]) == (CODE0, USER_STACK)
    assert run(m, CALL[mode]) == Resume(HANDLER)
    size = mode // 8
    assert m.frame(2, size) == [0x4000_0123 + len(CALL[mode]) // 2, CODE0]
    assert m.cpu.gpr[RSP] == USER_STACK - 2 * size


def test_far_jump_to_a_conforming_segment_keeps_cpl() -> None:
    m = make(32, cpl=3)
    m.memory.write(POINTER, far(32, HANDLER, CONFORMING0))
    run(m, JMP[32])
    assert selector_of(m, "cs") == CONFORMING0 | 3


def test_immediate_far_pointers() -> None:
    m = make(32)
    code = "ea" + struct.pack("<IH", HANDLER, CODE0).hex()
    assert run(m, code) == Resume(HANDLER)
    code = "669a" + struct.pack("<HH", 0x5000, CODE0).hex()
    assert run(m, code) == Resume(0x5000)
    assert m.frame(2, 2) == [0x0123 + 6, CODE0]


def test_long_mode_can_jump_to_compatibility_code() -> None:
    m = make(64)
    m.memory.write(POINTER, far(64, HANDLER, CODE0_16))
    run(m, JMP[64])
    cs = m.bank.read_segment("cs")
    assert (cs.l, cs.db) == (0, 1)


TARGETS = [
    (0, 0, GP, 0), (0, 0x100, GP, 0x100), (0, DATA0, GP, DATA0), (0, CODE3, GP, CODE3),
    (3, CODE0, GP, CODE0), (0, ABSENT, NP, ABSENT), (0, CODE0 | 3, GP, CODE0),
]  # fmt: skip


@pytest.mark.parametrize("code", [JMP[32], CALL[32]])
@pytest.mark.parametrize(("cpl", "selector", "vector", "error"), TARGETS)
def test_far_target_checks(code: str, cpl: int, selector: int, vector: int, error: int) -> None:
    m = make(32, cpl)
    m.memory.write(POINTER, far(32, HANDLER, selector))
    assert fault(m, code) == (vector, error)


def test_targets_beyond_the_limit_or_not_canonical() -> None:
    m = make(32)
    m.memory.write(GDT + CODE0_16, (0x00409A0000000FFF).to_bytes(8, "little"))
    m.memory.write(POINTER, far(32, 0x1000, CODE0_16))
    assert fault(m, JMP[32]) == (GP, 0)
    m = make(64)
    m.memory.write(POINTER, far(64, 1 << 60, CODE0))
    assert fault(m, JMP[64]) == (GP, 0)


def test_real_mode_far_jump_call_and_return() -> None:
    m = make(16)
    m.memory.write(POINTER + 0x10, b"")
    assert run(m, "9a" + struct.pack("<HH", 0x1111, 0x2222).hex()) == Resume(0x1111)
    cs = m.bank.read_segment("cs")
    assert (cs.selector, cs.base) == (0x2222, 0x22220)
    assert m.memory.read(0x13000 + 0xFC, 4) == struct.pack("<HH", 0x5A, 0x1400)
    assert run(m, "cb") == Resume(0x5A)
    assert (selector_of(m, "cs"), m.cpu.gpr[RSP]) == (0x1400, 0xABCD0100)


def call_gate(m: Machine, **fields: int) -> None:
    gate = Gate(**{"selector": CODE0, "offset": HANDLER, "type": 12, "dpl": 3, **fields})
    m.memory.write(GDT + GATE, serialise_gate(gate, wide=m.wide))
    m.memory.write(POINTER, far(64 if m.wide else 32, 0xBAD, GATE | 3 * (m.bank.cpl == 3)))


def test_call_gate_to_ring_0_switches_stacks_and_copies_parameters() -> None:
    m = make(32, cpl=3)
    call_gate(m, count=2)
    push(m, 4, 0x11, 0x22)
    assert run(m, CALL[32]) == Resume(HANDLER)
    assert m.frame(6, 4) == [
        0x4000_0125, CODE3 | 3, 0x11, 0x22, USER_STACK - 8, DATA3 | 3,
    ]  # fmt: skip
    assert (m.cpu.gpr[RSP], selector_of(m, "ss"), m.bank.cpl) == (STACK - 24, DATA0, 0)


def test_long_mode_call_gate_takes_rsp0_and_a_null_ss() -> None:
    m = make(64, cpl=3)
    m.memory.write(TSS + 4, struct.pack("<Q", STACK))
    call_gate(m)
    assert run(m, CALL[64]) == Resume(HANDLER)
    assert m.frame(4, 8) == [0x4000_0126, CODE3 | 3, USER_STACK, DATA3 | 3]
    assert (selector_of(m, "ss"), selector_of(m, "cs")) == (0, CODE0)


GATES = [
    ({"dpl": 2}, GP, GATE), ({"present": 0}, NP, GATE), ({"selector": 0}, GP, 0),
    ({"selector": DATA0}, GP, DATA0), ({"type": 6}, GP, GATE),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "vector", "error"), GATES)
def test_call_gate_checks(fields: dict[str, int], vector: int, error: int) -> None:
    m = make(32, cpl=3)
    call_gate(m, **fields)
    assert fault(m, CALL[32]) == (vector, error)


def test_a_jump_does_not_change_privilege_through_a_gate() -> None:
    m = make(32, cpl=3)
    call_gate(m)
    assert fault(m, JMP[32]) == (GP, CODE0)
    call_gate(m, selector=CONFORMING0)
    run(m, JMP[32])
    assert selector_of(m, "cs") == CONFORMING0 | 3


def test_call_gate_with_a_short_tss() -> None:
    m = make(32, cpl=3)
    call_gate(m)
    m.bank.write_segment("tr", Segment(TSS_SELECTOR, TSS, 8, type=11, s=0))
    assert fault(m, CALL[32]) == (TS, TSS_SELECTOR)


def test_task_switches_are_refused_by_name() -> None:
    m = make(32)
    m.memory.write(GDT + TSS_SELECTOR, (0x0000_8901_1800_0067).to_bytes(8, "little"))
    m.memory.write(POINTER, far(32, 0, TSS_SELECTOR))
    with pytest.raises(EngineError, match="selector 0x40: hardware task switches"):
        run(m, JMP[32])
    m = make(32, flags=ALWAYS | NT)
    with pytest.raises(EngineError, match="NT set"):
        run(m, "cf")
