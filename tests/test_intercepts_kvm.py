"""Instructions that leave the guest or are intercepted, without any handlers: both engines agree
exit by exit, in all modes, at CPL 0 and 3. Features in CPUID are the processor's and left out."""

from __future__ import annotations

import pytest

from guests.assemble import assemble
from sandbox.boot import Machine, Mode
from sandbox.exits import EmulationFailure, Exit, Hlt, Io
from sandbox.registers import RDI, RSI
from sandbox.vm import ENGINES
from tests.guest import BASE, BITNESS, add_idt, enter_user_mode
from tests.kvm_guest import KVM, LOCAL, Left, compare, guest, map_hole, seen

pytestmark = KVM

HANDLERS = BASE + 0x100
"""Where all vectors lead: to one HLT each, so that RIP tells the vector."""

LONG = """\
hlt; nop
in al, 0x60; in ax, dx; in eax, dx; out 0x80, al; out dx, ax; out dx, eax
insb; insw; insd; outsb; outsw; outsd
cld / mov ecx, 3 / rep outsb; std / mov ecx, 2 / rep outsd; mov ecx, 2 / rep insw
xor ecx, ecx / rep insb; xor ecx, ecx / rep outsb; mov ecx, 1 / rep insd
mov edi, 0x8ffd / mov ecx, 8 / rep insw; mov edi, 0x8004 / mov ecx, 4 / std / rep insd
mov edi, 0x8fff / mov ecx, 3 / rep insd; mov ecx, 1500 / rep insb
int3; int 0x30; int 0x80; .byte 0xcd, 0x0d; sti / cli; pushfq / pop rax; lidt [rsi]
mov ecx, 0xc0000081 / rdmsr; mov ecx, 0xc0000080 / rdmsr; mov ecx, 0xc0000100 / rdmsr
mov ecx, 0x1b / rdmsr; mov ecx, 0x277 / rdmsr; mov ecx, 0x12345 / rdmsr
mov ecx, 0xc0000082 / mov eax, 0x1234 / xor edx, edx / wrmsr / xor eax, eax / rdmsr
mov ecx, 0xc0000082 / mov edx, 0x80000000 / wrmsr; mov ecx, 0x12345 / wrmsr
mov rax, cr0; mov rax, cr2; mov rax, cr3; mov rax, cr8; mov rax, dr6; mov rax, dr7
mov eax, 0x1234 / mov cr2, rax / mov rbx, cr2; mov eax, 5 / mov cr8, rax / mov rbx, cr8
mov eax, 0x11 / mov cr8, rax; xor eax, eax / mov cr0, rax; mov rax, cr3 / mov cr3, rax
mov rax, cr0 / btr rax, 16 / mov cr0, rax / mov rbx, cr0
mov eax, 0x1000 / mov dr0, rax / mov rbx, dr0
smsw eax; smsw [rsi]; clts / smsw eax; mov ax, 0x3b / lmsw ax / smsw ebx
sgdt [rsi] / mov rax, [rsi]; sidt [rsi] / mov rax, [rsi]; str eax; sldt eax
invlpg [rsi]; wbinvd; invd; swapgs; rdpmc; rdtsc / xor eax, eax / xor edx, edx
xor eax, eax / cpuid; mov eax, 0x80000008 / cpuid / xor eax, eax; xor ecx, ecx / xgetbv
.byte 0x0f, 0x05; .byte 0xf1 / nop; mov ax, ds / mov ds, ax; ltr ax; lldt ax"""
USER = """\
hlt; in al, 0x60; out 0x80, al; insb; outsb; rdmsr; wrmsr; mov rax, cr0; mov cr0, rax
mov rax, cr8; mov rax, dr0; mov dr7, rax; clts; lgdt [rsi]; lidt [rsi]; ltr ax; lldt ax
invlpg [rsi]; wbinvd; invd; cli; sti; swapgs; rdpmc; xsetbv; iretq; lmsw ax
mov ax, 0x10 / mov ds, ax; mov ax, 0x2b / mov ds, ax; int3
rdtsc / xor eax, eax / xor edx, edx"""
PROTECTED = """\
hlt; in eax, dx; out 0x80, eax; cld / mov ecx, 3 / rep outsd; mov ecx, 3 / rep insb
mov eax, cr0; mov eax, cr3; mov eax, cr0 / and eax, 0xfffffff7 / mov cr0, eax; mov eax, dr6
xor eax, eax / cpuid; mov ecx, 0xc0000080 / rdmsr; lgdt [esi]; str ax; smsw eax; clts
pushfd / pop eax; wbinvd"""
REAL = """\
hlt; in al, 0x60; out 0x80, al; cld / mov cx, 3 / rep outsb; mov cx, 2 / rep insw
mov cx, 0 / rep insb; mov eax, cr0; smsw ax; lmsw ax; clts; mov eax, dr7; xor eax, eax / cpuid
mov ecx, 0xc0000080 / rdmsr; mov ecx, 0x12345 / rdmsr; lgdt [si]; sgdt [si]; invd
int 0x21; int3; mov ax, ds / mov es, ax; xor cl, cl / div cl"""


