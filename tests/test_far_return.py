"""RETF and IRET by the rules of SDM Vol. 2 and Vol. 3, chapters 5 and 6."""

from __future__ import annotations

import struct

import pytest

from sandbox.cpu import GP, NP, SS_
from sandbox.handler import Resume
from sandbox.registers import AC, CF, IF, IOPL, NT, RSP, TF, VM, ZF, Segment
from tests.far_machine import fault, make, push, run, selector_of
from tests.machine import (
    ABSENT,
    ALWAYS,
    CODE0,
    CODE3,
    CONFORMING0,
    DATA0,
    DATA3,
    GDT,
    HANDLER,
    USER_STACK,
)

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
