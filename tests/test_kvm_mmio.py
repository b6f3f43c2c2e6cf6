"""Instructions with an operand in MMIO: what Unicorn's guests get is what KVM's emulator does."""

from __future__ import annotations

from typing import Any

import pytest
from iced_x86 import Code

from guests.assemble import assemble
from sandbox.boot import Machine
from sandbox.decode import decode
from sandbox.exits import EmulationFailure, Exit, Hlt, Io, Mmio
from sandbox.kernel_emulator import mmio_forms
from tests.guest import BASE
from tests.kvm_guest import ENGINES, HOLE, KVM, guest, map_hole, seen
from tests.undefined_flags import undefined_flags

TAKEN = """\
mov eax, [rbx]; mov rax, [rbx]; mov al, [rbx]; mov ax, [rbx+2]; mov [rbx], rcx; mov [rbx], cl
mov [rbx], cx; mov dword ptr [rbx], 0x1234; mov qword ptr [rbx], -3; movzx eax, byte ptr [rbx]
movsx rax, word ptr [rbx]; movsxd rax, dword ptr [rbx]; add rax, [rbx]; add [rbx], rax
adc dword ptr [rbx], 5; sub byte ptr [rbx], cl; xor [rbx], cx; cmp qword ptr [rbx], 7
test byte ptr [rbx], 7; test [rbx], ecx; not dword ptr [rbx]; neg qword ptr [rbx]
inc byte ptr [rbx]; lock inc dword ptr [rbx]; lock add [rbx], ecx; xchg [rbx], rcx
xadd [rbx], ecx; cmpxchg [rbx], ecx; cmpxchg8b [rbx]; bt [rbx], ecx; bt dword ptr [rbx], 3
bts dword ptr [rbx], 3; btr qword ptr [rbx], 40; btc [rbx], ecx; bsr rax, [rbx]
shl dword ptr [rbx], 3; sar byte ptr [rbx], cl; ror word ptr [rbx], 1; rcl dword ptr [rbx], 1
shld [rbx], eax, 5; shrd [rbx], rax, cl; imul eax, [rbx]; imul eax, [rbx], 9
mul dword ptr [rbx]; div dword ptr [rbx]; idiv dword ptr [rbx]; sete [rbx]; cmovne rax, [rbx]
push qword ptr [rbx]; pop qword ptr [rbx]; movsb; movsq; stosb; lodsw; scasb; cmpsd
movnti [rbx], rcx; movups xmm1, [rbx]; movups [rbx], xmm1; movaps xmm1, [rbx]
movdqu xmm1, [rbx]; movdqa [rbx], xmm1; movntps [rbx], xmm1; movntdq [rbx], xmm1
movq mm1, [rbx]; movq [rbx], mm1; fnstcw [rbx]; fnstsw [rbx]; smsw [rbx]; prefetcht0 [rbx]
outsb; insb"""
REFUSED = """\
addps xmm1, [rbx]; movss xmm1, [rbx]; movsd xmm1, [rbx]; movd xmm1, [rbx]; movq xmm1, [rbx]
movhps xmm1, [rbx]; lddqu xmm1, [rbx]; crc32 eax, dword ptr [rbx]; pinsrw xmm1, [rbx], 1
popcnt eax, [rbx]; fld dword ptr [rbx]; fstp qword ptr [rbx]; paddd mm1, [rbx]"""
REGISTERS = [0x1111, 3, 0, HOLE + 0x40, 0x8000, 0x8100, HOLE + 0x80, HOLE + 0xC0]


def cases(text: str) -> list[str]:
    return [case.strip() for line in text.splitlines() for case in line.split(";")]


def answer(left: Exit) -> None:
    data = bytes([0x81, 0x42, 0x13, 0x04, 0x05, 0x06, 0x07, 0x08])
    if isinstance(left, Mmio) and not left.is_write:
        left.data = data[: left.len]
    elif isinstance(left, Io) and left.is_in:
        left.data = b"\x5a" * left.size


def prepare(found: Machine) -> None:
    map_hole(found)
    registers = found.vcpu.registers
    for number, value in enumerate(REGISTERS):
        registers.gpr[number] = value
    registers.vec.write(1, bytes(range(1, 17)))


def story(engine: str, code: bytes, mask: int) -> list[tuple[Any, ...]]:
    """Exits with the registers at each, and XMM1."""
    found_exits = []
    with guest(engine, code) as found:
        prepare(found)
        for _ in range(12):
            left = found.vcpu.run(5)
            *rest, flags = seen(found, left)
            found_exits.append((*rest, flags & ~mask, found.vcpu.registers.vec.read(1, 16)))
            if isinstance(left, (Hlt, EmulationFailure)):
                break
            answer(left)
    return found_exits


@KVM
@pytest.mark.parametrize("text", cases(TAKEN))
def test_what_kvms_emulator_takes(text: str) -> None:
    code = assemble(f"{text}\nhlt", BASE)
    mask = undefined_flags(decode(code, 64), REGISTERS)
    stories = {engine: story(engine, code, mask) for engine in ENGINES}
    assert stories["kvm"] == stories["unicorn"]
    assert stories["kvm"][-1][0] == Hlt.exit_reason


@KVM
@pytest.mark.parametrize("text", cases(REFUSED))
def test_what_kvms_emulator_refuses(text: str) -> None:
    code = assemble(f"{text}\nhlt", BASE)
    stories = {engine: story(engine, code, 0) for engine in ENGINES}
    assert stories["kvm"] == stories["unicorn"]
    assert stories["kvm"][0][0] == EmulationFailure.exit_reason


def test_forms_are_those_of_the_kernels_tables() -> None:
    forms = mmio_forms()
    inside = (
        "ADD_RM32_R32 MOVUPS_XMM_XMMM128 MOVDQU_XMM_XMMM128 MOVQ_MM_MMM64 FNSTCW_M2BYTE "
        "MOVBE_R32_M32 CMPXCHG8B_M64 MOVSXD_R64_RM32 POP_RM64 MOVNTI_M64_R64 BT_RM32_IMM8"
    )
    outside = (
        "ARPL_RM16_R16 POPCNT_R32_RM32 TZCNT_R32_RM32 CRC32_R32_RM32 MOVSS_XMM_XMMM32 FLD_M32FP "
        "FLDCW_M2BYTE MOVQ_XMM_XMMM64 VEX_VMOVUPS_XMM_XMMM128 BOUND_R32_M3232 LDMXCSR_M32 "
        "MOVNTDQA_XMM_M128 XBEGIN_REL32 VMPTRLD_M64 VERR_RM16 ADDPS_XMM_XMMM128"
    )
    assert [name for name in inside.split() if getattr(Code, name) not in forms] == []
    assert [name for name in outside.split() if getattr(Code, name) in forms] == []
