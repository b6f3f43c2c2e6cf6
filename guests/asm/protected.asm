; mode: protected
; base: 0x1000
; expect: rax=0x6d rbx=0x37 rcx=0x0 rdx=0x3 rsi=0xa
; proves: 32-bit code runs in flat segments without paging: calls, recursion on the stack, BCD
;         arithmetic that long mode no longer has, and a #DE delivered through a 32-bit IDT.
    .code32
    mov word ptr [idt], divide_error    ; gate 0: offset 15..0 and 31..16 of the handler
    mov eax, divide_error
    shr eax, 16
    mov word ptr [idt + 6], ax
    mov word ptr [idt + 2], cs
    lidt [idtr]

    push 10
    call fibonacci
    add esp, 4
    mov ebx, eax                        ; 55 = 0x37

    mov al, 0x47                        ; 47 + 62 = 109 in BCD: al = 09, carry set
    add al, 0x62
    daa
    movzx esi, al
    adc esi, 0                          ; 9 + carry = 0xa

    mov edx, 3
    xor ecx, ecx
    mov eax, 100
    div ecx                             ; #DE: the handler skips the instruction, which has 2 bytes
    add eax, 9
    hlt

fibonacci:                              ; eax = fib([esp+4]), recursively
    mov eax, [esp + 4]
    cmp eax, 2
    jb small
    push ebx
    lea ecx, [eax - 1]
    push ecx
    call fibonacci
    add esp, 4
    mov ebx, eax
    mov ecx, [esp + 8]
    sub ecx, 2
    push ecx
    call fibonacci
    add esp, 4
    add eax, ebx
    pop ebx
small:
    ret

divide_error:
    add dword ptr [esp], 2
    iretd

    .align 8
idt:
    dw 0, 0, 0x8e00, 0                  ; 32-bit interrupt gate, present, DPL 0
idtr:
    dw 7
    dd idt
