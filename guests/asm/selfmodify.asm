; mode: long
; base: 0x1000
; expect: rax=0x37 rbx=0x2a rcx=0x0 rdx=0x3
; proves: code that writes to code runs as written: an immediate in a loop that is already
;         translated, an instruction just ahead, and a whole function copied and patched.
    xor eax, eax
    mov ecx, 10
again:
    .byte 0x05                          ; add eax, imm32: the immediate is changed below
addend:
    dd 1
    inc dword ptr [rip + addend]        ; 1 + 2 + ... + 10 = 55 = 0x37
    dec ecx
    jnz again

    mov byte ptr [rip + ahead + 1], 42  ; the next instruction
ahead:
    mov bl, 0
    movzx ebx, bl

    lea rsi, [rip + template]           ; copy "mov edx, imm32; ret", patch it, call it
    lea rdi, [rip + room]
    mov ecx, template_end - template
    cld
    rep movsb
    mov dword ptr [rip + room + 1], 1
    call room
    mov r8d, edx
    mov dword ptr [rip + room + 1], 2   ; and again, after it has run
    call room
    add edx, r8d
    hlt

template:
    mov edx, 0
    ret
template_end:
room:
    .space 16
