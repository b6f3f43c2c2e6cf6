"""Event delivery by the rules of SDM Vol. 3 chapter 6, on tables laid out by hand."""

from __future__ import annotations

import struct

import pytest

from sandbox.cpu import BP, DE, DF_, GP, NP, PF_, SS_, TS, UD
from sandbox.errors import EngineError
from sandbox.events import TripleFault, can_deliver
from sandbox.registers import (
    AC,
    CF,
    IF,
    NT,
    RF,
    RSP,
    SEGMENT_NAMES,
    TF,
    VM,
    ZF,
    DescriptorTable,
    Segment,
)
from tests.machine import (
    ABSENT,
    ALWAYS,
    CODE0,
    CODE0_16,
    CODE3,
    CONFORMING0,
    DATA0,
    DATA1,
    DATA3,
    GDT,
    HANDLER,
    IDT,
    STACK,
    TSS,
    TSS_SELECTOR,
    USER_STACK,
    Machine,
    machine,
)

# Real mode


def test_real_mode_pushes_flags_cs_ip_and_jumps_through_the_ivt() -> None:
    m = machine(16, flags=ALWAYS | IF | TF | AC | CF | RF)
    m.memory.write(0x10000 + 6 * 4, struct.pack("<HH", 0x1234, 0xF000))
    m.deliver(UD)
    assert m.cpu.gpr[RSP] == 0xABCD00FA
    assert struct.unpack("<HHH", m.memory.read(0x130FA, 6)) == (0x55, 0x1400, ALWAYS | 0x301)
    cs = m.bank.read_segment("cs")
    assert (m.cpu.rip, cs.selector, cs.base) == (0x1234, 0xF000, 0xF0000)
    assert m.cpu.rflags == ALWAYS | CF


def test_real_mode_pushes_no_error_code_and_wraps_the_stack() -> None:
    m = machine(16)
    m.cpu.gpr[RSP] = 2
    m.bank.write_segment("ss", Segment(0x1300, 0x10000))
    m.memory.data.extend(bytes(0x10000))
    m.deliver(GP, 0)
    assert m.cpu.gpr[RSP] == 0xFFFC
    assert m.memory.read(0x1FFFC, 4) == struct.pack("<HH", 0x55, 0x1400)
    assert m.memory.read(0x10000, 2) == struct.pack("<H", ALWAYS)


def test_real_mode_software_interrupt_returns_after_the_instruction() -> None:
    m = machine(16)
    m.deliver(0x21, software=True, next_rip=0x57)
    assert m.memory.read(0x130FA, 2) == b"\x57\0"


def test_real_mode_vector_beyond_the_ivt_becomes_gp() -> None:
    m = machine(16)
    m.bank.write_table("idtr", DescriptorTable(0x10000, 14 * 4 - 1))
    m.memory.write(0x10000 + 13 * 4, struct.pack("<HH", 0x1313, 0))
    m.deliver(0x20, software=True, next_rip=0x57)
    assert (m.cpu.rip, m.memory.read(0x130FA, 2)) == (0x1313, b"\x55\0")


# 32-bit protected mode


def test_interrupt_gate_at_the_same_level_pushes_flags_cs_eip() -> None:
    m = machine(32, flags=ALWAYS | IF | TF | NT | ZF)
    m.gate(UD)
    m.deliver(UD)
    assert m.frame(3, 4) == [0x4000_0123, CODE0, ALWAYS | IF | TF | NT | ZF | RF]
    assert (m.cpu.rip, m.cpu.gpr[RSP]) == (HANDLER, USER_STACK - 12)
    assert m.cpu.rflags == ALWAYS | ZF
    cs = m.bank.read_segment("cs")
    assert (cs.selector, cs.base, cs.limit, cs.type) == (CODE0, 0, 0xFFFF_FFFF, 0xB)
    assert m.memory.read(GDT + CODE0 + 5, 1) == b"\x9b", "the accessed bit is set"


def test_trap_gate_keeps_if() -> None:
    m = machine(32, flags=ALWAYS | IF | TF)
    m.gate(BP, type=15, dpl=3)
    m.deliver(BP, software=True, next_rip=0x4000_0124)
    assert m.cpu.rflags == ALWAYS | IF
    assert m.frame(3, 4) == [0x4000_0124, CODE0, ALWAYS | IF | TF]


