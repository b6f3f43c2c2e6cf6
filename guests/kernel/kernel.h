/* A test kernel for machines that claim to run x86: it prints a line per test to the serial port.
 *
 * Status by isa-debug-exit: 1 if all tests passed, 3 if not. The command line leaves tests out:
 *   skip=SUBJECT   those whose lines begin with it: boot, integer, faults, paging, io, mmio,
 *                  interrupts, sse, x87, user
 *   skip=strict    what emulators tend to leave out: checks on operands, error codes, SIMD exceptions
 *   skip=flags     the exception flags of MXCSR
 *   skip=alignment misaligned SSE operands
 *   skip=window    in which instruction behind STI and POPF an interrupt comes
 *   skip=pic       PIC and PIT
 *   skip=split     a store across two pages of which one is not there changes neither
 *   skip=int, skip=syscall   these, from CPL 3
 */
#define CODE_32 0x08
#define DATA 0x10
#define CODE_64 0x18
#define USER_DATA 0x33
#define USER_CODE 0x3b
#define TSS 0x40
#define TSS_BYTES 104

#ifndef __ASSEMBLER__
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

enum { DE, DB, NMI, BP, OF, BR, UD, NM, DF, TS = 10, NP, SS, GP, PF, MF = 16, AC, MC, XM, NONE = 256 };

struct frame {
    u64 r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax;
    u64 vector, error, rip, cs, rflags, rsp, ss;
};

/* What the last FAULT() ran into. */
struct caught { u64 vector, error, address; };
extern volatile struct caught caught;
extern volatile u64 resume, resume_rsp;

/* Run instructions that may fault; afterwards caught.vector is the exception, or NONE. */
#define FAULT(code, ...) do { \
        caught.vector = NONE, caught.error = 0; \
        asm volatile("movq $77f, resume\n\tmovq %%rsp, resume_rsp\n\t" code "\n77:\tmovq $0, resume" __VA_ARGS__); \
    } while (0)

extern u64 pml4[512], idt[512], gdt[10];
extern u8 stubs[], stack_top[], fault_stack_top[], tss[], end[];
extern u32 boot_magic, boot_information, undefined_seen;
extern void (*handlers[256])(struct frame *);

u64 run_user(void *rip, void *rsp);
void leave_user(u64 value) __attribute__((noreturn));
void syscall_entry(void);

void print(const char *text);
void print_number(u64 value);
void check(const char *what, int passed);
void check_fault(const char *what, u64 vector, u64 error);
void check_equal(const char *what, u64 got, u64 wanted);
int said(const char *option);
extern int failures;

void set_gate(int vector, int dpl, int ist);
void setup_traps(void);
u64 *page_entry(u64 address);
void map(u64 address, u64 physical, u64 flags);

void test_faults(void);
void test_paging(void);
void test_user(void);
void test_io(void);
void test_mmio(void);
void test_interrupts(void);
void test_integer(void);
void test_sse(void);
void test_x87(void);

static inline void outb(u16 port, u8 value) { asm volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline void outw(u16 port, u16 value) { asm volatile("outw %0, %1" : : "a"(value), "Nd"(port)); }
static inline void outl(u16 port, u32 value) { asm volatile("outl %0, %1" : : "a"(value), "Nd"(port)); }
static inline u8 inb(u16 port) { u8 v; asm volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u16 inw(u16 port) { u16 v; asm volatile("inw %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u32 inl(u16 port) { u32 v; asm volatile("inl %1, %0" : "=a"(v) : "Nd"(port)); return v; }

/* A string instruction, with what it leaves in the count and index registers. */
struct string { u64 count, from, to; };
#define STRING(insn, RAX, RDX, COUNT, FROM, TO) ({ \
        struct string left_ = { COUNT, (u64)(FROM), (u64)(TO) }; \
        asm volatile(insn : "+c"(left_.count), "+S"(left_.from), "+D"(left_.to) \
                     : "a"(RAX), "d"(RDX) : "memory"); \
        left_; })

static inline u64 rdmsr(u32 index)
{
    u32 low, high;
    asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(index));
    return low | (u64)high << 32;
}

static inline void wrmsr(u32 index, u64 value)
{
    asm volatile("wrmsr" : : "c"(index), "a"((u32)value), "d"((u32)(value >> 32)));
}

static inline u64 rdtsc(void)
{
    u32 low, high;
    asm volatile("rdtsc" : "=a"(low), "=d"(high));
    return low | (u64)high << 32;
}

static inline u64 read_cr0(void) { u64 v; asm volatile("mov %%cr0, %0" : "=r"(v)); return v; }
static inline void write_cr0(u64 v) { asm volatile("mov %0, %%cr0" : : "r"(v) : "memory"); }
static inline u64 read_cr4(void) { u64 v; asm volatile("mov %%cr4, %0" : "=r"(v)); return v; }
static inline void write_cr4(u64 v) { asm volatile("mov %0, %%cr4" : : "r"(v) : "memory"); }
static inline void invlpg(u64 a) { asm volatile("invlpg (%0)" : : "r"(a) : "memory"); }
#endif
