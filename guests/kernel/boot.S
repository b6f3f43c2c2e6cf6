# From the boot loader to 64-bit C: multiboot header, page tables, long mode.
#
# On the way, in 32-bit protected mode: a GDT, an IDT, and one #UD through it.

#include "kernel.h"

        .section .multiboot, "a"
        .align 4
        .long 0x1badb002, 3, -(0x1badb002 + 3)

        .bss
        .align 4096
        .globl pml4
pml4:   .skip 4096
pdpt:   .skip 4096
directories:
        .skip 4 * 4096
        .globl idt
idt:    .skip 256 * 16
        .skip 16384
        .globl stack_top
stack_top:
        .skip 8192
        .globl fault_stack_top
fault_stack_top:
        .globl tss
tss:    .skip TSS_BYTES

        .data
        .align 8
        .globl gdt
gdt:    .quad 0
        .quad 0x00cf9b000000ffff        # 08 code, 32-bit
        .quad 0x00cf93000000ffff        # 10 data
        .quad 0x00af9b000000ffff        # 18 code, 64-bit
        .quad 0x00cf93000000ffff        # 20 data, next to it for SYSCALL
        .quad 0x00cffb000000ffff        # 28 user code, 32-bit (SYSRET begins here)
        .quad 0x00cff3000000ffff        # 30 user data
        .quad 0x00affb000000ffff        # 38 user code, 64-bit
        .quad 0, 0                      # 40 TSS
gdt_pointer:
        .word gdt_pointer - gdt - 1
        .quad gdt
idt_pointer:
        .word 256 * 16 - 1
        .quad idt
        .globl boot_magic, boot_information, undefined_seen
boot_magic:
        .long 0
boot_information:
        .long 0
undefined_seen:                         # how often the 32-bit #UD handler ran
        .long 0

        .text
        .code32
        .globl start
start:  mov $stack_top, %esp
        mov %eax, boot_magic
        mov %ebx, boot_information
        cld
        lgdt gdt_pointer
        ljmp $CODE_32, $1f
1:      mov $DATA, %eax
        mov %eax, %ds
        mov %eax, %es
        mov %eax, %ss
        mov %eax, %fs
        mov %eax, %gs

        mov $undefined_32, %eax         # gate 6: an interrupt gate of 32 bits
        mov %ax, idt + 6 * 8
        movw $CODE_32, idt + 6 * 8 + 2
        movw $0x8e00, idt + 6 * 8 + 4
        shr $16, %eax
        mov %ax, idt + 6 * 8 + 6
        lidt idt_pointer
        ud2

        # 4 GiB mapped onto itself by pages of 2 MiB
        mov $directories, %edi
        mov $0x83, %eax
        mov $2048, %ecx
2:      mov %eax, (%edi)
        add $0x200000, %eax
        add $8, %edi
        loop 2b
        mov $directories + 7, %eax
        mov $4, %ecx
        mov $pdpt, %edi
3:      mov %eax, (%edi)
        add $4096, %eax
        add $8, %edi
        loop 3b
        movl $pdpt + 7, pml4

        mov $0x620, %eax                # PAE, OSFXSR, OSXMMEXCPT
        mov %eax, %cr4
        mov $pml4, %eax
        mov %eax, %cr3
        mov $0xc0000080, %ecx           # EFER: SCE, LME, NXE
        rdmsr
        or $0x901, %eax
        wrmsr
        mov $0x80010033, %eax           # PG, WP, NE, ET, MP, PE
        mov %eax, %cr0
        ljmp $CODE_64, $4f
        .code64
4:      mov $stack_top, %rsp
        xor %eax, %eax                  # the 32-bit gate was for that mode only
        mov %rax, idt + 6 * 8
        lgdt gdt_pointer
        lidt idt_pointer
        fninit
        call kernel_main
5:      cli
        hlt
        jmp 5b

        .code32
undefined_32:
        incl undefined_seen
        addl $2, (%esp)
        iret
        .code64