def test_error_code_is_pushed_last() -> None:
    m = machine(32)
    m.gate(GP)
    m.deliver(GP, 0x1234)
    assert m.frame(4, 4) == [0x1234, 0x4000_0123, CODE0, ALWAYS | RF]


def test_page_fault_sets_cr2() -> None:
    m = machine(32)
    m.gate(PF_)
    m.deliver(PF_, 6, address=0xDEAD_BEEF)
    assert m.bank.read("cr2") == 0xDEAD_BEEF
    assert m.frame(1, 4) == [6]


def test_external_interrupts_push_rf_as_it_is() -> None:
    m = machine(32, flags=ALWAYS | IF)
    m.gate(0x40)
    m.deliver(0x40)
    assert m.frame(3, 4)[2] == ALWAYS | IF


@pytest.mark.parametrize("vector", [DE, DF_, GP, PF_])
def test_interrupts_may_have_vectors_of_exceptions(vector: int) -> None:
    """They push neither RF nor an error code, and a fault on the way is no double fault."""
    m = machine(32, flags=ALWAYS | IF)
    m.gate(vector)
    m.deliver(vector, external=True)
    assert m.frame(3, 4) == [0x4000_0123, CODE0, ALWAYS | IF]
    assert m.cpu.gpr[RSP] == USER_STACK - 12
    m = machine(32)
    m.gate(vector, present=0)
    m.gate(NP, offset=HANDLER + NP)
    m.gate(DF_ if vector != DF_ else UD)
    m.deliver(vector, external=True)
    assert m.cpu.rip == HANDLER + NP
    assert m.frame(1, 4) == [vector * 8 + 3], "IDT and EXT"


def test_privilege_change_takes_the_stack_of_the_tss() -> None:
    m = machine(32, cpl=3, flags=ALWAYS | IF)
    m.gate(GP)
    m.deliver(GP, 0)
    assert m.cpu.gpr[RSP] == STACK - 24
    assert m.frame(6, 4) == [0, 0x4000_0123, CODE3 | 3, ALWAYS | IF | RF, USER_STACK, DATA3 | 3]
    ss = m.bank.read_segment("ss")
    assert (ss.selector, ss.dpl, ss.type, m.bank.cpl) == (DATA0, 0, 3, 0)
    assert m.memory.read(GDT + DATA0 + 5, 1) == b"\x93"


def test_16_bit_gate_pushes_words() -> None:
    m = machine(32)
    m.gate(GP, type=6, selector=CODE0_16, offset=0x5000)
    m.deliver(GP, 8)
    assert m.frame(4, 2) == [8, 0x0123, CODE0, ALWAYS]
    assert m.cpu.rip == 0x5000


def test_16_bit_tss() -> None:
    m = machine(32, cpl=3)
    m.bank.write_segment("tr", Segment(TSS_SELECTOR, TSS, 0x2B, type=3, s=0))
    m.memory.write(TSS + 2, struct.pack("<HH", 0xFF00, DATA0))
    m.bank.write_segment("ss", Segment(DATA3 | 3, 0, 0xFFFFFFFF, 3, 1, 3, 1, db=1, g=1))
    m.memory.write(GDT + DATA0, (0x000092010000FFFF).to_bytes(8, "little"))
    m.memory.data.extend(bytes(0x10000))
    m.gate(UD)
    m.deliver(UD)
    assert m.cpu.gpr[RSP] == 0xFF00 - 20
    assert m.memory.read(0x1FF00 - 20, 4) == struct.pack("<I", 0x4000_0123)


def test_conforming_handler_runs_at_the_callers_level_on_its_stack() -> None:
    m = machine(32, cpl=3)
    m.gate(UD, selector=CONFORMING0)
    m.deliver(UD)
    assert m.bank.read_segment("cs").selector == CONFORMING0 | 3
    assert m.cpu.gpr[RSP] == USER_STACK - 12


