/* The base instruction set: a few instructions of each family, against numbers. */
#include "kernel.h"

static u8 area[64] __attribute__((aligned(64)));

static void arithmetic(void)
{
    u64 a = 0x123456789abcdef0, b = 0xfedcba9876543210, low, high, flags;
    asm volatile("mul %3" : "=a"(low), "=d"(high) : "a"(a), "r"(b));
    check_equal("integer: mul, low", low, a * b);
    check_equal("integer: mul, high", high, 0x121fa00ad77d7422);
    asm volatile("div %4" : "=a"(low), "=d"(high) : "a"(low), "d"(high), "r"(b));
    check_equal("integer: div", low, a);
    asm volatile("mov $0x7fffffff, %%eax; add $1, %%eax; pushfq; pop %0" : "=r"(flags) : : "rax");
    check_equal("integer: add sets OF, SF, AF", flags & 0x8d5, 0x894);
    asm volatile("stc; mov $5, %%rax; adc $-6, %%rax; pushfq; pop %1" : "=a"(low), "=r"(flags));
    check_equal("integer: adc to zero sets ZF, CF", flags & 0x8d5, 0x55);
    asm volatile("mov $0x8000000000000001, %%rax; mov $0xff, %%rdx; shld $8, %%rdx, %%rax"
                 : "=a"(low) : : "rdx");
    check_equal("integer: shld", low, 0x100);
    asm volatile("mov $0x1234, %%eax; bswap %%eax; rol $4, %%ax" : "=a"(low));
    check_equal("integer: bswap, rol", low, 0x34120000);
    asm volatile("mov $0x00f0000000000000, %%rcx; bsr %%rcx, %%rax" : "=a"(low) : : "rcx");
    check_equal("integer: bsr", low, 55);
}

static void strings(void)
{
    struct string left = STRING("rep stosb", 0x5a, 0, 40, 0, area);
    check("integer: rep stosb",
          !left.count && left.to == (u64)area + 40 && area[39] == 0x5a && !area[40]);
    for (int n = 0; n < 32; n++)
        area[n] = n;
    STRING("rep movsb", 0, 0, 24, area, area + 1);
    check("integer: overlapping rep movsb repeats the first byte", area[24] == 0);
    for (int n = 0; n < 32; n++)
        area[n] = n;
    STRING("std; rep movsq; cld", 0, 0, 3, area + 16, area + 24);
    check("integer: rep movsq backwards", area[8] == 0 && area[31] == 23);
    left = STRING("repne scasb", 7, 0, 64, 0, area);
    check_equal("integer: repne scasb", left.count, 56);
}

static void atomics(void)
{
    u64 pair[2] __attribute__((aligned(16))) = { 1, 2 };
    u64 value = 40, added = 2;
    u8 equal;
    asm volatile("lock xaddq %0, %1" : "+r"(added), "+m"(value));
    check("integer: lock xadd", added == 40 && value == 42);
    asm volatile("lock cmpxchg16b %1; sete %0" : "=q"(equal), "+m"(pair)
                 : "a"(1ul), "d"(2ul), "b"(3ul), "c"(4ul));
    check("integer: lock cmpxchg16b", equal && pair[0] == 3 && pair[1] == 4);
}

static void code(void)
{
    static u8 body[] = { 0xb8, 1, 0, 0, 0, 0xc3 };  /* mov $1, %eax; ret */
    int (*function)(void) = (int (*)(void))body;
    int first = function();
    body[1] = 2;
    asm volatile("cpuid" : : "a"(0) : "rbx", "rcx", "rdx", "memory");
    check("integer: code that is changed", first == 1 && function() == 2);
}

void test_integer(void)
{
    arithmetic();
    strings();
    atomics();
    code();
}
