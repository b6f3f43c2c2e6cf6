; mode: long
; base: 0x1000
; expect: rax=0x2a rbx=0x3 rcx=0x6 rdx=0xe rsi=0x7fffff000000 rdi=0x2
; proves: exceptions reach the guest through its own 64-bit IDT, and iretq resumes it:
;         #UD (vector 6) on ud2, #DE (0) on a division, #PF (14) on an unmapped address.
;         rbx counts them, rcx and rdx keep the first and the last vector, rsi CR2, rdi the
;         error code of the page fault (2: a write to a page that is not present).
    lea rdi, [rip + idt]
    lea rsi, [rip + divide_error]
    mov ecx, 0
    call set_gate
    lea rsi, [rip + invalid_opcode]
    mov ecx, 6
    call set_gate
    lea rsi, [rip + page_fault]
    mov ecx, 14
    call set_gate
    lidt [rip + idtr]

    xor ebx, ebx
    mov eax, 0x27                       ; each handler adds 1
    ud2
    mov ecx, edx                        ; the first vector
    xor r8d, r8d
    div r8d
    mov r9, 0x7fffff000000
    mov byte ptr [r9], al
    hlt

; Each handler steps over the instruction that faulted: its length is known here.
invalid_opcode:
    add qword ptr [rsp], 2              ; 0f 0b
    mov edx, 6
    jmp count
divide_error:
    add qword ptr [rsp], 3              ; 41 f7 f0
    mov edx, 0
    jmp count
page_fault:
    pop rdi                             ; the error code lies above the return address
    mov rsi, cr2
    add qword ptr [rsp], 3              ; 41 88 01
    mov edx, 14
count:
    inc eax
    inc ebx
    iretq

; Gate ecx of the table at rdi leads to rsi: 64-bit interrupt gate, present, DPL 0.
set_gate:
    mov eax, ecx
    shl eax, 4
    mov [rdi + rax], si
    mov word ptr [rdi + rax + 2], cs
    mov word ptr [rdi + rax + 4], 0x8e00
    shr rsi, 16
    mov [rdi + rax + 6], si
    shr rsi, 16
    mov [rdi + rax + 8], esi
    mov dword ptr [rdi + rax + 12], 0
    ret

    .align 16
idt:
    .space 15 * 16
idtr:
    dw 15 * 16 - 1
    dq idt
