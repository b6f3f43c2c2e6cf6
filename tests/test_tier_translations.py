"""What the handler tier remembers of addresses holds only for the privilege, mode and segments it
was found under. Whole guests run in the tier here: the engine is never entered in between."""

from __future__ import annotations

from guests.assemble import assemble
from sandbox.exits import GuestException, Hlt
from sandbox.registers import RAX, RBX
from tests.guest import machine

HANDLERS = ("integer", "system")
PF = 14
PAGE = 0x8000


def test_a_page_that_the_kernel_has_used_is_still_none_of_the_users() -> None:
    code = (
        f"mov ebx, {PAGE}\n mov rcx, [rbx]\n mov [rbx], rcx\n"
        "push 0x2b\n push rsp\n push 2\n push 0x33\n lea rax, [rip + user]\n push rax\n iretq\n"
        "user: mov [rbx], eax\n hlt"
    )
    with machine(code, policy="nothing", handlers=HANDLERS) as found:
        assert found.space is not None
        found.space.map(PAGE, PAGE, 0x1000, write=True, execute=False, user=False)
        assert found.vcpu.run(10) == GuestException(PF, 7)
        assert found.vcpu.cpu.cpl == 3


def test_code_that_the_kernel_has_run_is_still_none_of_the_users() -> None:
    code = (
        "mov ebx, 0x8000\n call rbx\n push 0x2b\n push rsp\n push 2\n push 0x33\n push rbx\n iretq"
    )
    with machine(code, policy="nothing", handlers=HANDLERS) as found:
        assert found.space is not None
        found.vm.memory.load(PAGE, assemble("ret", PAGE))
        found.space.map(PAGE, PAGE, 0x1000, write=False, execute=True, user=False)
        assert found.vcpu.run(10) == GuestException(PF, 0x15)
        assert (found.vcpu.registers.rip, found.vcpu.cpu.cpl) == (PAGE, 3)


def test_the_same_ip_in_another_segment_is_another_instruction() -> None:
    """Twice through 0000:1100, once through 0010:1000, which is the same place, and then through
    0100:1100, which is not."""
    code = {
        0x1000: "xor ax, ax\n.byte 0xea, 0x00, 0x11, 0x00, 0x00",
        0x1100: "inc ax\n cmp ax, 2\n jb again\n .byte 0xea, 0x00, 0x11, 0x00, 0x01\n"
        "again: .byte 0xea, 0x00, 0x11, 0x00, 0x00",
        0x2100: "inc ax\n mov bx, 0x77\n hlt",
    }
    with machine("nop", "real", policy="nothing", handlers=HANDLERS) as found:
        for at, text in code.items():
            found.vm.memory.load(at, assemble(text, at, 16))
        assert isinstance(found.vcpu.run(10), Hlt)
        assert found.vcpu.registers.gpr[RAX] & 0xFFFF == 3
        assert found.vcpu.registers.gpr[RBX] & 0xFFFF == 0x77


def test_the_same_bytes_in_another_mode_are_another_instruction() -> None:
    """40 is INC EAX in 32-bit code and a REX prefix in 64-bit code."""
    code = (
        "mov ecx, 2\n mov ebx, 5\n lea rsi, [rip + shared]\n jmp rsi\n"
        "shared: .byte 0x40, 0x89, 0xd8\n dec ecx\n jz done\n"  # [inc eax;] mov eax, ebx
        "push 0x18\n push rsi\n retfq\n done: hlt"
    )
    with machine(code, policy="nothing", handlers=HANDLERS) as found:
        assert isinstance(found.vcpu.run(10), Hlt)
        assert found.vcpu.cpu.bitness == 32
        mnemonics = found.vcpu.stats.by_mnemonic
        assert mnemonics["inc"] == 1 and mnemonics["mov"] == 4
