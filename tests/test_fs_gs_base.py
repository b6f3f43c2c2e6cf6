"""RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE on the whole machine (SDM Vol. 2)."""

from __future__ import annotations

import pytest

from sandbox.boot import Machine
from sandbox.exits import EmulationFailure, GuestException
from sandbox.registers import RAX, RBX, RCX, RDX
from tests.guest import BASE, enter_user_mode, machine, run_to_hlt

POLICIES = ("verified", "everything", "nothing")
DATA = 0x8000
ENABLE = "mov rax, cr4; or rax, 0x10000; mov cr4, rax;"
DISABLE = "mov rax, cr4; and rax, ~0x10000; mov cr4, rax;"
PACKS = ("integer", "avx2")


def text(code: str) -> str:
    return code.replace(";", "\n") + "\nhlt"


def fault(found: Machine) -> tuple[int, int]:
    left = found.vcpu.run(10)
    assert isinstance(left, GuestException), left
    return left.exception, left.error_code


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["fs", "gs"])
def test_the_base_that_was_written_is_read_and_used(policy: str, name: str) -> None:
    code = f"{ENABLE} mov rbx, {DATA:#x}; wr{name}base rbx; rd{name}base rcx;"
    code += f"mov eax, 8; mov rdx, {name}:[rax]"
    with machine(text(code), policy=policy, handlers=PACKS) as found:
        found.vm.memory.load(DATA + 8, (0x1122334455667788).to_bytes(8, "little"))
        run_to_hlt(found)
        gpr = found.vcpu.registers.gpr
        assert (gpr[RCX], gpr[RDX]) == (DATA, 0x1122334455667788)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_forms_of_32_bits_take_and_give_the_low_half(policy: str) -> None:
    code = (
        f"{ENABLE} mov rbx, 0x7fff12345678; wrgsbase rbx; mov rcx, -1; rdgsbase ecx;"
        "mov rbx, 0xffffffff87654321; wrgsbase ebx; rdgsbase rdx"
    )
    with machine(text(code), policy=policy, handlers=PACKS) as found:
        run_to_hlt(found)
        gpr = found.vcpu.registers.gpr
        assert (gpr[RCX], gpr[RDX]) == (0x12345678, 0x87654321)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("code", ["wrfsbase rbx", "wrgsbase rbx"])
def test_a_base_that_is_not_canonical_is_a_general_protection_fault(policy: str, code: str) -> None:
    with machine(
        text(f"{ENABLE} mov rbx, 1 << 60; {code}"), policy=policy, handlers=PACKS
    ) as found:
        before = found.vm.engine.bank.read("fs_base"), found.vm.engine.bank.read("gs_base")
        assert fault(found) == (13, 0)
        after = found.vm.engine.bank.read("fs_base"), found.vm.engine.bank.read("gs_base")
        assert after == before
        assert found.vcpu.registers.gpr[RBX] == 1 << 60


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("code", ["rdfsbase rax", "rdgsbase eax", "wrfsbase ebx", "wrgsbase rbx"])
def test_without_its_bit_in_cr4_it_is_undefined(policy: str, code: str) -> None:
    with machine(text(f"{DISABLE} {code}"), policy=policy, handlers=PACKS) as found:
        assert fault(found) == (6, 0)


@pytest.mark.parametrize("modrm", ["c0", "c8", "d0", "d8"])
def test_outside_64_bit_mode_it_is_no_instruction(modrm: str) -> None:
    """A guest without an IDT leaves that to the caller."""
    with machine(bytes.fromhex(f"f30fae{modrm}f4"), "protected", handlers=PACKS) as found:
        bank = found.vm.engine.bank
        bank.write("cr4", bank.read("cr4") | 1 << 16)
        assert isinstance(found.vcpu.run(10), EmulationFailure)
        assert found.vcpu.registers.rip == BASE


@pytest.mark.parametrize("policy", POLICIES)
def test_cpuid_tells_of_it(policy: str) -> None:
    with machine(text("mov eax, 7; xor ecx, ecx; cpuid"), policy=policy, handlers=PACKS) as found:
        run_to_hlt(found)
        assert found.vcpu.registers.gpr[RBX] & 1


def test_user_code_may_use_it() -> None:
    code = "wrfsbase rbx; rdfsbase rax; hlt"
    with machine(text(code), handlers=PACKS, policy="verified") as found:
        bank = found.vm.engine.bank
        bank.write("cr4", bank.read("cr4") | 1 << 16)
        enter_user_mode(found)
        found.vcpu.registers.gpr[RBX] = DATA
        assert fault(found) == (13, 0), "HLT"
        assert found.vcpu.registers.gpr[RAX] == DATA