def test_virtual_8086_mode_pushes_and_clears_the_data_segments() -> None:
    m = machine(32, flags=ALWAYS | VM | IF)
    for number, name in enumerate(SEGMENT_NAMES):
        m.bank.write_segment(name, Segment(0x100 + number, 0x1000 + number * 16))
    m.gate(GP)
    m.deliver(GP, 0)
    es, cs, ss, ds, fs, gs = range(0x100, 0x106)
    assert m.frame(10, 4) == [
        0, 0x4000_0123, cs, ALWAYS | VM | IF | RF, USER_STACK, ss, es, ds, fs, gs,
    ]  # fmt: skip
    assert m.bank.read_segment("gs").selector == m.bank.read_segment("ds").selector == 0
    assert not m.cpu.rflags & VM


def test_int_n_in_virtual_8086_mode_needs_iopl_3() -> None:
    m = machine(32, flags=ALWAYS | VM)
    m.gate(0x21, dpl=3)
    m.gate(GP, offset=HANDLER + GP)
    m.deliver(0x21, software=True, next_rip=2)
    assert (m.cpu.rip, m.frame(1, 4)) == (HANDLER + GP, [0])


def test_task_gate_is_refused_by_name() -> None:
    m = machine(32)
    m.gate(DF_, type=5)
    with pytest.raises(EngineError, match="vector 8: the IDT holds a task gate"):
        m.deliver(DF_, 0)


# Long mode


def test_long_mode_always_pushes_ss_rsp_and_aligns() -> None:
    m = machine(64, flags=ALWAYS | IF | TF)
    m.cpu.gpr[RSP] = USER_STACK + 0xB
    m.gate(UD)
    m.deliver(UD)
    assert m.cpu.gpr[RSP] == USER_STACK - 40
    assert m.frame(5, 8) == [
        0x4000_0123, CODE0, ALWAYS | IF | TF | RF, USER_STACK + 0xB, DATA0,
    ]  # fmt: skip
    assert m.cpu.rflags == ALWAYS
    assert m.bank.read_segment("ss").selector == DATA0, "SS stays without a privilege change"


def test_long_mode_privilege_change_uses_rsp0_and_a_null_ss() -> None:
    m = machine(64, cpl=3, flags=ALWAYS | IF)
    m.gate(PF_)
    m.deliver(PF_, 7, address=0x1234)
    assert m.cpu.gpr[RSP] == STACK - 48
    assert m.frame(6, 8) == [
        7, 0x4000_0123, CODE3 | 3, ALWAYS | IF | RF, USER_STACK, DATA3 | 3,
    ]  # fmt: skip
    ss, cs = m.bank.read_segment("ss"), m.bank.read_segment("cs")
    assert (ss.selector, ss.dpl) == (0, 0)
    assert (cs.selector, cs.l, cs.db) == (CODE0, 1, 0)


@pytest.mark.parametrize("cpl", [0, 3])
def test_ist_switches_the_stack_at_any_level(cpl: int) -> None:
    m = machine(64, cpl=cpl)
    m.gate(DF_, ist=1)
    m.deliver(DF_, 0)
    assert m.cpu.gpr[RSP] == STACK - 0x100 - 48
    assert m.bank.read_segment("ss").selector == (0 if cpl else DATA0)


def test_long_mode_offsets_are_64_bit() -> None:
    m = machine(64)
    m.gate(UD, offset=0xFFFF_8000_0000_1234)
    m.deliver(UD)
    assert m.cpu.rip == 0xFFFF_8000_0000_1234


# Failed checks. (field changes, the fault that comes instead, its error code without EXT)


def outcome(m: Machine) -> tuple[int, int]:
    """Which gate was entered (gates below stand at HANDLER + vector) and the error code."""
    size = 8 if m.wide else 4
    return m.cpu.rip - HANDLER, m.frame(1, size)[0]


GATE_CHECKS = [
    ({"type": 12}, GP, UD * 8 + 2 + 1),
    ({"present": 0}, NP, UD * 8 + 2 + 1),
    ({"selector": 0}, GP, 1),
    ({"selector": 3}, GP, 1),
    ({"selector": 0x100}, GP, 0x100 + 1),
    ({"selector": 0x104}, GP, 0x104 + 1),
    ({"selector": DATA0}, GP, DATA0 + 1),
    ({"selector": CODE3}, GP, CODE3 + 1),
    ({"selector": ABSENT}, NP, ABSENT + 1),
]


