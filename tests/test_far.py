"""Segment loads, far transfers and returns by the rules of SDM Vol. 2 and Vol. 3 chapter 5."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from handlers.system import PACK
from sandbox.cpu import GP, NP, SS_, TS, UD, Fault
from sandbox.decode import decode
from sandbox.descriptors import Gate, serialise_gate
from sandbox.errors import EngineError
from sandbox.handler import Resume
from sandbox.registers import AC, CF, IF, IOPL, NT, RAX, RBX, RSP, TF, VM, ZF, Segment
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
    machine,
)

POINTER = 0x12000
GATE = 0x60


def run(m: Machine, code: str) -> Any:
    insn = decode(bytes.fromhex(code), m.cpu.bitness)
    for handler in PACK.handlers:
        if insn.mnemonic in handler.mnemonics or insn.form in handler.forms:
            action = handler.bind(m.cpu, insn)
            assert action is not None
            return action()
    raise AssertionError(f"nobody takes {insn.text()}")


def fault(m: Machine, code: str) -> tuple[int, int | None]:
    def everything() -> Any:
        bank = m.bank
        return dict(bank.values), dict(bank.segments), m.cpu.gpr.tobytes(), bytes(m.memory.data)

    before = everything()
    with pytest.raises(Fault) as caught:
        run(m, code)
    assert everything() == before, "a fault changes nothing"
    return caught.value.vector, caught.value.error_code


def make(mode: int, cpl: int = 0, flags: int = ALWAYS) -> Machine:
    m = machine(mode, cpl, flags)
    m.bank.bitness = mode
    m.cpu.gpr[RBX] = POINTER
    return m


def selector_of(m: Machine, name: str) -> int:
    return m.bank.read_segment(name).selector


def push(m: Machine, size: int, *values: int) -> None:
    """Values on the stack, the first at the top."""
    m.cpu.gpr[RSP] -= size * len(values)
    data = b"".join(v.to_bytes(size, "little") for v in values)
    m.memory.write(m.cpu.gpr[RSP], data)


# Segment loads


def test_mov_to_ds_loads_the_descriptor_and_marks_it() -> None:
    m = make(32)
    m.cpu.gpr[RAX] = 0xFFFF_0000 | DATA0
    run(m, "8ed8")
    ds = m.bank.read_segment("ds")
    assert (ds.selector, ds.base, ds.limit, ds.type, ds.dpl) == (DATA0, 0, 0xFFFF_FFFF, 3, 0)
    assert m.memory.read(GDT + DATA0 + 5, 1) == b"\x93"


def test_null_selectors_load_data_segments_but_not_ss() -> None:
    m = make(32)
    m.cpu.gpr[RAX] = 3
    run(m, "8ec0")
    assert (selector_of(m, "es"), m.bank.read_segment("es").present) == (3, 0)
    assert fault(m, "8ed0") == (GP, 0)


def test_a_null_ss_is_for_64_bit_code_above_cpl_3() -> None:
    m = make(64)
    m.cpu.gpr[RAX] = 0
    run(m, "8ed0")
    assert selector_of(m, "ss") == 0
    m = make(64, cpl=3)
    m.cpu.gpr[RAX] = 3
    assert fault(m, "8ed0") == (GP, 0)


DATA_LOADS = [
    (0, 0x100, GP, 0x100), (3, DATA0, GP, DATA0), (3, DATA0 | 3, GP, DATA0), (0, 0x58, NP, 0x58),
    (0, DATA0 | 3, GP, DATA0), (0, 0x50 | 2, GP, 0x50), (0, TSS_SELECTOR, GP, TSS_SELECTOR),
]  # fmt: skip
"""CPL, selector, fault, error code."""


@pytest.mark.parametrize(("cpl", "selector", "vector", "error"), DATA_LOADS)
def test_data_segment_checks(cpl: int, selector: int, vector: int, error: int) -> None:
    m = make(32, cpl)
    m.memory.write(GDT + 0x58, (0x00CF12000000FFFF).to_bytes(8, "little"))
    m.cpu.gpr[RAX] = selector
    assert fault(m, "8ed8") == (vector, error)


@pytest.mark.parametrize("selector", [CONFORMING0, CONFORMING0 | 3, CODE3 | 3, DATA3])
def test_conforming_code_and_own_data_can_be_loaded_at_cpl_3(selector: int) -> None:
    m = make(32, cpl=3)
    m.cpu.gpr[RAX] = selector
    run(m, "8ed8")
    assert selector_of(m, "ds") == selector


STACK_LOADS = [
    (DATA0 | 3, GP, DATA0), (DATA3, GP, DATA3), (CODE0, GP, CODE0), (0x58, SS_, 0x58),
    (0x100, GP, 0x100),
]  # fmt: skip


@pytest.mark.parametrize(("selector", "vector", "error"), STACK_LOADS)
def test_stack_segment_checks(selector: int, vector: int, error: int) -> None:
    m = make(32)
    m.memory.write(GDT + 0x58, (0x00CF12000000FFFF).to_bytes(8, "little"))
    m.cpu.gpr[RAX] = selector
    assert fault(m, "8ed0") == (vector, error)


def test_real_mode_loads_shift_the_selector_and_keep_the_limit() -> None:
    m = make(16)
    m.bank.write_segment("ds", Segment(limit=0xFFFF_FFFF))
    m.cpu.gpr[RAX] = 0x1234
    run(m, "8ed8")
    ds = m.bank.read_segment("ds")
    assert (ds.selector, ds.base, ds.limit) == (0x1234, 0x12340, 0xFFFF_FFFF)


def test_pop_segment_moves_the_stack_by_the_operand_size() -> None:
    for code, size in (("1f", 4), ("661f", 2)):
        m = make(32)
        push(m, size, DATA0)
        run(m, code)
        assert (selector_of(m, "ds"), m.cpu.gpr[RSP]) == (DATA0, USER_STACK)
    m = make(64)
    push(m, 8, DATA3)
    run(m, "0fa1")
    assert (selector_of(m, "fs"), m.cpu.gpr[RSP]) == (DATA3, USER_STACK)


def test_lss_loads_both_or_neither() -> None:
    m = make(32)
    m.memory.write(POINTER, struct.pack("<IH", 0x1234, DATA0))
    run(m, "0fb223")
    assert (selector_of(m, "ss"), m.cpu.gpr[RSP]) == (DATA0, 0x1234)
    m.memory.write(POINTER, struct.pack("<IH", 0x1234, DATA3))
    assert fault(m, "0fb223") == (GP, DATA3)


# LAR, LSL, VERR, VERW


@pytest.mark.parametrize(
    ("cpl", "selector", "rights", "limit"),
    [
        (0, CODE0, 0x00CF9A00, 0xFFFF_FFFF),
        (3, CONFORMING0, 0x00CF9E00, 0xFFFF_FFFF),
        (3, DATA0, None, None),
        (0, DATA0 | 3, None, None),
        (0, 0, None, None),
        (0, 0x100, None, None),
        (0, GATE, 0x00008C00, None),
        (0, TSS_SELECTOR, 0x00008900, 0x67),
    ],
)
def test_lar_and_lsl(cpl: int, selector: int, rights: int | None, limit: int | None) -> None:
    m = make(32, cpl)
    m.memory.write(GDT + GATE, serialise_gate(Gate(CODE0, HANDLER, 12)))
    m.memory.write(GDT + TSS_SELECTOR, (0x0000_8901_1800_0067).to_bytes(8, "little"))
    for code, wanted in (("0f02c3", rights), ("0f03c3", limit)):
        m.cpu.gpr[RBX], m.cpu.gpr[RAX] = selector, 0x5555
        run(m, code)
        assert bool(m.cpu.rflags & ZF) == (wanted is not None)
        defined = 0xFFF0_FFFF if code == "0f02c3" else 0xFFFF_FFFF
        assert (m.cpu.gpr[RAX] ^ (0x5555 if wanted is None else wanted)) & defined == 0


@pytest.mark.parametrize(
    ("cpl", "selector", "readable", "writable"),
    [(0, DATA0, 1, 1), (3, DATA0, 0, 0), (0, CODE0, 1, 0), (3, CONFORMING0, 1, 0),
     (3, DATA3 | 3, 1, 1), (0, 0, 0, 0), (0, 0x100, 0, 0), (0, TSS_SELECTOR, 0, 0)],
)  # fmt: skip
def test_verr_and_verw(cpl: int, selector: int, readable: int, writable: int) -> None:
    m = make(32, cpl)
    m.cpu.gpr[RAX] = selector
    for code, wanted in (("0f00e0", readable), ("0f00e8", writable)):
        run(m, code)
        assert bool(m.cpu.rflags & ZF) == bool(wanted)


def test_real_mode_has_no_descriptors_to_look_at() -> None:
    for code in ("0f02c3", "0f03c3", "0f00e0", "0f00e8"):
        assert fault(make(16), code) == (UD, None)


# Far JMP and CALL


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


# RETF


@pytest.mark.parametrize("mode", [32, 64])
def test_far_return_to_the_same_level_releases_parameters(mode: int) -> None:
    size = mode // 8
    m = make(mode)
    push(m, size, HANDLER, CODE0, 1, 2)
    code = "ca" + struct.pack("<H", 2 * size).hex()
    assert run(m, code if mode == 32 else "48" + code) == Resume(HANDLER)
    assert m.cpu.gpr[RSP] == USER_STACK


@pytest.mark.parametrize("mode", [32, 64])
def test_far_return_to_ring_3_pops_the_stack_and_hides_segments(mode: int) -> None:
    size = mode // 8
    m = make(mode)
    m.bank.write_segment("ds", Segment(DATA0, type=3, dpl=0))
    m.bank.write_segment("es", Segment(DATA3 | 3, type=3, dpl=3))
    m.bank.write_segment("fs", Segment(CONFORMING0, type=15, dpl=0))
    push(m, size, HANDLER, CODE3 | 3, 0xAA, 0x9000, DATA3 | 3)
    code = "ca" + struct.pack("<H", size).hex()
    assert run(m, code if mode == 32 else "48" + code) == Resume(HANDLER)
    assert m.cpu.gpr[RSP] == 0x9000 + size
    assert [selector_of(m, n) for n in ("cs", "ss", "ds", "es", "fs")] == [
        CODE3 | 3, DATA3 | 3, 0, DATA3 | 3, CONFORMING0,
    ]  # fmt: skip


RETURNS = [
    (0, [HANDLER, 0], GP, 0),
    (3, [HANDLER, CODE0], GP, CODE0),
    (0, [HANDLER, CODE3], GP, CODE3),
    (0, [HANDLER, ABSENT], NP, ABSENT),
    (0, [HANDLER, CODE3 | 3, 0x9000, 0], GP, 0),
    (0, [HANDLER, CODE3 | 3, 0x9000, DATA0], GP, DATA0),
    (0, [HANDLER, CODE3 | 3, 0x9000, DATA0 | 3], GP, DATA0),
]


@pytest.mark.parametrize(("cpl", "values", "vector", "error"), RETURNS)
def test_far_return_checks(cpl: int, values: list[int], vector: int, error: int) -> None:
    m = make(32, cpl)
    push(m, 4, *values, *[0] * 6)
    assert fault(m, "cb") == (vector, error)


# IRET


def test_iret_undoes_a_delivery_in_each_mode() -> None:
    for mode, cpl in ((32, 0), (32, 3), (64, 0), (64, 3)):
        m = make(mode, cpl, ALWAYS | IF | ZF)
        m.bank.write_segment("ds", Segment(DATA3 | 3, type=3, dpl=3))
        before = dict(m.bank.segments), m.cpu.gpr[RSP]
        m.gate(0x40, type=15)
        m.deliver(0x40)
        m.bank.write("rflags", ALWAYS | TF)
        assert run(m, "48cf" if mode == 64 else "cf") == Resume(0x4000_0123)
        assert m.cpu.rflags == ALWAYS | IF | ZF
        assert m.cpu.gpr[RSP] == before[1]
        for name in ("cs", "ss", "ds"):
            was, now = before[0][name], m.bank.read_segment(name)
            assert (now.selector, now.dpl, now.l) == (was.selector, was.dpl, was.l), (mode, name)


def test_iret_lets_users_change_neither_if_nor_iopl() -> None:
    m = make(32, cpl=3, flags=ALWAYS | IF)
    push(m, 4, HANDLER, CODE3 | 3, ALWAYS | IOPL | CF | AC)
    run(m, "cf")
    assert m.cpu.rflags == ALWAYS | IF | CF | AC
    m = make(32, flags=ALWAYS | IF)
    push(m, 4, HANDLER, CODE0, ALWAYS | IOPL)
    run(m, "cf")
    assert m.cpu.rflags == ALWAYS | IOPL
    m = make(32, cpl=3, flags=ALWAYS | IOPL)
    push(m, 4, HANDLER, CODE3 | 3, ALWAYS | IF)
    run(m, "cf")
    assert m.cpu.rflags == ALWAYS | IF | IOPL


def test_16_bit_iret_leaves_the_high_flags_alone() -> None:
    m = make(32, flags=ALWAYS | AC)
    push(m, 2, 0x5000, CODE0, ALWAYS | CF)
    assert run(m, "66cf") == Resume(0x5000)
    assert (m.cpu.rflags, m.cpu.gpr[RSP]) == (ALWAYS | AC | CF, USER_STACK)


def test_iret_enters_virtual_8086_mode() -> None:
    m = make(32)
    image = ALWAYS | VM | IF | IOPL
    push(m, 4, 0x1234, 0x100, image, 0x5678, 0x200, 0x300, 0x400, 0x500, 0x600)
    assert run(m, "cf") == Resume(0x1234)
    names = ("cs", "ss", "es", "ds", "fs", "gs")
    assert [selector_of(m, n) for n in names] == [0x100, 0x200, 0x300, 0x400, 0x500, 0x600]
    ds = m.bank.read_segment("ds")
    assert (ds.base, ds.limit, ds.dpl) == (0x4000, 0xFFFF, 3)
    assert (m.cpu.rflags, m.cpu.gpr[RSP]) == (image, 0x5678)


def test_virtual_8086_mode_returns_only_with_iopl_3() -> None:
    m = make(32, flags=ALWAYS | VM)
    m.bank.bitness = 16
    assert fault(m, "cf") == (GP, 0)


def test_real_mode_iret() -> None:
    m = make(16)
    m.memory.write(0x13100, struct.pack("<HHH", 0x77, 0x3000, ALWAYS | IF | CF))
    assert run(m, "cf") == Resume(0x77)
    assert (m.cpu.rflags, m.cpu.gpr[RSP]) == (ALWAYS | IF | CF, 0xABCD0106)
    assert m.bank.read_segment("cs").base == 0x30000


def test_nt_in_long_mode_is_gp() -> None:
    assert fault(make(64, flags=ALWAYS | NT), "48cf") == (GP, 0)


def test_iretq_to_compatibility_code_and_to_a_null_ss() -> None:
    m = make(64)
    push(m, 8, HANDLER, CODE0, ALWAYS, 0x9000, 0)
    run(m, "48cf")
    assert (selector_of(m, "ss"), m.cpu.gpr[RSP]) == (0, 0x9000)
    m = make(64)
    m.memory.write(GDT + CODE3, (0x00CFFA000000FFFF).to_bytes(8, "little"))
    push(m, 8, HANDLER, CODE3 | 3, ALWAYS, 0x9000, DATA3 | 3)
    run(m, "48cf")
    cs = m.bank.read_segment("cs")
    assert (cs.l, cs.db, cs.dpl) == (0, 1, 3)


def test_a_stack_that_does_not_reach_is_ss() -> None:
    m = make(32)
    m.bank.write_segment("ss", Segment(DATA0, 0, USER_STACK + 3, type=3, db=1))
    assert fault(m, "cb") == (SS_, 0)
    m = make(64)
    m.cpu.gpr[RSP] = 1 << 60
    assert fault(m, "48cf") == (SS_, 0)
