"""Whole programs run in the handler tier alone leave what the fast path leaves."""

from __future__ import annotations

import pytest

from guests.assemble import assemble
from sandbox.boot import Mode, boot_flat
from sandbox.exits import Hlt
from sandbox.registers import AF, CF, OF, PF, SF, ZF
from sandbox.vm import Vm

STATUS = CF | PF | AF | ZF | SF | OF

LONG = """
    call fill
    lea rdi, [rip + table]
    mov ecx, 39
outer:                                  ; bubble sort
    mov rsi, rdi
    mov edx, ecx
inner:
    mov rax, [rsi]
    cmp rax, [rsi + 8]
    jle ordered
    xchg rax, [rsi + 8]
    mov [rsi], rax
ordered:
    add rsi, 8
    dec edx
    jnz inner
    loop outer
    xor ebx, ebx
    mov r9, 0x9e3779b97f4a7c15
    xor ecx, ecx
hash:
    mov rax, [rdi + 8*rcx]
    imul rax, r9
    rol rbx, 7
    adc rbx, rax
    shrd r10, rax, 13
    bsr r11, rax
    bts r12, rax
    setc bpl
    test rax, rax
    cmovs r14, rax
    xadd r15, rbx
    cqo
    push rdx
    idiv r9
    pop rax
    inc ecx
    cmp ecx, 40
    jb hash
    lea rsi, [rip + table]
    lea rdi, [rip + table + 3]
    mov ecx, 100
    cld
    rep movsb
    mov rbp, rsp
    enter 32, 2
    leave
    test rbx, rbx
    hlt
fill:
    lea rdi, [rip + table]
    mov ecx, 40
    mov eax, 12345
next:
    imul eax, eax, 1103515245
    add eax, 12345
    movsxd rdx, eax
    mov [rdi], rdx
    lea rdi, [rdi + 8]
    sub ecx, 1
    jne next
    ret
    .balign 8
table:
"""

PROTECTED = """
    .code32
    mov ecx, 50
    mov eax, 1
    xor edx, edx
fibonacci:
    xchg eax, edx
    add eax, edx
    adc ebx, 0
    loop fibonacci
    pushad
    mov esi, esp
    add edi, [esi + 28]
    popad
    push 0x39
    push 0x47
    call decimal
    add esp, 8
    mov bp, sp
    rcl ebx, 3
    rcr esi, 1
    bswap edx
    sbb edx, ecx
    hlt
decimal:
    mov al, [esp + 4]
    add al, [esp + 8]
    daa
    aam 10
    aad 7
    mov cl, al
    sahf
    lahf
    ret
"""

REAL = """
    .code16
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov di, 0x4000
    mov cx, 64
    mov al, 7
    cld
    rep stosb
    mov si, 0x4000
    mov di, 0x4101
    mov cx, 30
    std
    rep movsw
    mov ax, 1234
    mov bx, 77
    mul bx
    div bx
    cmp ax, 5
    push ax
    pushf
    pop dx
    pop bp
    call there
    jmp done
there:
    mov cx, 5
again:
    shl ax, 3
    neg ax
    loopne again
    ret
done:
    xor dl, 0x55
    hlt
"""


def final_state(source: str, mode: Mode, policy: str) -> tuple[list[int], int, bytes]:
    bitness = {"real": 16, "protected": 32, "long": 64}[mode]
    with Vm(policy, ["integer", "system"]) as vm:
        vm.enable_cap(204)
        machine = boot_flat(vm, assemble(source, 0x1000, bitness), mode=mode)
        assert isinstance(machine.vcpu.run(timeout=30), Hlt)
        registers = machine.vcpu.registers
        trapped = machine.vcpu.stats.fallback_count
        assert trapped > 30 if policy == "nothing" else trapped < 10
        return list(registers.gpr), registers.rflags & STATUS, vm.memory.read(0, 0x8000)


@pytest.mark.parametrize(
    ("mode", "source"), [("long", LONG), ("protected", PROTECTED), ("real", REAL)]
)
def test_a_program_ends_alike_in_both_tiers(mode: Mode, source: str) -> None:
    assert final_state(source, mode, "nothing") == final_state(source, mode, "everything")