@pytest.mark.parametrize("mode", [32, 64])
@pytest.mark.parametrize(("fields", "vector", "error"), GATE_CHECKS)
def test_gate_checks(mode: int, fields: dict[str, int], vector: int, error: int) -> None:
    m = machine(mode)
    if mode == 64 and fields == {"selector": ABSENT}:
        m.memory.write(GDT + ABSENT, (0x00AF1A000000FFFF).to_bytes(8, "little"))
    for v in (DF_, TS, NP, SS_, GP):
        m.gate(v, offset=HANDLER + v)
    m.gate(UD, **fields)
    m.deliver(UD)
    assert outcome(m) == (vector, error)
    assert m.frame(2, 8 if m.wide else 4)[1] == 0x4000_0123


@pytest.mark.parametrize("mode", [32, 64])
def test_int_n_needs_the_gates_dpl_and_reports_without_ext(mode: int) -> None:
    m = machine(mode, cpl=3)
    m.gate(GP, offset=HANDLER + GP)
    m.gate(0x30, dpl=2)
    m.deliver(0x30, software=True, next_rip=0x4000_0125)
    assert outcome(m) == (GP, 0x30 * 8 + 2)
    m = machine(mode, cpl=3)
    m.gate(0x30, dpl=3)
    m.deliver(0x30, software=True, next_rip=0x4000_0125)
    assert m.cpu.rip == HANDLER
    m = machine(mode, cpl=3)
    m.gate(0x30, dpl=0)
    m.deliver(0x30)
    assert m.cpu.rip == HANDLER, "the DPL does not matter to hardware interrupts"


@pytest.mark.parametrize("mode", [32, 64])
def test_vector_beyond_the_idt(mode: int) -> None:
    m = machine(mode)
    m.gate(GP, offset=HANDLER + GP)
    m.bank.write_table("idtr", DescriptorTable(IDT, 32 * (16 if m.wide else 8) - 1))
    m.deliver(0x20, software=True, next_rip=0)
    assert outcome(m) == (GP, 0x20 * 8 + 2)


@pytest.mark.parametrize("selector", [CODE0_16, DATA0])
def test_long_mode_wants_a_64_bit_code_segment(selector: int) -> None:
    m = machine(64)
    m.gate(GP, offset=HANDLER + GP)
    m.gate(UD, selector=selector)
    m.deliver(UD)
    assert outcome(m) == (GP, selector + 1)


def test_long_mode_knows_no_16_bit_gates() -> None:
    m = machine(64)
    m.gate(GP, offset=HANDLER + GP)
    m.gate(UD, type=6)
    m.deliver(UD)
    assert outcome(m) == (GP, UD * 8 + 3)


def test_non_canonical_handler_and_stack() -> None:
    m = machine(64)
    m.gate(GP, offset=HANDLER + GP)
    m.gate(UD, offset=1 << 47)
    m.deliver(UD)
    assert outcome(m) == (GP, 1)
    m = machine(64)
    m.gate(SS_, offset=HANDLER + SS_, ist=1)
    m.gate(UD)
    m.cpu.gpr[RSP] = 1 << 60
    m.deliver(UD)
    assert outcome(m) == (SS_, 1)


def test_tss_too_short_for_the_stack_pointer() -> None:
    for mode, limit in ((32, 8), (64, 10)):
        m = machine(mode, cpl=3)
        m.gate(TS, offset=HANDLER + TS, selector=CONFORMING0)
        m.gate(UD)
        m.bank.write_segment("tr", Segment(TSS_SELECTOR, TSS, limit, type=11, s=0))
        m.deliver(UD)
        assert outcome(m) == (TS, TSS_SELECTOR + 1)


INNER_STACKS = [
    (0, TS, 1),
    (0x100, TS, 0x101),
    (DATA0 | 3, TS, DATA0 + 1),
    (DATA1, TS, DATA1 + 1),
    (CODE0, TS, CODE0 + 1),
    (0x58, SS_, 0x59),
]


@pytest.mark.parametrize(("selector", "vector", "error"), INNER_STACKS)
def test_inner_stack_checks(selector: int, vector: int, error: int) -> None:
    m = machine(32, cpl=3)
    m.memory.write(GDT + 0x58, (0x00CF12000000FFFF).to_bytes(8, "little"))
    for v in (TS, SS_):
        m.gate(v, offset=HANDLER + v, selector=CONFORMING0)
    m.gate(UD)
    m.memory.write(TSS + 8, struct.pack("<H", selector))
    m.deliver(UD)
    assert outcome(m) == (vector, error)


