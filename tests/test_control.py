"""Control, debug and descriptor table registers by the rules of SDM Vol. 2 and Vol. 3."""

from __future__ import annotations

import struct

import pytest

from sandbox.cpu import DB, GP, NP, UD, Cpu, Fault
from sandbox.descriptors import serialise_segment
from sandbox.registers import (
    RAX,
    RBX,
    RCX,
    RDX,
    DescriptorTable,
    Segment,
)
from tests.system_cpu import DATA, bank_of, fault, make, run

# Control and debug registers


def test_control_registers_read_and_write() -> None:
    cpu = make()
    cpu.gpr[RAX] = 0x1234_5678_9ABC_D000 & (1 << 40) - 1
    run(cpu, "0f22d8")
    assert bank_of(cpu).read("cr3") == cpu.gpr[RAX]
    run(cpu, "0f20da")
    assert cpu.gpr[RDX] == cpu.gpr[RAX]
    cpu.gpr[RAX] = 15
    run(cpu, "440f22c0")
    assert bank_of(cpu).read("cr8") == 15


PE, NW, CD, PG = 1, 1 << 29, 1 << 30, 1 << 31
BAD_CR0 = {"PG without PE": PG, "NW without CD": PE | PG | NW, "bits 63:32": PE | PG | 1 << 32}


@pytest.mark.parametrize("why", BAD_CR0)
def test_bad_cr0_values(why: str) -> None:
    cpu = make()
    cpu.gpr[RAX] = BAD_CR0[why]
    assert fault(cpu, "0f22c0") == (GP, 0)


def test_paging_cannot_be_turned_off_in_64_bit_mode() -> None:
    cpu = make()
    cpu.gpr[RAX] = PE
    assert fault(cpu, "0f22c0") == (GP, 0)


def test_cr0_et_is_always_set_and_unknown_bits_are_dropped() -> None:
    cpu = make()
    cpu.gpr[RAX] = PE | PG | 1 << 10
    run(cpu, "0f22c0")
    assert bank_of(cpu).read("cr0") == PE | PG | 1 << 4


def entering_long_mode(cr4: int, tr_type: int = 11, cs_l: int = 0) -> Cpu:
    cpu = make(32)
    bank = bank_of(cpu)
    for name, value in (("cr0", PE | 0x10), ("cr4", cr4), ("efer", 1 << 8)):
        bank.write(name, value)
    bank.write_segment("tr", Segment(0x28, type=tr_type, s=0))
    bank.write_segment("cs", Segment(8, type=11, l=cs_l, db=1))
    cpu.gpr[RAX] = PE | PG | 0x10
    return cpu


def test_turning_paging_on_with_lme_enters_long_mode_and_off_leaves_it() -> None:
    cpu = entering_long_mode(1 << 5)
    run(cpu, "0f22c0")
    assert bank_of(cpu).read("efer") == 1 << 8 | 1 << 10
    cpu.gpr[RAX] = PE
    run(cpu, "0f22c0")
    assert bank_of(cpu).read("efer") == 1 << 8


def test_long_mode_needs_pae_a_32_bit_cs_and_no_16_bit_tss() -> None:
    assert fault(entering_long_mode(0), "0f22c0") == (GP, 0)
    assert fault(entering_long_mode(1 << 5, tr_type=3), "0f22c0") == (GP, 0)
    assert fault(entering_long_mode(1 << 5, cs_l=1), "0f22c0") == (GP, 0)


BAD_CR4 = [0, 1 << 5 | 1 << 20, 1 << 5 | 1 << 12, 1 << 5 | 1 << 32]


@pytest.mark.parametrize("value", BAD_CR4)
def test_cr4_allows_what_cpuid_shows_and_keeps_pae(value: int) -> None:
    cpu = make()
    cpu.gpr[RAX] = value
    assert fault(cpu, "0f22e0") == (GP, 0)


def test_cr4_osxsave_shows_in_cpuid() -> None:
    cpu = make()
    cpu.gpr[RAX] = 1 << 5 | 1 << 18 | 1 << 16
    run(cpu, "0f22e0")
    assert bank_of(cpu).read("cr4") == cpu.gpr[RAX]
    cpu.gpr[RAX] = 1
    run(cpu, "0fa2")
    assert cpu.gpr[RCX] >> 27 & 1


def test_cr3_beyond_the_physical_address_size_is_gp() -> None:
    cpu = make()
    cpu.gpr[RAX] = 1 << 40
    assert fault(cpu, "0f22d8") == (GP, 0)


def test_clts_lmsw_smsw() -> None:
    cpu = make()
    bank = bank_of(cpu)
    bank.write("cr0", PE | PG | 0x18)
    run(cpu, "0f06")
    assert bank.read("cr0") == PE | PG | 0x10
    cpu.gpr[RAX] = 0xFFFE
    run(cpu, "0f01f0")
    assert bank.read("cr0") == PE | PG | 0x1F, "LMSW cannot clear PE"
    cpu.gpr[RAX] = 0xFFFF_FFFF_FFFF_FFFF
    run(cpu, "660f01e0")
    assert cpu.gpr[RAX] == 0xFFFF_FFFF_FFFF_001F
    run(cpu, "480f01e0")
    assert cpu.gpr[RAX] == PE | PG | 0x1F
    cpu.write(DATA, b"\xee" * 4)
    run(cpu, "0f0123")
    assert cpu.read(DATA, 4) == b"\x1f\0\xee\xee"


