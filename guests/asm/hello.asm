; mode: long
; base: 0x1000
; expect: rax=0x2a rbx=0xfffffffffffffffe rcx=0x0 rdx=0x3f8
; output: 0x3f8 "Hello from long mode\n"
; proves: 64-bit code runs, reads its data relative to RIP, writes to a port and computes.
    lea rsi, [rip + message]
    mov ecx, length
    mov edx, 0x3f8                      ; the first serial port
print:
    lodsb
    out dx, al
    dec ecx
    jnz print

    mov rbx, -2
    mov rax, 0x4000000000000015
    imul rax, rax, 2                    ; 0x800000000000002a: bit 63 is the sign
    btr rax, 63
    hlt

message:
    db "Hello from long mode\n"
length = $ - message
