/* x87: values, the status word, exceptions left masked, the environment. */
#include "kernel.h"

typedef struct { u64 mantissa; u16 exponent; } __attribute__((packed)) extended;

static u16 status(void) { u16 v; asm volatile("fnstsw %0" : "=am"(v)); return v; }

static void check_extended(const char *what, extended got, u16 exponent, u64 mantissa)
{
    check(what, got.exponent == exponent && got.mantissa == mantissa);
}

static void values(void)
{
    extended e;
    u64 d = 0x4008000000000000, out;                        /* 3.0 */
    u32 whole = 10;
    asm volatile("fninit; fldpi; fstpt %0" : "=m"(e));
    check_extended("x87: pi", e, 0x4000, 0xc90fdaa22168c235);
    asm volatile("fld1; fldl %1; .byte 0xde, 0xf9; fstpt %0" : "=m"(e) : "m"(d));  /* fdivp st1 */
    check_extended("x87: a third", e, 0x3ffd, 0xaaaaaaaaaaaaaaab);
    asm volatile("fldl %1; fsqrt; fstpt %0" : "=m"(e) : "m"(d));
    check_extended("x87: sqrt(3)", e, 0x3fff, 0xddb3d742c265539e);
    asm volatile("fildl %1; fldl %2; fprem; fstpl %0; fstp %%st" : "=m"(out) : "m"(whole), "m"(d));
    check_equal("x87: 3 rem 10", out, 0x4008000000000000);
    asm volatile("fildl %1; fmul %%st, %%st; fistpl %0" : "=m"(whole) : "m"(whole));
    check_equal("x87: 10 squared", whole, 100);
    asm volatile("fld1; fldl %1; fxch; fscale; fstpl %0; fstp %%st" : "=m"(out) : "m"(d));
    check_equal("x87: fscale", out, 0x4020000000000000);
}

static void conditions(void)
{
    asm volatile("fninit; fld1; fldz; fcompp");
    check_equal("x87: 0 < 1", status() & 0x4500, 0x0100);
    asm volatile("fld1; fchs; fxam");
    check_equal("x87: fxam of -1", status() & 0x4700, 0x0600);
    asm volatile("fninit; fld1; fldz; fdivrp");
    check_equal("x87: 1/0 sets ZE and no summary", status() & 0x84, 4);
    asm volatile("fninit; fadd %st(1), %st");
    if (!said("skip=strict"))
        check_equal("x87: empty registers set IE and SF", status() & 0x41, 0x41);
    asm volatile("fninit");
}

static void environment(void)
{
    u32 image[7];
    asm volatile("fninit; fld1; fld1; fnstenv %0" : "=m"(image));
    check_equal("x87: control word in the environment", image[0] & 0xffff, 0x37f);
    check_equal("x87: TOP is 6", image[1] >> 11 & 7, 6);
    check_equal("x87: tags of two values", image[2] & 0xffff, 0x0fff);
    asm volatile("fninit; fldenv %0" : : "m"(image));
    check_equal("x87: fldenv brings TOP back", status() >> 11 & 7, 6);
    asm volatile("fninit");
}

void test_x87(void)
{
    values();
    conditions();
    environment();
}