def cases(mode: Mode, text: str, cpl: int = 0) -> list[tuple[Mode, int, str]]:
    parts = [part.strip() for line in text.splitlines() for part in line.split(";")]
    return [(mode, cpl, part.replace(" / ", "\n")) for part in parts]


def prepare(found: Machine, mode: Mode, cpl: int) -> None:
    if mode == "long":
        add_idt(found, {vector: HANDLERS + vector for vector in range(256)})
    elif mode == "real":
        for vector in range(0x40):
            found.vm.memory.load(4 * vector, (HANDLERS + vector).to_bytes(4, "little"))
    if cpl:
        enter_user_mode(found)
    found.vcpu.registers.gpr[RSI], found.vcpu.registers.gpr[RDI] = 0x8000, 0x8100


def story(engine: str, mode: Mode, cpl: int, text: str) -> tuple[list[Left], bytes]:
    """All exits up to a HLT, and the memory that string input goes to."""
    code = assemble(f"{text}\nhlt", BASE, BITNESS[mode]).ljust(HANDLERS - BASE, b"\xcc")
    exits: list[Left] = []
    with guest(engine, code + b"\xf4" * 256, mode) as found:
        prepare(found, mode, cpl)
        for number in range(8):
            left = found.vcpu.run(5)
            exits.append(seen(found, left))
            if isinstance(left, Hlt):
                break
            assert isinstance(left, Io)
            if left.is_in:
                left.data = bytes(number + at & 0xFF for at in range(len(left.data)))
        return exits, found.vm.memory.read(0x7FF0, 0x1100)


ALL = [
    *cases("long", LONG), *cases("long", USER, 3), *cases("protected", PROTECTED),
    *cases("real", REAL),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "cpl", "text"), ALL)
def test_without_handlers_both_engines_make_the_same_exits(mode: Mode, cpl: int, text: str) -> None:
    kvm, unicorn = (story(engine, mode, cpl, text) for engine in ENGINES[::-1])
    assert kvm == unicorn
    assert kvm[0][-1][0] == Hlt.exit_reason


@LOCAL
@pytest.mark.parametrize("mode", ["protected", "long"])
def test_an_exit_that_nobody_handles_is_the_same_at_every_run(mode: Mode) -> None:
    code = bytes.fromhex("c5f458c2 f4")  # vaddps
    left = compare(code, mode, exits=4)
    assert len({str(each) for each in left}) == 1 and isinstance(left[0], EmulationFailure)


def test_an_exit_to_a_hole_is_answered_and_its_failure_repeated() -> None:
    """MMIO by an allowed form, then by one that is not, run again unhandled."""

    def answer(_found: Machine, left: Exit) -> None:
        assert not isinstance(left, Hlt)
        if not isinstance(left, EmulationFailure):
            left.value = 0x11223344  # type: ignore[attr-defined]

    left = compare(
        "mov ebx, 0x70000000\n mov eax, [rbx]\n addps xmm0, [rbx]\n hlt",
        prepare=map_hole, answer=answer, exits=4,
    )  # fmt: skip
    assert [type(each).__name__ for each in left] == ["Mmio", *["EmulationFailure"] * 3]
