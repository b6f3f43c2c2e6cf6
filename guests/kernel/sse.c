/* SSE: values, MXCSR, FXSAVE. The compiler itself uses none of it. */
#include "kernel.h"

static u32 a[4] __attribute__((aligned(16))), b[4] __attribute__((aligned(16))), r[4] __attribute__((aligned(16)));
static u8 image[512] __attribute__((aligned(16))), again[512] __attribute__((aligned(16)));

#define TWO(insn) asm volatile("movaps %1, %%xmm0; " insn " %2, %%xmm0; movaps %%xmm0, %0" \
                               : "=m"(r) : "m"(a), "m"(b))

static void check_vector(const char *what, u32 w0, u32 w1, u32 w2, u32 w3)
{
    check(what, r[0] == w0 && r[1] == w1 && r[2] == w2 && r[3] == w3);
}

static void set(u32 *to, u32 w0, u32 w1, u32 w2, u32 w3) { to[0] = w0, to[1] = w1, to[2] = w2, to[3] = w3; }

static void values(void)
{
    set(a, 0x3f800000, 0x40000000, 0xc0400000, 0x7f7fffff);  /* 1, 2, -3, largest */
    set(b, 0x40400000, 0x3e800000, 0x40400000, 0x7f7fffff);  /* 3, 1/4, 3, largest */
    TWO("addps");
    check_vector("sse: addps", 0x40800000, 0x40100000, 0, 0x7f800000);
    TWO("mulps");
    check_vector("sse: mulps", 0x40400000, 0x3f000000, 0xc1100000, 0x7f800000);
    TWO("divps");
    check_vector("sse: divps", 0x3eaaaaab, 0x41000000, 0xbf800000, 0x3f800000);
    TWO("maxps");
    check_vector("sse: maxps", 0x40400000, 0x40000000, 0x40400000, 0x7f7fffff);
    asm volatile("sqrtps %1, %%xmm0; movaps %%xmm0, %0" : "=m"(r) : "m"(b));
    check_vector("sse: sqrtps", 0x3fddb3d7, 0x3f000000, 0x3fddb3d7, 0x5f7fffff);
    TWO("paddd");
    check_vector("sse2: paddd", 0x7fc00000, 0x7e800000, 0x00800000, 0xfefffffe);
    set(a, 0x03020100, 0x07060504, 0x0b0a0908, 0x0f0e0d0c);
    set(b, 0x00010203, 0x80808080, 0x0c0d0e0f, 0x04040404);
    TWO("pshufb");
    check_vector("ssse3: pshufb", 0x00010203, 0, 0x0c0d0e0f, 0x04040404);
    asm volatile("movaps %1, %%xmm1; cvtps2pd %%xmm1, %%xmm0; movaps %%xmm0, %0" : "=m"(r) : "m"(*(set(a, 0x3fc00000, 0xbf000000, 0, 0), &a)));
    check_vector("sse2: cvtps2pd", 0, 0x3ff80000, 0, 0xbfe00000);
    u32 whole;
    asm volatile("movss %1, %%xmm0; cvttss2si %%xmm0, %0" : "=r"(whole) : "m"(*(set(b, 0xc2f6e979, 0, 0, 0), &b[0])));
    check_equal("sse: cvttss2si", whole, (u32)-123);
}

static void control(void)
{
    u32 csr = 0x1f80, seen;
    asm volatile("ldmxcsr %0" : : "m"(csr));
    set(a, 0x3f800000, 0x3f800000, 0x3f800000, 0x3f800000);
    set(b, 0x40400000, 0x40400000, 0x40400000, 0x40400000);
    csr = 0x7f80;                                           /* round toward zero */
    asm volatile("ldmxcsr %0" : : "m"(csr));
    TWO("divps");
    check_vector("sse: rounding toward zero", 0x3eaaaaaa, 0x3eaaaaaa, 0x3eaaaaaa, 0x3eaaaaaa);
    asm volatile("stmxcsr %0" : "=m"(seen));
    if (!said("skip=flags"))
        check_equal("sse: the inexact flag", seen, 0x7fa0);
    csr = 0x1f80;
    asm volatile("ldmxcsr %0" : : "m"(csr));
    if (said("skip=strict"))
        return;
    FAULT("ldmxcsr %0", : : "m"(*(u32[]){ 0x80000000 }));
    check_fault("sse: reserved bit in MXCSR is #GP", GP, 0);
}

static void saving(void)
{
    set(a, 1, 2, 3, 4);
    asm volatile("movaps %1, %%xmm7; fxsave %0; pxor %%xmm7, %%xmm7; fxrstor %0; movaps %%xmm7, %2"
                 : "+m"(image), "+m"(a), "=m"(r));
    check_vector("sse: fxsave and fxrstor", 1, 2, 3, 4);
    check_equal("sse: xmm7 in the image", *(u64 *)(image + 160 + 7 * 16), 0x200000001);
    asm volatile("fxsave %0" : "=m"(again));
    check_equal("sse: MXCSR in the image", *(u32 *)(again + 24), 0x1f80);
}

void test_sse(void)
{
    values();
    control();
    saving();
}
