; mode: long
; base: 0x1000
; expect: rax=0x2a rbx=0x33 rcx=0xd rdx=0xe rsi=0x7 rdi=0x2000 r8=0x2
; proves: the guest makes its own page tables, GDT, TSS and IDT, drops to CPL 3 with iretq and
;         comes back through the TSS stack: #GP (13) for hlt in user mode, #PF (14, error code
;         7: user, write, present) for a write to a supervisor page, and int 0x80 to end.
;         rbx is the CS that the last frame shows, rdi the faulting page, r8 the number of faults.
PRESENT equ 1
WRITE equ 2
USER equ 4
    lea rsp, [rip + kernel_stack_top]   ; inside the first 2 MiB, which is all that is mapped below

    lea rdi, [rip + page_table]         ; 512 pages of 4 KiB, each at its own address
    mov eax, PRESENT + WRITE
    mov ecx, 512
each_page:
    mov [rdi], rax
    add rdi, 8
    add rax, 0x1000
    loop each_page
    lea rdi, [rip + page_table]
    lea rax, [rip + user_code]
    shr rax, 12
    or byte ptr [rdi + rax * 8], USER
    lea rax, [rip + user_stack]
    shr rax, 12
    or byte ptr [rdi + rax * 8], USER
    lea rax, [rip + page_table + PRESENT + WRITE + USER]
    mov [rip + page_directory], rax
    lea rax, [rip + page_directory + PRESENT + WRITE + USER]
    mov [rip + directory_pointers], rax
    lea rax, [rip + directory_pointers + PRESENT + WRITE + USER]
    mov [rip + root], rax

    lea rax, [rip + tss]                ; the base of the TSS descriptor lies in three pieces
    mov [rip + tss_descriptor + 2], ax
    shr rax, 16
    mov [rip + tss_descriptor + 4], al
    lea rdi, [rip + idt]
    lea rsi, [rip + general_protection]
    mov ecx, 13
    call set_gate
    lea rsi, [rip + page_fault]
    mov ecx, 14
    call set_gate
    lea rsi, [rip + system_call]
    mov ecx, 0x80
    call set_gate
    mov byte ptr [rdi + 0x80 * 16 + 5], 0xee    ; DPL 3: user code may call it

    lea rax, [rip + root]
    mov cr3, rax
    lgdt [rip + gdtr]
    lidt [rip + idtr]
    mov ax, 0x38
    ltr ax

    xor r8d, r8d
    push 0x2b                           ; SS, RSP, RFLAGS, CS, RIP of the user program
    lea rax, [rip + user_stack + 0x1000]
    push rax
    push 2
    push 0x33
    lea rax, [rip + user_code]
    push rax
    iretq

general_protection:
    add rsp, 8                          ; the error code
    mov ecx, 13
    inc r8d
    add qword ptr [rsp], 1              ; step over hlt
    iretq

page_fault:
    pop rsi                             ; the error code
    mov rdi, cr2
    mov edx, 14
    inc r8d
    add qword ptr [rsp], 8              ; step over c6 04 25, address (4 bytes), immediate
    iretq

system_call:
    mov rbx, [rsp + 8]                  ; CS of the interrupted program
    hlt

; Gate ecx of the table at rdi leads to rsi: 64-bit interrupt gate, present, DPL 0.
set_gate:
    mov eax, ecx
    shl eax, 4
    mov [rdi + rax], si
    mov word ptr [rdi + rax + 2], 0x08
    mov word ptr [rdi + rax + 4], 0x8e00
    shr rsi, 16
    mov [rdi + rax + 6], si
    mov dword ptr [rdi + rax + 8], 0
    mov dword ptr [rdi + rax + 12], 0
    ret

    .align 8
gdt:
    dq 0
    dq 0x00af9b000000ffff               ; 08 code, 64-bit
    dq 0x00cf93000000ffff               ; 10 data
    dq 0, 0                             ; 18, 20
    dq 0x00cff3000000ffff               ; 28 user data
    dq 0x00affb000000ffff               ; 30 user code, 64-bit
tss_descriptor:
    dq 0x0000890000000067, 0            ; 38 available TSS of 0x68 bytes
gdtr:
    dw $ - gdt - 1
    dq gdt
idtr:
    dw 0x81 * 16 - 1
    dq idt
    .align 8
tss:
    dd 0
    dq kernel_stack_top                 ; RSP0: the stack for faults in user mode
    .space 0x68 - 12

    .align 4096
kernel_page:                            ; supervisor only: the user program faults on it
    .space 0x1000 - 0x10
kernel_stack_top:
    .space 0x10

    .align 4096
user_code:
    mov eax, 0x28
    hlt                                 ; #GP: privileged
    inc eax
    mov byte ptr [kernel_page], 1       ; #PF: supervisor page
    inc eax
    int 0x80

    .align 4096
user_stack:
    .space 0x1000
root:
    .space 0x1000
directory_pointers:
    .space 0x1000
page_directory:
    .space 0x1000
page_table:
    .space 0x1000
idt:
    .space 0x81 * 16