def test_debug_registers_have_fixed_bits_and_aliases() -> None:
    cpu = make()
    cpu.gpr[RAX] = 0
    run(cpu, "0f23f0")
    run(cpu, "0f21f2")
    assert cpu.gpr[RDX] == 0xFFFF0FF0
    run(cpu, "0f23e8")
    run(cpu, "0f21fa")
    assert cpu.gpr[RDX] == 0x400, "DR5 is DR7"
    bank_of(cpu).write("cr4", 8)
    assert fault(cpu, "0f21e0") == (UD, None)
    cpu.gpr[RAX] = 1 << 32
    assert fault(cpu, "0f23f8") == (GP, 0)


def test_general_detect_is_db() -> None:
    cpu = make()
    bank_of(cpu).write("dr7", 1 << 13 | 0x400)
    with pytest.raises(Fault) as caught:
        run(cpu, "0f21c0")
    assert caught.value.vector == DB
    assert bank_of(cpu).read("dr6") >> 13 & 1 and not bank_of(cpu).read("dr7") >> 13 & 1


# Descriptor tables


def test_lgdt_and_sgdt_in_long_mode() -> None:
    cpu = make()
    cpu.write(DATA, struct.pack("<HQ", 0x1234, 0xFFFF_8000_0000_1000))
    run(cpu, "0f0113")
    assert bank_of(cpu).read_table("gdtr") == DescriptorTable(0xFFFF_8000_0000_1000, 0x1234)
    cpu.gpr[RBX] = DATA + 0x100
    run(cpu, "0f0103")
    assert cpu.read(DATA + 0x100, 10) == cpu.read(DATA, 10)
    cpu.write(DATA + 0x100, struct.pack("<HQ", 1, 1 << 60))
    assert fault(cpu, "0f011b") == (GP, 0)


def test_lidt_with_16_bit_operands_takes_24_bits_of_base() -> None:
    cpu = make(32)
    cpu.write(DATA, struct.pack("<HI", 0xFF, 0x12345678))
    run(cpu, "660f011b")
    assert bank_of(cpu).read_table("idtr") == DescriptorTable(0x345678, 0xFF)
    run(cpu, "0f011b")
    assert bank_of(cpu).read_table("idtr") == DescriptorTable(0x12345678, 0xFF)
    run(cpu, "660f010b")
    assert cpu.read(DATA, 6) == struct.pack("<HI", 0xFF, 0x345678)


def test_umip_hides_the_tables_from_users() -> None:
    cpu = make(cpl=3)
    run(cpu, "0f0103")
    bank_of(cpu).write("cr4", 1 << 11)
    for code in ("0f0103", "0f010b", "0f00c0", "0f00c8", "0f01e0"):
        assert fault(cpu, code) == (GP, 0)


GDT = DATA + 0x800
TSS = Segment(base=0xFFFF_8000_0000_2000, limit=0x67, type=9, s=0)


def with_system_descriptor(segment: Segment, selector: int = 0x28) -> Cpu:
    cpu = make()
    bank_of(cpu).write_table("gdtr", DescriptorTable(GDT, 0x3F))
    cpu.write(GDT + selector, serialise_segment(segment, wide=True))
    cpu.gpr[RAX] = selector
    return cpu


def test_ltr_loads_a_64_bit_tss_and_marks_it_busy() -> None:
    cpu = with_system_descriptor(TSS)
    run(cpu, "0f00d8")
    tr = bank_of(cpu).read_segment("tr")
    assert (tr.selector, tr.base, tr.limit, tr.type) == (0x28, TSS.base, 0x67, 11)
    assert cpu.read(GDT + 0x28 + 5, 1) == b"\x8b"
    assert fault(cpu, "0f00d8") == (GP, 0x28), "a busy TSS cannot be loaded"
    run(cpu, "0f00ca")
    assert cpu.gpr[RDX] == 0x28


def test_lldt_takes_null_and_ldts_only() -> None:
    cpu = with_system_descriptor(Segment(base=0x5000, limit=0xFF, type=2, s=0))
    run(cpu, "0f00d0")
    assert bank_of(cpu).read_segment("ldtr").base == 0x5000
    cpu.gpr[RAX] = 3
    run(cpu, "0f00d0")
    ldt = bank_of(cpu).read_segment("ldtr")
    assert (ldt.selector, ldt.present) == (3, 0)


BAD_TASKS = [
    (TSS, 0x2C, GP, 0x2C), (TSS, 0, GP, 0), (TSS, 0x38, GP, 0x38),
    (Segment(type=9, s=0, present=0), 0x28, NP, 0x28), (Segment(type=2, s=0), 0x28, GP, 0x28),
    (Segment(type=1, s=0), 0x28, GP, 0x28), (Segment(type=9, s=1), 0x28, GP, 0x28),
]  # fmt: skip


@pytest.mark.parametrize(("segment", "selector", "vector", "error"), BAD_TASKS)
def test_ltr_checks(segment: Segment, selector: int, vector: int, error: int) -> None:
    cpu = with_system_descriptor(segment)
    cpu.gpr[RAX] = selector
    assert fault(cpu, "0f00d8") == (vector, error)


def test_real_mode_has_no_task_register() -> None:
    cpu = make(16)
    bank_of(cpu).write("cr0", 0x10)
    for code in ("0f00d8", "0f00d0", "0f00c8", "0f00c0"):
        assert fault(cpu, code) == (UD, None)
