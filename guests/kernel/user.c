/* Code at CPL 3: rights, IO, gates, SYSCALL, the way back by an interrupt. */
#include "kernel.h"

#define CODE 0x200000000000ul
#define STACK 0x200000010000ul

static u8 code[4096] __attribute__((aligned(4096))), stack[4096] __attribute__((aligned(4096)));

/* INT3 ends the user code, and INT 80h; any other exception does too, with its vector. */
static void on_exit(struct frame *frame) { leave_user(frame->rax); }

static void on_exception(struct frame *frame)
{
    u64 address;
    asm volatile("mov %%cr2, %0" : "=r"(address));
    caught = (struct caught){ frame->vector, frame->error, address };
    caught.vector |= (frame->cs & 3) << 8;
    leave_user(~0ul);
}

#define RUN(text) ({ \
        u64 from_, size_; \
        asm volatile("jmp 2f; 1: " text "; int3; 2: lea 1b(%%rip), %0; mov $2b - 1b, %k1" \
                     : "=r"(from_), "=r"(size_)); \
        STRING("rep movsb", 0, 0, size_, from_, code); \
        caught.vector = NONE, caught.error = 0; \
        run_user((void *)CODE, (void *)(STACK + 4096)); })

static void system_call(void)
{
    wrmsr(0xc0000081, (u64)CODE_64 << 32 | (u64)0x2b << 48);
    wrmsr(0xc0000082, (u64)syscall_entry);
    wrmsr(0xc0000084, 0x200);
    check_equal("user: syscall and sysret", RUN("mov $21, %%eax; syscall"), 42);
}

void test_user(void)
{
    static const u8 vectors[] = { DE, DB, OF, UD, GP, PF, SS, AC, NP };
    for (unsigned n = 0; n < sizeof vectors; n++)
        handlers[vectors[n]] = on_exception;
    handlers[0x80] = handlers[BP] = on_exit;
    set_gate(0x80, 3, 0);
    map(CODE, (u64)code, 7);
    map(STACK, (u64)stack, 7 | 1ul << 63);
    check_equal("user: CPL 3", RUN("mov %%cs, %%eax; and $3, %%eax"), 3);
    check_equal("user: push and pop", RUN("mov $0x1234, %%eax; push %%rax; xor %%eax, %%eax; pop %%rax"), 0x1234);
    RUN("div %%ecx");
    check_fault("user: #DE", DE | 3 << 8, 0);
    RUN("ud2");
    check_fault("user: #UD", UD | 3 << 8, 0);
    RUN("hlt");
    check_fault("user: hlt is #GP", GP | 3 << 8, 0);
    RUN("cli");
    check_fault("user: cli is #GP", GP | 3 << 8, 0);
    RUN("mov %%cr0, %%rax");
    check_fault("user: mov from cr0 is #GP", GP | 3 << 8, 0);
    RUN("mov $0xe0, %%edx; in %%dx, %%al");
    check_fault("user: in without a permission bitmap is #GP", GP | 3 << 8, 0);
    if (!said("skip=int")) {
        check_equal("user: int 80h", RUN("mov $3, %%eax; int $0x80"), 3);
        RUN("int $0x50");
        if (!said("skip=strict"))
            check_fault("user: int through a gate of DPL 0 is #GP", GP | 3 << 8, 0x50 * 8 + 2);
    }
    RUN("mov 0x100000, %%al");
    check_fault("user: read of a kernel page is #PF", PF | 3 << 8, 5);
    check_equal("user: ... and CR2", caught.address, 0x100000);
    RUN("movb $0, 0x100000");
    check_fault("user: write to a kernel page is #PF", PF | 3 << 8, 7);
    RUN("lea -8(%%rsp), %%rax; movb $0xc3, (%%rax); jmp *%%rax");
    check_fault("user: code on a stack with NX is #PF", PF | 3 << 8, 0x15);
    if (!said("skip=syscall"))
        system_call();
    check_equal("user: sse", RUN("mov $5, %%eax; movd %%eax, %%xmm0; paddd %%xmm0, %%xmm0; movd %%xmm0, %%eax"), 10);
    check_equal("user: x87", RUN("pushq $9; fildq (%%rsp); fsqrt; fistpq (%%rsp); pop %%rax"), 3);
    for (unsigned n = 0; n < sizeof vectors; n++)
        handlers[vectors[n]] = 0;
    handlers[BP] = 0;
}
