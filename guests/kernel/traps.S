# Exceptions, interrupts, and user code: the way into C and back.

#include "kernel.h"

        .text
        .align 16
        .globl stubs
stubs:  .set vector, 0
        .rept 256
        .if vector != 8 && (vector < 10 || vector > 14) && vector != 17
        push $0                         # no error code comes with this one
        .endif
        push $vector
        jmp common
        .align 16
        .set vector, vector + 1
        .endr

common: push %rax
        push %rcx
        push %rdx
        push %rbx
        push %rbp
        push %rsi
        push %rdi
        push %r8
        push %r9
        push %r10
        push %r11
        push %r12
        push %r13
        push %r14
        push %r15
        mov %rsp, %rdi
        cld
        call trap
        pop %r15
        pop %r14
        pop %r13
        pop %r12
        pop %r11
        pop %r10
        pop %r9
        pop %r8
        pop %rdi
        pop %rsi
        pop %rbp
        pop %rbx
        pop %rdx
        pop %rcx
        pop %rax
        add $16, %rsp
        iretq

# u64 run_user(rip, rsp): run at CPL 3 until leave_user(); what it was given.
        .globl run_user, leave_user
run_user:
        push %rbx
        push %rbp
        push %r12
        push %r13
        push %r14
        push %r15
        mov %rsp, tss + 4               # RSP0: the frames of user code come below these
        mov %rsp, kernel_rsp
        push $USER_DATA
        push %rsi
        pushq $2
        push $USER_CODE
        push %rdi
        iretq

leave_user:
        mov kernel_rsp, %rsp
        mov %rdi, %rax
        pop %r15
        pop %r14
        pop %r13
        pop %r12
        pop %rbp
        pop %rbx
        ret

# SYSCALL: RAX * 2 and back with SYSRET
        .globl syscall_entry
syscall_entry:
        add %rax, %rax
        sysretq

        .bss
        .align 8
kernel_rsp:
        .skip 8
