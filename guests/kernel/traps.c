/* IDT, TSS, page tables; exceptions that tests provoke. */
#include "kernel.h"

volatile struct caught caught;
volatile u64 resume, resume_rsp;
void (*handlers[256])(struct frame *);

static u64 spare_tables[16][512] __attribute__((aligned(4096)));
static int spare_used;

void set_gate(int vector, int dpl, int ist)
{
    u64 target = (u64)stubs + vector * 16;
    idt[2 * vector] = (target & 0xffff) | (u64)CODE_64 << 16 | (u64)ist << 32
        | (u64)(0x8e | dpl << 5) << 40 | (target >> 16 & 0xffff) << 48;
    idt[2 * vector + 1] = target >> 32;
}

void setup_traps(void)
{
    u64 base = (u64)tss;
    for (int vector = 0; vector < 256; vector++)
        set_gate(vector, 0, 0);
    set_gate(BP, 3, 0);
    set_gate(DF, 0, 1);
    *(u64 *)(tss + 4) = (u64)stack_top;
    *(u64 *)(tss + 36) = (u64)fault_stack_top;
    *(u16 *)(tss + 102) = TSS_BYTES;
    gdt[8] = (TSS_BYTES - 1) | (base & 0xffffff) << 16 | 0x89ul << 40 | (base >> 24 & 0xff) << 56;
    gdt[9] = base >> 32;
    asm volatile("ltr %w0" : : "r"(TSS));
}

void trap(struct frame *frame)
{
    u64 address;
    if (handlers[frame->vector]) {
        handlers[frame->vector](frame);
        return;
    }
    asm volatile("mov %%cr2, %0" : "=r"(address));
    if (!resume) {
        print("FAIL: unexpected exception ");
        print_number(frame->vector);
        print(" at ");
        print_number(frame->rip);
        print(" error ");
        print_number(frame->error);
        print(" cr2 ");
        print_number(address);
        print("\n");
        outl(0xf4, 1);
        for (;;)
            asm volatile("cli; hlt");
    }
    caught = (struct caught){ frame->vector, frame->error, address };
    frame->rip = resume;
    frame->rsp = resume_rsp;
    frame->rflags &= ~0x40000ul;
    resume = 0;
}

/* The 4 KiB entry for an address, page tables made as needed; a 2 MiB page is split. */
u64 *page_entry(u64 address)
{
    u64 *table = pml4;
    for (int shift = 39; shift > 12; shift -= 9) {
        u64 *entry = &table[address >> shift & 511];
        if (!(*entry & 1) || *entry & 0x80) {
            u64 *fresh = spare_tables[spare_used++], old = *entry;
            for (int n = 0; old & 0x80 && n < 512; n++)
                fresh[n] = (old & ~0x1fff80ul) + (u64)n * 4096;
            *entry = (u64)fresh | 7;
        } else {
            *entry |= 6;
        }
        table = (u64 *)(*entry & ~0xffful & 0xfffffffffffff);
    }
    return &table[address >> 12 & 511];
}

void map(u64 address, u64 physical, u64 flags)
{
    *page_entry(address) = physical | flags;
    invlpg(address);
}
