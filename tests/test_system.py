"""System instructions by the rules of SDM Vol. 2, each with its faults."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from handlers.system import PACK
from sandbox.cpu import DB, GP, NP, UD, Cpu, Fault
from sandbox.cpuid import CpuidModel
from sandbox.decode import decode
from sandbox.descriptors import serialise_segment
from sandbox.handler import Exit, Resume
from sandbox.native import NativeCpu, State
from sandbox.registers import (
    CF,
    IF,
    OF,
    RAX,
    RBX,
    RCX,
    RDX,
    RF,
    RSP,
    TF,
    ZF,
    DescriptorTable,
    Segment,
)
from sandbox.sources import CountingClock, HostClock, host_entropy, seeded_entropy
from tests.doubles import DictBank, FlatMemory, make_cpu

DATA = 0x10000
FEATURES = "SSE3 XSAVE XSAVEC AVX AVX2 FSGSBASE RDTSCP RDPID".split()


def make(bitness: int = 64, cpl: int = 0, features: list[str] | None = None) -> Cpu:
    cpu = make_cpu(bitness, cpl)
    cpu.services["cpuid"] = CpuidModel(FEATURES if features is None else features).bind(cpu)
    cpu.gpr[RBX] = DATA
    if bitness != 64:
        bank_of(cpu).write("efer", 0)
    return cpu


def bank_of(cpu: Cpu) -> DictBank:
    bank = cpu.registers.bank
    assert isinstance(bank, DictBank)
    return bank


def memory_of(cpu: Cpu) -> FlatMemory:
    assert isinstance(cpu.memory, FlatMemory)
    return cpu.memory


def run(cpu: Cpu, code: str) -> Any:
    insn = decode(bytes.fromhex(code), cpu.bitness)
    asked = [h for h in PACK.handlers if insn.mnemonic in h.mnemonics or insn.form in h.forms]
    for handler in asked:
        action = handler.bind(cpu, insn)
        if action is not None:
            return action()
    raise AssertionError(f"nobody takes {insn.text()}")


def fault(cpu: Cpu, code: str) -> tuple[int, int | None]:
    """The fault of an instruction, which must leave registers and memory alone."""
    bank, memory = bank_of(cpu), memory_of(cpu)

    def everything() -> Any:
        state = dict(bank.values), dict(bank.segments), dict(bank.tables), bytes(memory.data)
        return state, cpu.gpr.tobytes(), cpu.registers.xcr0

    before = everything()
    with pytest.raises(Fault) as caught:
        run(cpu, code)
    assert everything() == before
    return caught.value.vector, caught.value.error_code


PRIVILEGED = {
    "mov cr0,rax": "0f22c0", "mov rax,cr3": "0f20d8", "mov rax,cr8": "440f20c0",
    "mov rax,dr0": "0f21c0", "mov dr7,rax": "0f23f8", "clts": "0f06", "lmsw ax": "0f01f0",
    "lgdt": "0f0113", "lidt": "0f011b", "lldt ax": "0f00d0", "ltr ax": "0f00d8",
    "invlpg": "0f013b", "invd": "0f08", "wbinvd": "0f09", "swapgs": "0f01f8", "rdmsr": "0f32",
    "wrmsr": "0f30", "xsetbv": "0f01d1", "sysretq": "480f07",
}  # fmt: skip


@pytest.mark.parametrize("name", PRIVILEGED)
def test_privileged_instructions_are_gp_at_cpl_3(name: str) -> None:
    cpu = make(cpl=3)
    bank_of(cpu).write("efer", 0x501)
    assert fault(cpu, PRIVILEGED[name]) == (GP, 0)


# CPUID, XCR0


def test_cpuid_zero_extends_and_looks_at_the_low_halves() -> None:
    cpu = make()
    cpu.gpr[RAX], cpu.gpr[RCX] = 0xFFFF_FFFF_0000_0000, 0xFFFF_FFFF_0000_0000
    run(cpu, "0fa2")
    ebx, ecx, edx = cpu.gpr[RBX], cpu.gpr[RCX], cpu.gpr[RDX]
    assert struct.pack("<III", ebx, edx, ecx) == b"GenuineIntel"


@pytest.mark.parametrize("value", [1, 3, 7])
def test_xsetbv_takes_what_cpuid_offers(value: int) -> None:
    cpu = make()
    cpu.gpr[RAX] = value | 0xFFFF_FFFF_0000_0000
    run(cpu, "0f01d1")
    assert cpu.registers.xcr0 == value
    run(cpu, "0f01d0")
    assert (cpu.gpr[RAX], cpu.gpr[RDX]) == (value, 0)


@pytest.mark.parametrize("value", [0, 2, 6, 5, 0xE7, 0x17, 1 << 9 | 7, 1 << 63 | 7])
def test_xsetbv_refuses_what_makes_no_sense_or_is_not_there(value: int) -> None:
    cpu = make()
    cpu.gpr[RAX], cpu.gpr[RDX] = value & 0xFFFFFFFF, value >> 32
    assert fault(cpu, "0f01d1") == (GP, 0)


@pytest.mark.parametrize(("value", "good"), [(0xE7, True), (0x27, False), (0xE3, False)])
def test_the_avx512_components_come_together(value: int, good: bool) -> None:
    cpu = make(features=[*FEATURES, "AVX512F"])
    cpu.gpr[RAX] = value
    if good:
        run(cpu, "0f01d1")
        assert cpu.registers.xcr0 == value
    else:
        assert fault(cpu, "0f01d1") == (GP, 0)


@pytest.mark.parametrize("code", ["0f01d0", "0f01d1"])
def test_xcr0_needs_osxsave_and_a_known_index(code: str) -> None:
    cpu = make()
    cpu.gpr[RAX], cpu.gpr[RCX] = 1, 2
    assert fault(cpu, code) == (GP, 0)
    bank_of(cpu).write("cr4", 0)
    assert fault(cpu, code) == (UD, None)


def test_xgetbv_1_tells_what_is_in_use() -> None:
    cpu = make()
    cpu.registers.xcr0 = 7
    cpu.gpr[RCX] = 1
    run(cpu, "0f01d0")
    assert cpu.gpr[RAX] == 0
    cpu.vec.write(3, bytes(16) + b"\1")
    run(cpu, "0f01d0")
    assert cpu.gpr[RAX] == 4


@pytest.mark.skipif(NativeCpu.available() is not None, reason="no native oracle")
@pytest.mark.parametrize("used", range(8))
def test_xgetbv_1_is_what_the_host_says(used: int) -> None:
    host = NativeCpu.shared()
    state = State(fpcw=0x27F if used & 1 else 0x37F)
    state.set_vector(0, bytes([used & 2]) + bytes(15) + bytes([used & 4]))
    state.gpr[RCX] = 1
    result = host.run(bytes.fromhex("0f01d0"), state)
    cpu = make()
    cpu.registers.xcr0 = host.xcr0
    bank_of(cpu).write("fpcw", state.fpcw)
    cpu.vec.raw[:] = state.vectors
    cpu.gpr[RCX] = 1
    run(cpu, "0f01d0")
    optional = 2 | 1 << 9  # SSE may count as used when it is not; PKRU is the process's own
    assert (cpu.gpr[RAX] ^ result.state.gpr[RAX]) & ~optional == 0
    assert cpu.gpr[RAX] & 2 == used & 2


# Time and chance


def test_rdtsc_goes_on_and_follows_the_msr() -> None:
    cpu = make(cpl=0)
    cpu.services["clock"] = CountingClock(10)
    run(cpu, "0f31")
    assert (cpu.gpr[RAX], cpu.gpr[RDX]) == (10, 0)
    cpu.gpr[RCX], cpu.gpr[RAX], cpu.gpr[RDX] = 0x10, 5, 7
    run(cpu, "0f30")
    run(cpu, "0f31")
    assert (cpu.gpr[RAX], cpu.gpr[RDX]) == (15, 7)


def test_rdtscp_and_rdpid_give_tsc_aux() -> None:
    cpu = make()
    cpu.services["clock"] = CountingClock(1)
    cpu.gpr[RCX], cpu.gpr[RAX], cpu.gpr[RDX] = 0xC000_0103, 42, 0
    run(cpu, "0f30")
    run(cpu, "0f01f9")
    assert (cpu.gpr[RCX], cpu.gpr[RAX]) == (42, 1)
    cpu.gpr[RBX] = 0xFFFF_FFFF_FFFF_FFFF
    run(cpu, "f30fc7fb")
    assert cpu.gpr[RBX] == 42


def test_tsd_forbids_rdtsc_to_users_only() -> None:
    for cpl in (0, 3):
        cpu = make(cpl=cpl)
        bank_of(cpu).write("cr4", 4)
        if cpl:
            assert fault(cpu, "0f31") == (GP, 0) == fault(cpu, "0f01f9")
        else:
            run(cpu, "0f31")


def test_the_host_clock_never_goes_back() -> None:
    clock = HostClock()
    seen = [clock.tsc() for _ in range(100)]
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("code", "size"), [("660fc7f3", 2), ("0fc7f3", 4), ("480fc7f3", 8), ("480fc7fb", 8)]
)
def test_rdrand_and_rdseed_set_cf_alone_and_are_reproducible(code: str, size: int) -> None:
    results = []
    for _ in range(2):
        cpu = make()
        cpu.services["entropy"] = seeded_entropy(1)
        cpu.rflags |= OF | ZF
        cpu.gpr[RBX] = 0xFFFF_FFFF_FFFF_FFFF
        run(cpu, code)
        assert cpu.rflags & 0x8D5 == CF
        results.append(cpu.gpr[RBX])
    assert results[0] == results[1]
    if size == 2:
        assert results[0] >> 16 == 0xFFFF_FFFF_FFFF
    if size == 4:
        assert results[0] >> 32 == 0


def test_rdrand_without_entropy_gives_zero_and_clears_cf() -> None:
    cpu = make()
    cpu.services["entropy"] = lambda _size: b""
    cpu.rflags |= CF
    run(cpu, "480fc7f3")
    assert (cpu.gpr[RBX], cpu.rflags & CF) == (0, 0)
    assert len(host_entropy(8)) == 8


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


# MSRs and what hangs on them


def wrmsr(cpu: Cpu, index: int, value: int) -> Any:
    cpu.gpr[RCX], cpu.gpr[RAX], cpu.gpr[RDX] = index, value & 0xFFFFFFFF, value >> 32
    return run(cpu, "0f30")


def rdmsr(cpu: Cpu, index: int) -> int:
    cpu.gpr[RCX] = index
    assert run(cpu, "0f32") is None
    return cpu.gpr[RAX] | cpu.gpr[RDX] << 32


@pytest.mark.parametrize(
    ("index", "value"),
    [(0xC0000100, 0xFFFF_8000_0000_0000), (0xC0000102, 0x1234_5678_9ABC), (0x176, 1 << 46),
     (0xC0000081, 0x0023_0010_0000_0000), (0x277, 0x0105_0600_0406_0001), (0xC0000103, 7)],
)  # fmt: skip
def test_msrs_keep_what_is_written(index: int, value: int) -> None:
    cpu = make()
    wrmsr(cpu, index, value)
    assert rdmsr(cpu, index) == value


@pytest.mark.parametrize(
    ("index", "value"),
    [(0xC0000100, 1 << 47), (0xC0000082, 1 << 63), (0x277, 2), (0xC0000103, 1 << 32),
     (0xC0000080, 1 << 4), (0xC0000080, 0), (0x12345, 0)],
)  # fmt: skip
def test_bad_msr_writes_are_gp(index: int, value: int) -> None:
    cpu = make()
    bank_of(cpu).write("efer", 0x500)
    cpu.gpr[RCX], cpu.gpr[RAX], cpu.gpr[RDX] = index, value & 0xFFFFFFFF, value >> 32
    assert fault(cpu, "0f30") == (GP, 0)


def test_lma_is_not_the_guests_to_write() -> None:
    cpu = make()
    bank_of(cpu).write("efer", 0x500)
    wrmsr(cpu, 0xC0000080, 0x901)
    assert rdmsr(cpu, 0xC0000080) == 0xD01


def test_unknown_msrs_go_to_the_hook() -> None:
    cpu = make()
    calls = []

    def hook(index: int, value: int | None) -> Any:
        calls.append((index, value))
        return {0x99: 0x1_0000_0002, 0x9A: Exit("to the caller")}.get(index)

    cpu.services["msr"] = hook
    assert rdmsr(cpu, 0x99) == 0x1_0000_0002
    assert wrmsr(cpu, 0x9A, 5) == Exit("to the caller")
    assert calls == [(0x99, None), (0x9A, 5)]
    cpu.gpr[RCX] = 0x9B
    assert fault(cpu, "0f32") == (GP, 0)


def test_swapgs_swaps() -> None:
    cpu = make()
    bank_of(cpu).write("gs_base", 1)
    bank_of(cpu).write("kernel_gs_base", 2)
    run(cpu, "0f01f8")
    assert [bank_of(cpu).read(n) for n in ("gs_base", "kernel_gs_base")] == [2, 1]


def test_fs_and_gs_base_instructions() -> None:
    cpu = make(cpl=3)
    assert fault(cpu, "f3480faec3") == (UD, None), "CR4.FSGSBASE is clear"
    bank_of(cpu).write("cr4", 1 << 16)
    cpu.gpr[RBX] = 0xFFFF_8000_0000_1234
    run(cpu, "f3480faed3")  # wrfsbase rbx
    run(cpu, "f3480faec0")  # rdfsbase rax
    assert cpu.gpr[RAX] == 0xFFFF_8000_0000_1234
    run(cpu, "f30faedb")  # wrgsbase ebx
    assert bank_of(cpu).read("gs_base") == 0x1234
    cpu.gpr[RBX] = 1 << 60
    assert fault(cpu, "f3480faed3") == (GP, 0)
    run(cpu, "f30faedb")


def syscall_machine(cpl: int) -> Cpu:
    cpu = make(cpl=cpl)
    bank = bank_of(cpu)
    for name, value in (
        ("efer", 0x501), ("star", 0x0023_0010 << 32), ("lstar", 0xFFFF_8000_0000_0000),
        ("fmask", TF | IF | ZF),
    ):  # fmt: skip
        bank.write(name, value)
    cpu.rflags = 2 | IF | ZF | CF | RF
    return cpu


def test_syscall() -> None:
    cpu = syscall_machine(3)
    assert run(cpu, "0f05") == Resume(0xFFFF_8000_0000_0000)
    assert (cpu.gpr[RCX], cpu.gpr[11]) == (0x10002, 2 | IF | ZF | CF)
    assert cpu.rflags == 2 | CF
    bank = bank_of(cpu)
    cs, ss = bank.read_segment("cs"), bank.read_segment("ss")
    assert (cs.selector, cs.l, cs.db, cs.dpl, cs.type) == (0x10, 1, 0, 0, 11)
    assert (ss.selector, ss.dpl, ss.type) == (0x18, 0, 3)


SYSRETS = [
    ("480f07", 0x7FFF_0000_1000, 0x7FFF_0000_1000, 0x33, 1),
    ("0f07", 0xFFFF_FFFF_0000_1000, 0x1000, 0x23, 0),
]


@pytest.mark.parametrize(("code", "rcx", "target", "selector", "wide"), SYSRETS)
def test_sysret_to_64_and_32_bit_code(
    code: str, rcx: int, target: int, selector: int, wide: int
) -> None:
    cpu = syscall_machine(0)
    cpu.gpr[RCX], cpu.gpr[11] = rcx, 0xFFFF_FFFF
    assert run(cpu, code) == Resume(target)
    cs, ss = (bank_of(cpu).read_segment(n) for n in ("cs", "ss"))
    assert (cs.selector, cs.l, cs.db, cs.dpl) == (selector, wide, 1 - wide, 3)
    assert (ss.selector, ss.dpl) == (0x2B, 3)
    assert cpu.rflags == 0x3C7FD7


def test_syscall_and_sysret_faults() -> None:
    cpu = syscall_machine(0)
    cpu.gpr[RCX] = 1 << 47
    assert fault(cpu, "480f07") == (GP, 0)
    bank_of(cpu).write("efer", 0x500)
    assert fault(cpu, "480f07") == fault(cpu, "0f05") == (UD, None)
    assert fault(make(32), "0f05") == (UD, None)


def sysenter_machine(bitness: int, cpl: int) -> Cpu:
    cpu = make(bitness, cpl)
    for name, value in (("sysenter_cs", 0x10), ("sysenter_esp", 0xFFFF_8000_0000_2000),
                        ("sysenter_eip", 0xFFFF_8000_0000_3000)):  # fmt: skip
        bank_of(cpu).write(name, value)
    cpu.rflags = 2 | IF | CF
    return cpu


@pytest.mark.parametrize(("bitness", "mask"), [(64, (1 << 64) - 1), (32, 0xFFFFFFFF)])
def test_sysenter_and_sysexit(bitness: int, mask: int) -> None:
    cpu = sysenter_machine(bitness, 3)
    assert run(cpu, "0f34") == Resume(0xFFFF_8000_0000_3000 & mask)
    assert cpu.gpr[RSP] == 0xFFFF_8000_0000_2000 & mask
    assert cpu.rflags == 2 | CF
    cs, ss = (bank_of(cpu).read_segment(n) for n in ("cs", "ss"))
    assert (cs.selector, cs.l, cs.dpl, ss.selector) == (0x10, int(bitness == 64), 0, 0x18)
    bank_of(cpu).cpl = 0
    cpu.gpr[RDX], cpu.gpr[RCX] = 0x5000, 0x6000
    assert run(cpu, "0f35") == Resume(0x5000)
    cs, ss = (bank_of(cpu).read_segment(n) for n in ("cs", "ss"))
    assert (cs.selector, cs.l, cs.dpl, ss.selector) == (0x23, 0, 3, 0x2B)
    assert cpu.gpr[RSP] == 0x6000
    if bitness == 64:
        assert run(cpu, "480f35") == Resume(0x5000)
        assert bank_of(cpu).read_segment("cs").selector == 0x33
        assert bank_of(cpu).read_segment("ss").selector == 0x3B


def test_sysenter_needs_its_selector() -> None:
    cpu = sysenter_machine(64, 3)
    bank_of(cpu).write("sysenter_cs", 3)
    assert fault(cpu, "0f34") == (GP, 0)
    assert fault(sysenter_machine(64, 3), "0f35") == (GP, 0)
