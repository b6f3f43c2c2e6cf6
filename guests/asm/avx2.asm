; mode: long
; base: 0x1000
; expect: rax=0x2cb0 rbx=0x0 rcx=0x0
; proves: AVX2 code that the fast path cannot run gives the right sums: eight lanes of squares,
;         multiplied, added and folded; and the upper halves survive SSE code in between.
    vpbroadcastd ymm0, dword ptr [rip + step]
    vmovdqu ymm1, [rip + first]         ; 1 .. 8
    vpxor ymm2, ymm2, ymm2
    mov ecx, 4
again:
    vpmulld ymm3, ymm1, ymm1
    vpaddd ymm2, ymm2, ymm3
    vpaddd ymm1, ymm1, ymm0
    paddd xmm0, xmm4                    ; legacy SSE: adds zero, must leave the upper half alone
    dec ecx
    jnz again
    vextracti128 xmm3, ymm2, 1          ; the sum of the squares of 1 .. 32: 0x2cb0
    vpaddd xmm2, xmm2, xmm3
    vpshufd xmm3, xmm2, 0x4e
    vpaddd xmm2, xmm2, xmm3
    vpshufd xmm3, xmm2, 0xb1
    vpaddd xmm2, xmm2, xmm3
    vmovd eax, xmm2
    vptest ymm1, ymm1                   ; ymm1 is not zero: ZF = 0
    setz bl
    movzx ebx, bl
    vzeroupper
    hlt

    .align 32
first:
    dd 1, 2, 3, 4, 5, 6, 7, 8
step:
    dd 8
