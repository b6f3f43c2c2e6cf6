/* Interrupts: local APIC, PIC, PIT; when they are taken and when not. */
#include "kernel.h"

#define APIC 0xfee00000ul
#define VECTOR 0x51
#define LATE_VECTOR 0x61
#define TIMER_VECTOR 0x41
#define PIC_VECTOR 0x20

static volatile u32 taken, late, ticks, order;
static volatile u64 taken_rip;

static u32 apic(u32 offset) { return *(volatile u32 *)(APIC + offset); }
static void set_apic(u32 offset, u32 value) { *(volatile u32 *)(APIC + offset) = value; }

static void on_vector(struct frame *frame)
{
    taken++;
    taken_rip = frame->rip;
    order = order << 4 | 1;
    set_apic(0xb0, 0);
}

static void on_late(struct frame *frame)
{
    (void)frame;
    late++;
    order = order << 4 | 2;
    set_apic(0xb0, 0);
}

static void on_timer(struct frame *frame) { (void)frame; ticks++; set_apic(0xb0, 0); }

static void on_pic(struct frame *frame)
{
    ticks++;
    if (frame->vector >= PIC_VECTOR + 8)
        outb(0xa0, 0x20);
    outb(0x20, 0x20);
}

/* An interrupt to this processor itself. */
static void send(u32 vector) { set_apic(0x310, 0); set_apic(0x300, 0x40000 | vector); }

static void start_pics(void)
{
    outb(0x4d0, 0);                                         /* all lines by their edges */
    outb(0x4d1, 0);
    outb(0x20, 0x11); outb(0x21, PIC_VECTOR); outb(0x21, 4); outb(0x21, 1);
    outb(0xa0, 0x11); outb(0xa1, PIC_VECTOR + 8); outb(0xa1, 2); outb(0xa1, 1);
    outb(0x21, 0xff);
    outb(0xa1, 0xff);
    for (int line = 0; line < 16; line++)
        handlers[PIC_VECTOR + line] = on_pic;
}

static void identity(void)
{
    u32 eax = 1, ebx, ecx, edx;
    asm volatile("cpuid" : "+a"(eax), "=b"(ebx), "=c"(ecx), "=d"(edx));
    check("interrupts: CPUID shows an APIC", edx >> 9 & 1);
    check_equal("interrupts: APIC base", rdmsr(0x1b) & ~0xfful, 0xfee00900 & ~0xfful);
    check_equal("interrupts: APIC id", apic(0x20) >> 24, ebx >> 24);
    check_equal("interrupts: APIC version", apic(0x30) & 0xff, 0x14);
    check("interrupts: at least 5 local vectors", (apic(0x30) >> 16 & 0xff) >= 4);
    set_apic(0xf0, 0x1ff);
    check_equal("interrupts: APIC enabled", apic(0xf0) & 0x1ff, 0x1ff);
}

/* Some machines are late; see skip=window. */
static void wait_for(volatile u32 *counter, u32 wanted)
{
    for (u32 n = 0; n < 1000000 && *counter != wanted; n++)
        ;
}

/* Let everything in that is pending; an access to the APIC lets every machine look. */
static void drain(void)
{
    for (int n = 0; n < 4; n++) {
        asm volatile("sti; nop");
        apic(0x20);
        asm volatile("cli");
    }
    taken = late = order = 0;
}

static void flag(void)
{
    handlers[VECTOR] = on_vector;
    handlers[LATE_VECTOR] = on_late;
    drain();
    send(VECTOR);
    asm volatile("nop; nop");
    check_equal("interrupts: none with IF = 0", taken, 0);
    check_equal("interrupts: IRR shows the request", apic(0x200 + (VECTOR / 32) * 16), 1u << VECTOR % 32);
    asm volatile("sti; cli");
    check_equal("interrupts: none behind STI", taken, 0);
    asm volatile("sti; hlt; cli");
    check_equal("interrupts: HLT ends", taken, 1);
    check_equal("interrupts: IRR is empty again", apic(0x200 + (VECTOR / 32) * 16), 0);
    check_equal("interrupts: and ISR", apic(0x100 + (VECTOR / 32) * 16), 0);
    asm volatile("sti");
    send(VECTOR);
    wait_for(&taken, 2);
    asm volatile("cli");
    check_equal("interrupts: one to itself with IF = 1", taken, 2);
}

