"""MSRs, SWAPGS, FS and GS base, and the fast system calls by the rules of SDM Vol. 2."""

from __future__ import annotations

from typing import Any

import pytest

from sandbox.cpu import GP, UD, Cpu
from sandbox.handler import Exit, Resume
from sandbox.registers import (
    CF,
    IF,
    RAX,
    RBX,
    RCX,
    RDX,
    RF,
    RSP,
    TF,
    ZF,
)
from tests.system_cpu import bank_of, fault, make, run

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


def test_there_are_no_supervisor_state_components() -> None:
    cpu = make()
    cpu.gpr[RCX], cpu.gpr[RAX], cpu.gpr[RDX] = 0xDA0, 0, 0
    run(cpu, "0f30")
    cpu.gpr[RAX] = 1 << 8
    assert fault(cpu, "0f30") == (GP, 0)
    run(cpu, "0f32")
    assert (cpu.gpr[RAX], cpu.gpr[RDX]) == (0, 0)


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
