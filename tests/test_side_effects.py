"""What Unicorn leaves out of floats and alignment: trapped when asked for, told when looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import pytest

from guests.assemble import assemble
from sandbox import abi
from sandbox.boot import Machine, boot_flat
from sandbox.decode import FORM_NAMES
from sandbox.encodings import forms_of
from sandbox.exits import GuestException, Hlt
from sandbox.policy import Policy
from sandbox.side_effects import aligned_forms, sse_float_forms, x87_float_forms
from sandbox.vm import Vm

BASE = 0x1000
DATA = 0x10000
SUBNORMAL, ONE, THREE = 0x00400000, 0x3F800000, 0x40400000

ADD = "movss xmm0, [rdi]; addss xmm0, [rdi]; movss [rdi+8], xmm0;"
DIVIDE = "movss xmm1, [rdi]; divss xmm1, [rdi+4];"


def set_mxcsr(value: int) -> str:
    return f"mov dword ptr [rdi+16], {value:#x}; ldmxcsr [rdi+16];"


@contextmanager
def booted(
    text: str, a: int = ONE, b: int = THREE, exactness: Literal["lazy", "exact"] = "lazy"
) -> Iterator[Machine]:
    policy = Policy.load("baseline").with_exactness(exactness, exactness)
    with Vm(policy, ("integer", "avx2", "x87")) as vm:
        vm.enable_cap(abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE)
        source = f"mov rdi, {DATA:#x}; {text} hlt"
        machine = boot_flat(vm, assemble(source.replace(";", "\n"), BASE, 64), BASE)
        vm.memory.load(DATA, a.to_bytes(4, "little") + b.to_bytes(4, "little"))
        yield machine


def counts(machine: Machine) -> dict[str, int]:
    return machine.vcpu.stats.by_mnemonic


def u32(machine: Machine, offset: int) -> int:
    return int.from_bytes(machine.vm.memory.read(DATA + offset, 4), "little")


def test_floats_run_on_the_fast_path_while_mxcsr_is_plain() -> None:
    with booted(ADD * 3) as machine:
        assert isinstance(machine.vcpu.run(2), Hlt)
        assert "addss" not in counts(machine)
        assert u32(machine, 8) == 0x40000000


def test_flush_to_zero_is_done_by_handlers() -> None:
    with booted(set_mxcsr(0x9F80) + "mulss xmm0, xmm0;" + ADD, SUBNORMAL // 4) as machine:
        assert isinstance(machine.vcpu.run(2), Hlt)
        assert counts(machine)["addss"] == 1
        assert u32(machine, 8) == 0


def test_the_forms_are_free_again_when_the_guest_sets_it_back() -> None:
    text = ADD + set_mxcsr(0x9F80) + ADD + set_mxcsr(0x1F80) + ADD + "jmp x; x:; " + ADD
    with booted(text, SUBNORMAL) as machine:
        assert isinstance(machine.vcpu.run(2), Hlt)
        assert counts(machine)["addss"] == 1
        assert u32(machine, 8) == 2 * SUBNORMAL


def test_code_that_was_translated_before_is_trapped_too() -> None:
    loop = f"mov ecx, 4; again:; {ADD} cmp ecx, 3; jne over; {set_mxcsr(0x9F80)} over:; loop again;"
    with booted(loop, SUBNORMAL // 4) as machine:
        assert isinstance(machine.vcpu.run(2), Hlt)
        assert counts(machine)["addss"] == 2
        assert u32(machine, 8) == 0


def test_an_unmasked_exception_is_raised() -> None:
    with booted(set_mxcsr(0x1F80 & ~0x200) + DIVIDE, ONE, 0) as machine:
        left = machine.vcpu.run(2)
        assert isinstance(left, GuestException)
        assert left.exception == 19
        assert machine.vcpu.registers.mxcsr & 0x3F == 4  # ZE
        assert machine.vcpu.registers.vec.read(1, 4) == ONE.to_bytes(4, "little")


def test_reading_untracked_flags_is_told_once_with_the_place() -> None:
    with booted(DIVIDE + "stmxcsr [rdi+16]; stmxcsr [rdi+20]; fxsave [rdi+64];") as machine:
        assert isinstance(machine.vcpu.run(2), Hlt)
        (notice,) = machine.vcpu.stats.notices
        assert "MXCSR" in notice.text and 'float_flags = "exact"' in notice.text
        code = machine.vm.memory.read(notice.rip, 4)
        assert code == bytes.fromhex("0fae5f10")  # the first stmxcsr


X87_DIVIDE = "fld dword ptr [rdi]; fdiv dword ptr [rdi+4]; fstp dword ptr [rdi+8];"
COMPARE = "fld dword ptr [rdi]; fcomp dword ptr [rdi+4];"
X87_READS = {
    "fnstsw ax; and eax, 0x3d;": "dfe0",
    "fnstsw ax; mov [rdi+16], ax;": "dfe0",
    "fnstsw ax; test ah, 2;": "dfe0",  # C1
    "fnstsw [rdi+16];": "dd7f10",
    "fnstenv [rdi+16];": "d97710",
    "fnsave [rdi+16];": "dd7710",
    "fxsave [rdi+64];": "0fae4740",
    "xor edx, edx; mov eax, 1; xsave [rdi+64];": "0fae6740",
}


@pytest.mark.parametrize("text", X87_READS)
def test_reading_untracked_x87_flags_is_told_once_with_the_place(text: str) -> None:
    raw = bytes.fromhex(X87_READS[text])
    with booted(
        f"mov rax, cr4; or eax, 0x40000; mov cr4, rax; {X87_DIVIDE} {text} {text}"
    ) as found:
        assert isinstance(found.vcpu.run(2), Hlt)
        (notice,) = found.vcpu.stats.notices
        assert "x87" in notice.text and 'float_flags = "exact"' in notice.text
        assert found.vm.memory.read(notice.rip, len(raw)) == raw
        code = found.vm.memory.read(BASE, notice.rip - BASE)
        assert raw not in code, "the first of them"


CONDITIONS = (
    "fnstsw ax; sahf;",
    "fnstsw ax; test ah, 0x45;",
    "fnstsw ax; and ah, 0x44;",
    "fnstsw ax; test eax, 0x4100;",
    "fnstsw ax; fstp st(0); test ax, 0x4500;",
    "fld1; fxam; fnstsw ax; test ah, 2;",
)


@pytest.mark.parametrize("text", CONDITIONS)
def test_reading_x87_conditions_is_neither_trapped_nor_told(text: str) -> None:
    with booted(X87_DIVIDE + COMPARE + text) as machine:
        assert isinstance(machine.vcpu.run(2), Hlt)
        assert machine.vcpu.stats.notices == []
        assert "fnstsw" not in counts(machine)


def test_conditions_near_code_that_reads_flags_are_not_told() -> None:
    """Both are on one page, so that both are trapped; only the one that is run counts."""
    text = f"{X87_DIVIDE} {COMPARE} fnstsw ax; sahf; ja over; fnstsw ax; and eax, 0x3d; over: nop;"
    with booted(text.replace("0x3d", "1"), THREE, ONE) as machine:
        assert isinstance(machine.vcpu.run(2), Hlt)
        assert machine.vcpu.stats.notices == []


@pytest.mark.parametrize("text", ["fnstsw [rdi+16];", "fld1; fnstsw [rdi+16];", X87_DIVIDE])
def test_nothing_is_told_of_x87_where_nothing_is_missing(text: str) -> None:
    with booted(text) as machine:
        assert isinstance(machine.vcpu.run(2), Hlt)
        assert machine.vcpu.stats.notices == []


def test_exact_x87_has_the_flags_and_tells_nothing() -> None:
    with booted(X87_DIVIDE + "fnstsw [rdi+16];", exactness="exact") as machine:
        assert isinstance(machine.vcpu.run(2), Hlt)
        assert u32(machine, 16) & 0xFFFF == 0x220  # PE, and C1: rounded up
        assert machine.vcpu.stats.notices == []


def test_readers_of_x87_flags_are_free_once_it_was_told() -> None:
    loop = "mov ecx, 5; again:; fnstsw ax; and eax, 0x3d; loop again;"
    with booted(X87_DIVIDE + loop) as machine:
        assert isinstance(machine.vcpu.run(2), Hlt)
        assert len(machine.vcpu.stats.notices) == 1
        assert counts(machine)["fnstsw"] == 1


@pytest.mark.parametrize("text", ["stmxcsr [rdi+16];", DIVIDE, "fxsave [rdi+64];"])
def test_nothing_is_told_where_nothing_is_missing(text: str) -> None:
    with booted(text) as machine:
        assert isinstance(machine.vcpu.run(2), Hlt)
        assert machine.vcpu.stats.notices == []


def test_exact_has_the_flags_and_tells_nothing() -> None:
    with booted(DIVIDE + "stmxcsr [rdi+16];", exactness="exact") as machine:
        assert isinstance(machine.vcpu.run(2), Hlt)
        assert u32(machine, 16) == 0x1FA0  # PE
        assert machine.vcpu.stats.notices == []
        assert counts(machine)["divss"] == 1


@pytest.mark.parametrize("text", ["movaps xmm0, [rdi+4];", "paddd xmm1, [rdi+4];"])
def test_exact_alignment_faults_where_lazy_does_not(text: str) -> None:
    with booted(text) as machine:
        assert isinstance(machine.vcpu.run(2), Hlt)
    with booted(text, exactness="exact") as machine:
        left = machine.vcpu.run(2)
        assert isinstance(left, GuestException) and left.exception == 13
    with booted("movaps xmm0, xmm1; movups xmm0, [rdi+4];", exactness="exact") as machine:
        assert isinstance(machine.vcpu.run(2), Hlt)
        assert counts(machine).keys() <= {"hlt"}


def test_unmasked_x87_exceptions_are_raised() -> None:
    text = "mov word ptr [rdi+16], 0x37b; fldcw [rdi+16]; fld1; fldz; fdivp st(1), st; wait;"
    with booted(text) as machine:
        left = machine.vcpu.run(2)
        assert isinstance(left, GuestException) and left.exception == 16


def test_the_tables_hold_what_they_should() -> None:
    names = [{FORM_NAMES[c] for c in table()} for table in (sse_float_forms, x87_float_forms)]
    sse, x87 = names
    assert {"ADDPS_XMM_XMMM128", "CMPSD_XMM_XMMM64_IMM8", "CVTSI2SD_XMM_RM64"} <= sse
    assert not sse & {"MOVAPS_XMM_XMMM128", "RCPPS_XMM_XMMM128", "CMPSD_M32_M32"}
    assert {"FADD_M32FP", "FSTP_M80FP", "FILD_M64INT", "FSIN"} <= x87
    assert not x87 & {"FLDCW_M2BYTE", "FNSTSW_AX", "FXSAVE_M512BYTE"}
    aligned = {FORM_NAMES[c] for c in aligned_forms()}
    assert {"MOVAPS_XMM_XMMM128", "PADDD_XMM_XMMM128", "MOVNTDQ_M128_XMM"} <= aligned
    assert not aligned & {"MOVUPS_XMM_XMMM128", "LDDQU_XMM_M128", "PCMPISTRI_XMM_XMMM128_IMM8"}
    assert set(forms_of("movapd")) <= set(aligned_forms()) | set(forms_of("vmovapd"))
