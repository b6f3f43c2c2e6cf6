/* Exceptions: vector, error code, and that execution goes on where the handler says. */
#include "kernel.h"

static void divide(void)
{
    FAULT("xor %%edx, %%edx; mov $1, %%eax; xor %%ecx, %%ecx; div %%ecx", : : : "rax", "rcx", "rdx");
    check_fault("faults: division by zero is #DE", DE, 0);
    FAULT("mov $1, %%edx; xor %%eax, %%eax; mov $1, %%ecx; div %%ecx", : : : "rax", "rcx", "rdx");
    check_fault("faults: quotient too large is #DE", DE, 0);
    FAULT("mov $0x80000000, %%eax; cdq; mov $-1, %%ecx; idiv %%ecx", : : : "rax", "rcx", "rdx");
    check_fault("faults: most negative by -1 is #DE", DE, 0);
}

static void instructions(void)
{
    FAULT("ud2", ::);
    check_fault("faults: ud2 is #UD", UD, 0);
    FAULT(".byte 0x06", ::);
    check_fault("faults: push es in 64-bit mode is #UD", UD, 0);
    FAULT(".byte 0xf0; nop; nop", ::);
    check_fault("faults: lock nop is #UD", UD, 0);
    FAULT("int3", ::);
    check_fault("faults: int3 is #BP", BP, 0);
    FAULT("int $0x60", ::);
    check_fault("faults: int 60h", 0x60, 0);
}

static void protection(void)
{
    FAULT("mov $0x8000000000000000, %%rax; mov (%%rax), %%rax", : : : "rax");
    check_fault("faults: non-canonical read is #GP", GP, 0);
    FAULT("mov $0x48, %%eax; mov %%eax, %%ds", : : : "rax");
    check_fault("faults: ds with a TSS's upper half is #GP(selector)", GP, 0x48);
    FAULT("mov $0x1008, %%eax; mov %%eax, %%es", : : : "rax");
    check_fault("faults: es beyond the GDT is #GP(selector)", GP, 0x1008);
    FAULT("xor %%eax, %%eax; mov %%eax, %%ss; xor %%eax, %%eax", : : : "rax");
    check_fault("faults: null ss at CPL 0 is fine", NONE, 0);
    asm volatile("mov %0, %%ss" : : "r"(DATA));
}

/* What emulators tend to leave out. */
static void strict(void)
{
    FAULT("mov %%rsp, %%rbx; mov $0x8000000000000000, %%rbp; mov (%%rbp), %%rax; mov %%rbx, %%rsp",
          : : : "rax", "rbx", "rbp");
    check_fault("faults: non-canonical stack read is #SS", SS, 0);
    FAULT("mov $0x12345678, %%ecx; rdmsr", : : : "rax", "rcx", "rdx");
    check_fault("faults: rdmsr of nothing is #GP", GP, 0);
    FAULT("mov %%cr0, %%rax; btr $0, %%rax; mov %%rax, %%cr0", : : : "rax");
    check_fault("faults: PG without PE is #GP", GP, 0);
    FAULT("mov $1, %%eax; mov %%rax, %%cr8; mov $16, %%eax; mov %%rax, %%cr8", : : : "rax");
    check_fault("faults: cr8 above 15 is #GP", GP, 0);
    asm volatile("mov %0, %%cr8" : : "r"(0ul));
}

static void gates(void)
{
    u64 keep = idt[2 * 0x61];
    idt[2 * 0x61] &= ~(1ul << 47);
    FAULT("int $0x61", ::);
    check_fault("faults: gate not present is #NP", NP, 0x61 * 8 + 2);
    idt[2 * 0x61] = keep & ~(0xful << 40);
    FAULT("int $0x61", ::);
    check_fault("faults: no gate is #GP", GP, 0x61 * 8 + 2);
    idt[2 * 0x61] = keep;
    idt[2 * UD] &= ~(1ul << 47);
    idt[2 * NP] &= ~(1ul << 47);
    FAULT("ud2", ::);
    check_fault("faults: #NP while #NP is delivered is #DF, on its own stack", DF, 0);
    idt[2 * UD] |= 1ul << 47;
    idt[2 * NP] |= 1ul << 47;
}

static void alignment(void)
{
    static u8 area[64] __attribute__((aligned(64)));
    FAULT("movaps 1(%0), %%xmm0", : : "r"(area) : "memory");
    check_fault("faults: misaligned movaps is #GP", GP, 0);
    FAULT("paddd 8(%0), %%xmm0", : : "r"(area) : "memory");
    check_fault("faults: misaligned paddd is #GP", GP, 0);
    FAULT("movups 1(%0), %%xmm0", : : "r"(area) : "memory");
    check_fault("faults: misaligned movups is fine", NONE, 0);
}

static void floats(void)
{
    u64 cr0 = read_cr0();
    u16 control = 0x37b;
    write_cr0(cr0 | 8);
    FAULT("fld1", ::);
    check_fault("faults: x87 with CR0.TS is #NM", NM, 0);
    FAULT("xorps %%xmm0, %%xmm0", ::);
    check_fault("faults: SSE with CR0.TS is #NM", NM, 0);
    asm volatile("clts");
    FAULT("xorps %%xmm0, %%xmm0", ::);
    check_fault("faults: SSE after clts is fine", NONE, 0);
    write_cr0((cr0 & ~2ul) | 4);
    FAULT("xorps %%xmm0, %%xmm0", ::);
    check_fault("faults: SSE with CR0.EM is #UD", UD, 0);
    write_cr0(cr0);
    write_cr4(read_cr4() & ~0x200ul);
    FAULT("addps %%xmm0, %%xmm0", ::);
    check_fault("faults: SSE without CR4.OSFXSR is #UD", UD, 0);
    write_cr4(read_cr4() | 0x200);
    FAULT("fldcw %0; fld1; fldz; fdivrp; fwait", : : "m"(control));
    check_fault("faults: unmasked x87 division by zero is #MF", MF, 0);
    asm volatile("fninit");
}

static void simd(void)
{
    u32 mxcsr = 0x1d80;
    FAULT("ldmxcsr %0; xorps %%xmm0, %%xmm0; mov $0x3f800000, %%eax; movd %%eax, %%xmm1; divss %%xmm0, %%xmm1",
          : : "m"(mxcsr) : "rax");
    check_fault("faults: unmasked SSE division by zero is #XM", XM, 0);
    mxcsr = 0x1f80;
    asm volatile("ldmxcsr %0" : : "m"(mxcsr));
}

void test_faults(void)
{
    divide();
    instructions();
    protection();
    if (!said("skip=strict")) {
        strict();
        gates();
        simd();
    }
    if (!said("skip=alignment"))
        alignment();
    floats();
}
