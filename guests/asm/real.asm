; mode: real
; base: 0x1000
; expect: rax=0x0007 rbx=0x1234 rcx=0x0 rdx=0x3f8
; output: 0x3f8 "real\n"
; proves: 16-bit code runs flat from CS=0: port output, string instructions, and an interrupt
;         handler of the guest's own, found through the interrupt vector table at address 0.
    .code16
    xor ax, ax
    mov ds, ax
    mov es, ax
    cld
    mov word ptr [0x60 * 4], handler    ; vector 0x60: offset, then segment
    mov word ptr [0x60 * 4 + 2], ax

    mov dx, 0x3f8
    mov si, message
    mov cx, length
print:
    lodsb
    out dx, al
    loop print

    mov ax, 5
    int 0x60                            ; adds 2 to ax, sets bx
    hlt

handler:
    add ax, 2
    mov bx, 0x1234
    iret

message:
    db "real\n"
length = $ - message
