/* Page tables: rights, error codes, CR2, accessed and dirty bits, what a TLB may keep. */
#include "kernel.h"

#define WINDOW 0x100000000000ul
#define PRESENT 1ul
#define WRITABLE 2ul
#define USER 4ul
#define ACCESSED 0x20ul
#define DIRTY 0x40ul
#define NX (1ul << 63)

static u8 first[4096] __attribute__((aligned(4096))), second[4096] __attribute__((aligned(4096)));

static void check_page_fault(const char *what, u64 error, u64 address)
{
    check_fault(what, PF, error);
    check_equal("paging: ... and CR2", caught.address, address);
}

static void rights(void)
{
    FAULT("mov (%0), %%al", : : "r"(WINDOW + 5) : "rax");
    check_page_fault("paging: read of nothing", 0, WINDOW + 5);
    FAULT("movb $1, (%0)", : : "r"(WINDOW + 6) : "memory");
    check_page_fault("paging: write to nothing", 2, WINDOW + 6);
    map(WINDOW, (u64)first, PRESENT);
    FAULT("mov (%0), %%al", : : "r"(WINDOW) : "rax");
    check_fault("paging: read of a read-only page is fine", NONE, 0);
    FAULT("movb $1, (%0)", : : "r"(WINDOW + 7) : "memory");
    check_page_fault("paging: write to a read-only page, CR0.WP", 3, WINDOW + 7);
    write_cr0(read_cr0() & ~0x10000ul);
    FAULT("movb $1, (%0)", : : "r"(WINDOW + 7) : "memory");
    check_fault("paging: the same without CR0.WP is fine", NONE, 0);
    write_cr0(read_cr0() | 0x10000);
    FAULT("movb $1, (%0)", : : "r"(WINDOW + 7) : "memory");
    check_page_fault("paging: and with it again", 3, WINDOW + 7);
    if (said("skip=strict"))
        return;
    map(WINDOW, (u64)first, PRESENT | WRITABLE | 1ul << 51);
    FAULT("mov (%0), %%al", : : "r"(WINDOW + 9) : "rax");
    check_page_fault("paging: a reserved bit", 9, WINDOW + 9);
}

static void execution(void)
{
    first[0] = 0xc3;
    map(WINDOW, (u64)first, PRESENT | WRITABLE);
    FAULT("call *%0", : : "r"(WINDOW));
    check_fault("paging: code in a writable page is fine", NONE, 0);
    map(WINDOW, (u64)first, PRESENT | WRITABLE | NX);
    FAULT("call *%0", : : "r"(WINDOW));
    check_page_fault("paging: code in a page with NX", 0x11, WINDOW);
}

static void bits(void)
{
    map(WINDOW, (u64)first, PRESENT | WRITABLE);
    u64 *entry = page_entry(WINDOW);
    check_equal("paging: a fresh entry", *entry & (ACCESSED | DIRTY), 0);
    (void)*(volatile u8 *)WINDOW;
    check_equal("paging: a read sets accessed", *entry & (ACCESSED | DIRTY), ACCESSED);
    *(volatile u8 *)WINDOW = 1;
    check_equal("paging: a write sets dirty", *entry & (ACCESSED | DIRTY), ACCESSED | DIRTY);
}

static void moving(void)
{
    volatile u32 *word = (volatile u32 *)(WINDOW + 64);
    map(WINDOW, (u64)first, PRESENT | WRITABLE);
    *word = 1;
    map(WINDOW, (u64)second, PRESENT | WRITABLE);
    *word = 2;
    check("paging: another page after invlpg", *(u32 *)(first + 64) == 1 && *(u32 *)(second + 64) == 2);
    map(WINDOW, (u64)first, PRESENT | WRITABLE);
    map(WINDOW + 4096, (u64)second, PRESENT | WRITABLE);
    *(volatile u64 *)(WINDOW + 4092) = 0x1122334455667788;
    check("paging: a store across two pages",
          *(u32 *)(first + 4092) == 0x55667788 && *(u32 *)second == 0x11223344);
    map(WINDOW + 4096, 0, 0);
    *(u32 *)(first + 4092) = 0;
    FAULT("movq $-1, (%0)", : : "r"(WINDOW + 4092) : "memory");
    check_page_fault("paging: a store into the second page that is not there", 2, WINDOW + 4096);
    if (!said("skip=split"))
        check_equal("paging: ... wrote nothing to the first", *(u32 *)(first + 4092), 0);
}

void test_paging(void)
{
    rights();
    execution();
    bits();
    moving();
}
