/* What the kernel does, in order; console and verdicts. */
#include "kernel.h"

int failures;

static const char *command_line(void)
{
    u32 *information = (u32 *)(u64)boot_information;
    return information[0] & 4 ? (const char *)(u64)information[4] : "";
}

void print(const char *text)
{
    while (*text) {
        while (!(inb(0x3fd) & 0x20))
            ;
        outb(0x3f8, *text++);
    }
}

void print_number(u64 value)
{
    char digits[19] = "0x";
    int at = 2, shift = 60;
    while (shift && !(value >> shift))
        shift -= 4;
    for (; shift >= 0; shift -= 4)
        digits[at++] = "0123456789abcdef"[value >> shift & 15];
    digits[at] = 0;
    print(digits);
}

void check(const char *what, int passed)
{
    failures += !passed;
    print(passed ? "PASS: " : "FAIL: ");
    print(what);
    print("\n");
}

void check_equal(const char *what, u64 got, u64 wanted)
{
    check(what, got == wanted);
    if (got != wanted) {
        print("      got ");
        print_number(got);
        print(", want ");
        print_number(wanted);
        print("\n");
    }
}

void check_fault(const char *what, u64 vector, u64 error)
{
    check_equal(what, caught.vector << 32 | caught.error, vector << 32 | error);
}

int said(const char *option)
{
    const char *line = command_line();
    for (; *line; line++) {
        int n = 0;
        while (option[n] && line[n] == option[n])
            n++;
        if (!option[n] && (!line[n] || line[n] == ' '))
            return 1;
    }
    return 0;
}

static void boot_test(void)
{
    u32 *information = (u32 *)(u64)boot_information;
    check_equal("boot: magic", boot_magic, 0x2badb002);
    check_equal("boot: flags memory, command line", information[0] & 5, 5);
    check("boot: at least 15 MiB above 1 MiB", information[2] >= 15 << 10);
    check_equal("boot: 32-bit #UD through a 32-bit gate", undefined_seen, 1);
    if (information[0] & 0x40) {
        u64 usable = 0;
        u8 *at = (u8 *)(u64)information[12], *stop = at + information[11];
        for (; at < stop; at += *(u32 *)at + 4)
            if (*(u32 *)(at + 20) == 1)
                usable += *(u64 *)(at + 12);
        check("boot: memory map", usable >> 10 >= information[2]);
    }
}

static const struct { const char *skip; void (*run)(void); } tests[] = {
    { "skip=boot", boot_test },
    { "skip=integer", test_integer },
    { "skip=faults", test_faults },
    { "skip=paging", test_paging },
    { "skip=io", test_io },
    { "skip=mmio", test_mmio },
    { "skip=interrupts", test_interrupts },
    { "skip=sse", test_sse },
    { "skip=x87", test_x87 },
    { "skip=user", test_user },
};

void kernel_main(void)
{
    setup_traps();
    for (unsigned n = 0; n < sizeof tests / sizeof *tests; n++)
        if (!said(tests[n].skip))
            tests[n].run();
    print(failures ? "SUMMARY: failures: " : "SUMMARY: all passed, failures: ");
    print_number(failures);
    print("\n");
    outl(0xf4, failures != 0);
    print("no isa-debug-exit\n");
}
