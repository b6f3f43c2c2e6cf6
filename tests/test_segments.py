"""Loading segments and looking at descriptors, by the rules of SDM Vol. 2 and Vol. 3, chapter 5."""

from __future__ import annotations

import struct

import pytest

from sandbox.cpu import GP, NP, SS_, UD
from sandbox.descriptors import Gate, serialise_gate
from sandbox.registers import RAX, RBX, RSP, ZF, Segment
from tests.far_machine import GATE, POINTER, fault, make, push, run, selector_of
from tests.machine import (
    CODE0,
    CODE3,
    CONFORMING0,
    DATA0,
    DATA3,
    GDT,
    HANDLER,
    TSS_SELECTOR,
    USER_STACK,
)

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
