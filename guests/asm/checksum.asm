; mode: long
; base: 0x1000
; expect: rbx=0x0 rcx=0x0 rdx=0x3
; proves: a guest that reads its own code sees its own bytes, also those of instructions that the
;         sandbox traps: FNV-1a over the whole program, before and after its vector code has run.
;         rax is the hash of the image up to the label end, rbx the difference of the two runs.
start:
    call hash
    mov rbx, rax
    mov edx, 0
warm:
    vpxor ymm0, ymm0, ymm0
    vpaddd xmm1, xmm0, xmm0
    vzeroupper
    inc edx
    cmp edx, 3
    jne warm
    call hash
    sub rbx, rax
    hlt

hash:                                   ; rax = FNV-1a of all bytes from start to end
    mov rax, 0xcbf29ce484222325
    mov r8, 0x100000001b3
    lea rsi, [rip + start]
    mov ecx, end - start
each_byte:
    xor al, [rsi]
    imul rax, r8
    inc rsi
    dec ecx
    jnz each_byte
    ret
end:
