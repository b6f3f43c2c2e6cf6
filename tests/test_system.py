"""CPUID, XCR0, clocks and random numbers by the rules of SDM Vol. 2, each with its faults."""

from __future__ import annotations

import struct

import pytest

from sandbox.cpu import GP, UD
from sandbox.native import NativeCpu, State
from sandbox.registers import (
    CF,
    OF,
    RAX,
    RBX,
    RCX,
    RDX,
    ZF,
)
from sandbox.sources import CountingClock, HostClock, host_entropy, seeded_entropy
from tests.system_cpu import FEATURES, bank_of, fault, make, run

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


def test_performance_counters_do_not_exist() -> None:
    assert fault(make(), "0f33") == (GP, 0)


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