def test_no_room_on_the_inner_stack() -> None:
    m = machine(32, cpl=3)
    m.gate(SS_, offset=HANDLER + SS_, selector=CONFORMING0)
    m.gate(UD)
    m.memory.write(GDT + DATA0, (0x0040920000000FFF).to_bytes(8, "little"))
    m.deliver(UD)
    assert outcome(m) == (SS_, DATA0 + 1)


def test_handler_beyond_its_segment_limit() -> None:
    m = machine(32)
    m.memory.write(GDT + CODE0_16, (0x00409A0000000FFF).to_bytes(8, "little"))
    m.gate(GP, offset=HANDLER + GP)
    m.gate(UD, selector=CODE0_16)
    m.deliver(UD)
    assert outcome(m) == (GP, 1)


# Faults while delivering


def test_nothing_changes_when_the_stack_is_not_writable() -> None:
    m = machine(64)
    m.gate(UD)
    m.memory.readonly = range(USER_STACK - 0x100, USER_STACK)
    before = bytes(m.memory.data), m.cpu.rip, m.cpu.gpr[RSP], m.cpu.rflags
    segments = dict(m.bank.segments)
    with pytest.raises(TripleFault):
        m.deliver(UD)
    assert before == (bytes(m.memory.data), m.cpu.rip, m.cpu.gpr[RSP], m.cpu.rflags)
    assert segments == m.bank.segments


COMBINATIONS = [
    (UD, GP, "serial"), (UD, PF_, "serial"), (0x40, GP, "serial"), (17, PF_, "serial"),
    (DE, GP, "double"), (GP, GP, "double"), (TS, NP, "double"), (GP, PF_, "serial"),
    (PF_, GP, "double"), (PF_, PF_, "double"), (DF_, GP, "triple"), (DF_, PF_, "triple"),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second", "result"), COMBINATIONS)
def test_table_6_5(first: int, second: int, result: str) -> None:
    m = machine(64, cpl=3)
    for vector in (GP, PF_, NP, DF_):
        m.gate(vector, offset=HANDLER + vector)
    if second == PF_:  # its stack is not there
        m.memory.write(TSS + 44, struct.pack("<Q", 0x8000))
        m.gate(first, ist=2, offset=HANDLER + first)
    elif second == NP:
        m.gate(first, present=0)
    else:
        m.gate(first, type=3)
    if first == second:
        m.gate(DF_, offset=HANDLER + DF_)
    if result == "triple":
        with pytest.raises(TripleFault):
            m.deliver(first)
        return
    m.deliver(first)
    assert m.cpu.rip - HANDLER == (DF_ if result == "double" else second)
    assert m.frame(2, 8)[1] == 0x4000_0123
    if result == "double":
        assert m.frame(1, 8) == [0]
    if second == PF_:
        assert m.bank.read("cr2") == 0x8000 - 8, "the first push faults"


def test_a_software_interrupt_is_benign_whatever_its_vector() -> None:
    m = machine(64)
    m.gate(GP, type=3)
    m.gate(NP, offset=HANDLER + NP)
    m.gate(DF_, offset=HANDLER + DF_)
    m.gate(14, present=0)
    m.deliver(14, software=True, next_rip=0x4000_0125)
    assert outcome(m) == (NP, 14 * 8 + 2)


def test_an_empty_idt_is_a_triple_fault() -> None:
    m = machine(32)
    m.bank.write_table("idtr", DescriptorTable(0, 0))
    with pytest.raises(TripleFault):
        m.deliver(UD)


def test_can_deliver_looks_at_the_limit() -> None:
    for mode, size in ((16, 4), (32, 8), (64, 16)):
        m = machine(mode)
        m.bank.write_table("idtr", DescriptorTable(IDT, size * 7 - 1))
        assert can_deliver(m.cpu) and can_deliver(m.cpu, 6) and not can_deliver(m.cpu, 7)
        m.bank.write_table("idtr", DescriptorTable(IDT, size * 7 - 2))
        assert not can_deliver(m.cpu)