/* Interrupts come in the very instruction that the manual says. */
static void window(void)
{
    drain();
    send(VECTOR);
    asm volatile("sti; nop; cli");
    check_equal("interrupts: one instruction after STI", taken, 1);
    drain();
    send(VECTOR);
    asm volatile("pushfq; orq $0x200, (%%rsp); popfq; cli" : : : "memory");
    check_equal("interrupts: POPF lets one in at once", taken, 1);
}

static void priority(void)
{
    drain();
    send(VECTOR);
    send(LATE_VECTOR);
    asm volatile("sti; hlt");
    wait_for(&taken, 1);
    asm volatile("cli");
    check_equal("interrupts: the higher vector goes first", order, 0x21);
    drain();
    asm volatile("mov %0, %%cr8" : : "r"(VECTOR >> 4 & 15ul));
    check_equal("interrupts: CR8 is the task priority", apic(0x80), VECTOR & 0xf0);
    send(VECTOR);
    send(LATE_VECTOR);
    asm volatile("sti; hlt; nop");
    apic(0x20);
    asm volatile("cli");
    check("interrupts: task priority holds the lower back", taken == 0 && late == 1);
    set_apic(0x80, 0);
    asm volatile("sti; hlt; cli");
    check_equal("interrupts: until it is lowered", taken, 1);
}

static void apic_timer(void)
{
    handlers[TIMER_VECTOR] = on_timer;
    ticks = 0;
    set_apic(0x3e0, 0xb);
    set_apic(0x320, TIMER_VECTOR);
    set_apic(0x380, 2000000000);
    check("interrupts: APIC timer counts", apic(0x390) <= 2000000000 && apic(0x390) > 0);
    set_apic(0x380, 2000000);
    asm volatile("sti; hlt; cli");
    check_equal("interrupts: APIC timer, one shot, ends HLT", ticks, 1);
    check_equal("interrupts: and has stopped", apic(0x390), 0);
    set_apic(0x320, 0x20000 | TIMER_VECTOR);
    set_apic(0x380, 50000000);
    asm volatile("sti");
    while (ticks < 4)
        ;
    asm volatile("cli");
    check("interrupts: APIC timer, periodic, while a loop runs", ticks >= 4);
    set_apic(0x380, 0);
    set_apic(0x320, 0x10000);
    drain();                                                /* one may have come meanwhile */
}

static void pics(void)
{
    check_equal("interrupts: PIC mask", inb(0x21), 0xff);
    set_apic(0x350, 0x700);
    ticks = 0;
    outb(0x2005, 1);
    asm volatile("sti; nop; nop; cli");
    apic(0x20);
    check_equal("interrupts: masked line 5", ticks, 0);
    outb(0x20, 0x0a);
    check_equal("interrupts: IRR of the PIC", inb(0x20) & 0x20, 0x20);
    outb(0x21, 0xdf);
    asm volatile("sti; hlt; cli");
    check_equal("interrupts: line 5, unmasked", ticks, 1);
    outb(0x2005, 0);
    outb(0x21, 0xfb);
    outb(0xa1, 0xfb);
    outb(0x200a, 1);
    asm volatile("sti; hlt; cli");
    check_equal("interrupts: line 10 by way of the second PIC", ticks, 2);
    outb(0x200a, 0);
    outb(0x20, 0x0b);
    check_equal("interrupts: none in service", inb(0x20), 0);
}

static void pit(void)
{
    ticks = 0;
    outb(0xa1, 0xff);
    outb(0x21, 0xfe);
    outb(0x43, 0x34);
    outb(0x40, 0x9c);
    outb(0x40, 0x2e);                                       /* 11932: a hundred times a second */
    for (int n = 0; n < 3; n++)
        asm volatile("sti; hlt; cli");
    check("interrupts: PIT ends HLT", ticks >= 3);
    outb(0x21, 0xff);
    outb(0x43, 0x30);
    outb(0x40, 1);
    outb(0x40, 0);
}

static void speaker(void)
{
    u64 before = rdtsc();
    outb(0x61, (inb(0x61) & ~2) | 1);
    outb(0x43, 0xb0);
    outb(0x42, 0x39);
    outb(0x42, 0x30);       /* 12345: 10 ms */
    check("interrupts: PIT channel 2, output low", !(inb(0x61) & 0x20));
    while (!(inb(0x61) & 0x20))
        ;
    check("interrupts: PIT channel 2, output high; the TSC went on", rdtsc() > before);
    outb(0x61, inb(0x61) & ~3);
}

void test_interrupts(void)
{
    start_pics();
    identity();
    flag();
    if (!said("skip=window"))
        window();
    priority();
    apic_timer();
    if (!said("skip=pic")) {
        pics();
        pit();
        speaker();
    }
}
