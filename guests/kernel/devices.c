/* IO ports and MMIO, by the test device: a register that keeps what is written, RAM behind exits. */
#include "kernel.h"

#define IORAM 0xff000000ul

static void ports(void)
{
    outl(0xe0, 0x12345678);
    check_equal("io: outl, inl", inl(0xe0), 0x12345678);
    outw(0xe0, 0xabcd);
    check_equal("io: outw, inw", inw(0xe0), 0xabcd);
    outb(0xe0, 0x5a);
    check_equal("io: outb, inb", inb(0xe0), 0x5a);
    u64 rax = ~0ul;
    asm volatile("inb $0xe0, %%al" : "+a"(rax));
    check_equal("io: inb keeps the rest of rax", rax, 0xffffffffffffff5a);
    asm volatile("inl $0xe0, %%eax" : "+a"(rax));
    check_equal("io: inl clears the upper half", rax >> 32, 0);
}

static void strings(void)
{
    static u8 in[16], out[16] = {'A', 'B', 'C', 'D', 'E', 'F', 'G', 'H', 'I', 'J', 'K', 'L', 'M', 'N', 'O', 'P'};
    struct string left = STRING("rep outsb", 0, 0xe0, 4, out, 0);
    check("io: rep outsb", !left.count && left.from == (u64)out + 4 && inb(0xe0) == 'D');
    left = STRING("rep insb", 0, 0xe0, 3, 0, in);
    check("io: rep insb", !left.count && left.to == (u64)in + 3 && in[0] == 'D' && in[2] == 'D' && !in[3]);
    left = STRING("std; rep outsw; cld", 0, 0xe0, 2, out + 8, 0);
    check("io: rep outsw backwards", left.from == (u64)out + 4 && inw(0xe0) == 'G' + ('H' << 8));
    outw(0x510, 0);
    STRING("rep insb", 0, 0x511, 4, 0, in);
    check("io: fw_cfg signature", in[0] == 'Q' && in[1] == 'E' && in[2] == 'M' && in[3] == 'U');
    outw(0x510, 5);
    check_equal("io: fw_cfg counts one CPU", inb(0x511) + (inb(0x511) << 8), 1);
    outw(0x510, 3);
    u64 size = 0;
    for (int n = 0; n < 8; n++)
        size |= (u64)inb(0x511) << 8 * n;
    check_equal("io: fw_cfg RAM size fits the boot information", size >> 20, (((u32 *)(u64)boot_information)[2] + 1024 + 1023) >> 10);
}

void test_io(void)
{
    ports();
    strings();
}

static void moves(void)
{
    volatile u8 *byte = (u8 *)IORAM;
    volatile u64 *quad = (u64 *)IORAM;
    u64 rax;
    *quad = 0x1122334455667788;
    check_equal("mmio: 8 bytes", *quad, 0x1122334455667788);
    check_equal("mmio: 1 byte of them", byte[6], 0x22);
    *(volatile u16 *)(byte + 2) = 0xaaaa;
    *(volatile u32 *)(byte + 4) = 0xbbbbbbbb;
    check_equal("mmio: 2 and 4 bytes", *quad, 0xbbbbbbbbaaaa7788);
    *quad = ~0ul;
    check_equal("mmio: not aligned", *(volatile u32 *)(byte + 5), 0xffffff);
    asm volatile("movzbl %1, %k0" : "=r"(rax) : "m"(byte[7]));
    check_equal("mmio: movzx", rax, 0xff);
    asm volatile("movsbq %1, %0" : "=r"(rax) : "m"(byte[7]));
    check_equal("mmio: movsx", rax, ~0ul);
}

static void operations(void)
{
    volatile u32 *word = (u32 *)(IORAM + 32);
    u32 flags, old = 7;
    *word = 0x0f;
    asm volatile("addl $1, %0" : "+m"(*word));
    check_equal("mmio: add", *word, 0x10);
    asm volatile("orl %1, %0" : "+m"(*word) : "r"(0x101));
    check_equal("mmio: or", *word, 0x111);
    asm volatile("notl %0; negl %0; lock incl %0" : "+m"(*word));
    check_equal("mmio: not, neg, lock inc", *word, 0x113);
    asm volatile("xchgl %1, %0" : "+m"(*word), "+r"(old));
    check("mmio: xchg", old == 0x113 && *word == 7);
    asm volatile("lock btsl $4, %0; sbb %1, %1" : "+m"(*word), "=r"(flags));
    check("mmio: lock bts", !flags && *word == 0x17);
    asm volatile("cmpl $0x17, %1; sete %b0; movzbl %b0, %0" : "=q"(flags) : "m"(*word));
    check_equal("mmio: cmp", flags, 1);
    asm volatile("shll $4, %0" : "+m"(*word));
    check_equal("mmio: shl", *word, 0x170);
    asm volatile("pushq %0; popq %1" : : "m"(*word), "m"(*(word + 2)) : "memory");
    check_equal("mmio: push, pop", *(word + 2), 0x170);
}

static void blocks(void)
{
    static u8 text[32] = "memory behind exits: a block", back[32];
    struct string left = STRING("rep movsb", 0, 0, 28, text, IORAM + 0x100);
    check("mmio: rep movsb to it", !left.count && left.to == IORAM + 0x100 + 28);
    STRING("rep movsl", 0, 0, 7, IORAM + 0x100, back);
    int same = 1;
    for (int n = 0; n < 28; n++)
        same &= text[n] == back[n];
    check("mmio: rep movsl from it", same);
    left = STRING("repe cmpsb", 0, 0, 32, text, IORAM + 0x100);
    check_equal("mmio: repe cmpsb over what is alike", left.count, 0);
    STRING("rep stosw", 0x4142, 0, 4, 0, IORAM + 0x102);
    check_equal("mmio: rep stosw", *(volatile u64 *)(IORAM + 0x102), 0x4142414241424142);
    left = STRING("repe cmpsb", 0, 0, 32, text, IORAM + 0x100);
    check_equal("mmio: repe cmpsb stops at the difference", left.count, 29);
}

static void vectors(void)
{
    static u64 in[2] __attribute__((aligned(16))) = { 0x1111222233334444, 0x5555666677778888 }, out[2];
    asm volatile("movups (%0), %%xmm1; movaps %%xmm1, (%1); movaps (%1), %%xmm2; movups %%xmm2, (%2)"
                 : : "r"(in), "r"(IORAM + 0x200), "r"(out) : "memory");
    check("mmio: movaps to and from", out[0] == in[0] && out[1] == in[1]);
    asm volatile("movdqa (%0), %%xmm3; movq %%xmm3, %1" : : "r"(IORAM + 0x200), "m"(out[1]) : "memory");
    check_equal("mmio: movdqa", out[1], in[0]);
}

void test_mmio(void)
{
    moves();
    operations();
    blocks();
    vectors();
}
