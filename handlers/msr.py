"""Model-specific registers, SWAPGS, and the fast system calls, as the processor defines them.

Sources: SDM Vol. 4, table 2-2; Vol. 2, RDMSR, WRMSR, SYSCALL, SYSRET, SYSENTER, SYSEXIT.

An MSR that is not here goes to ``cpu.services["msr"]``, a function ``(index, value)`` with value
None for a read. It answers with the value read, with a verdict (such as an exit to the caller), or
with None: #GP(0), as without such a function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias, cast

from sandbox.cpu import GP, UD, Cpu, Fault, is_canonical
from sandbox.decode import Insn
from sandbox.handler import Decline, Exit, Inject, Resume, Verdict, handler
from sandbox.registers import IF, RAX, RCX, RDX, RF, RSP, VM, Segment
from sandbox.sources import Clock, HostClock

_LOW = 0xFFFF_FFFF
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF

TSC, APIC_BASE, MISC_ENABLE, PAT, XSS, TSC_AUX = 0x10, 0x1B, 0x1A0, 0x277, 0xDA0, 0xC000_0103
EFER, STAR = 0xC000_0080, 0xC000_0081
EFER_SCE, EFER_LME, EFER_LMA, EFER_NXE = 1, 1 << 8, 1 << 10, 1 << 11
_EFER_BITS = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE
CR0_PE, CR0_PG = 1, 1 << 31
R11 = 11

BANK_MSRS: Final = {
    0x174: "sysenter_cs", 0x175: "sysenter_esp", 0x176: "sysenter_eip",
    EFER: "efer", STAR: "star", 0xC000_0082: "lstar", 0xC000_0083: "cstar", 0xC000_0084: "fmask",
    0xC000_0100: "fs_base", 0xC000_0101: "gs_base", 0xC000_0102: "kernel_gs_base",
}  # fmt: skip
"""MSRs that are registers of the bank."""
RESET_VALUES: Final = {
    TSC: 0, APIC_BASE: 0xFEE0_0900, MISC_ENABLE: 1, PAT: 0x0007_0406_0007_0406, XSS: 0, TSC_AUX: 0,
}  # fmt: skip
"""MSRs that are kept here; the TSC as what is added to the clock."""
_CANONICAL: Final = frozenset(
    "sysenter_esp sysenter_eip lstar cstar fs_base gs_base kernel_gs_base".split()
)
_NARROW: Final = frozenset(("sysenter_cs", "fmask"))
_MEMORY_TYPES: Final = frozenset((0, 1, 4, 5, 6, 7))

Hook: TypeAlias = Callable[[int, int | None], int | Verdict | None]


def msr_values(cpu: Cpu) -> dict[int, int]:
    """The MSRs of a vCPU that are no registers of its bank, by index."""
    found = cpu.services.get("msr_values")
    if found is None:
        found = cpu.services["msr_values"] = dict(RESET_VALUES)
    return cast("dict[int, int]", found)


def clock_of(cpu: Cpu) -> Clock:
    """The vCPU's clock; the host's if nobody gave it one."""
    found = cpu.services.get("clock")
    if found is None:
        found = cpu.services["clock"] = HostClock()
    return cast("Clock", found)


@handler("rdmsr")
def rdmsr(cpu: Cpu, insn: Insn) -> Verdict | None:
    if cpu.cpl:
        raise Fault(GP, 0)
    index = cpu.gpr[RCX] & _LOW
    if index in BANK_MSRS:
        value = cpu.registers.bank.read(BANK_MSRS[index])
    elif index == TSC:
        value = (clock_of(cpu).tsc() + msr_values(cpu)[TSC]) & _MASK64
    elif index in RESET_VALUES:
        value = msr_values(cpu)[index]
    else:
        answer = _ask_hook(cpu, index, None)
        if not isinstance(answer, int):
            return answer
        value = answer
    cpu.gpr[RAX], cpu.gpr[RDX] = value & _LOW, value >> 32
    return None


@handler("wrmsr", "wrmsrns")
def wrmsr(cpu: Cpu, insn: Insn) -> Verdict | None:
    if cpu.cpl:
        raise Fault(GP, 0)
    index = cpu.gpr[RCX] & _LOW
    value = cpu.gpr[RAX] & _LOW | (cpu.gpr[RDX] & _LOW) << 32
    if index == EFER:
        _write_efer(cpu, value)
    elif index in BANK_MSRS:
        name = BANK_MSRS[index]
        if name in _CANONICAL and not is_canonical(value):
            raise Fault(GP, 0)
        cpu.registers.bank.write(name, value & _LOW if name in _NARROW else value)
    elif index in RESET_VALUES:
        _write_own(cpu, index, value)
    else:
        answer = _ask_hook(cpu, index, value)
        return None if isinstance(answer, int) else answer
    return None


def _ask_hook(cpu: Cpu, index: int, value: int | None) -> int | Verdict:
    hook: Hook | None = cpu.services.get("msr")
    answer = hook(index, value) if hook else None
    if answer is None:
        raise Fault(GP, 0)
    assert isinstance(answer, (int, Resume, Inject, Decline, Exit))
    return answer


def _write_efer(cpu: Cpu, value: int) -> None:
    """LME cannot change while paging is on; LMA is not the guest's to write."""
    bank = cpu.registers.bank
    old = bank.read("efer")
    if value & ~_EFER_BITS or ((value ^ old) & EFER_LME and bank.read("cr0") & CR0_PG):
        raise Fault(GP, 0)
    bank.write("efer", value & ~EFER_LMA | old & EFER_LMA)


def _write_own(cpu: Cpu, index: int, value: int) -> None:
    values = msr_values(cpu)
    if index == TSC:
        value = (value - clock_of(cpu).tsc()) & _MASK64
    elif index == PAT:
        if not _MEMORY_TYPES.issuperset(value.to_bytes(8, "little")):
            raise Fault(GP, 0)
    elif (index == TSC_AUX and value >> 32) or (index == XSS and value):
        raise Fault(GP, 0)  # there are no supervisor state components
    values[index] = value


@handler("swapgs")
def swapgs(cpu: Cpu, insn: Insn) -> None:
    if cpu.bitness != 64:
        raise Fault(UD)
    if cpu.cpl:
        raise Fault(GP, 0)
    bank = cpu.registers.bank
    inner = bank.read("kernel_gs_base")
    bank.write("kernel_gs_base", bank.read("gs_base"))
    bank.write("gs_base", inner)


# Fast system calls


def flat_code(selector: int, dpl: int, long_mode: bool) -> Segment:
    """CS as the fast system calls load it, without looking at a descriptor."""
    flag = int(long_mode)
    return Segment(selector, 0, _LOW, type=11, s=1, dpl=dpl, present=1, l=flag, db=1 - flag, g=1)


def flat_stack(selector: int, dpl: int) -> Segment:
    return Segment(selector, 0, _LOW, type=3, s=1, dpl=dpl, present=1, db=1, g=1)


def _check_syscall(cpu: Cpu) -> None:
    if cpu.bitness != 64 or not cpu.registers.bank.read("efer") & EFER_SCE:
        raise Fault(UD)


def _enter_ring(cpu: Cpu, cs: Segment, ss_selector: int) -> None:
    bank = cpu.registers.bank
    bank.write_segment("cs", cs)
    bank.write_segment("ss", flat_stack(ss_selector, cs.dpl))


@handler("syscall")
def syscall(cpu: Cpu, insn: Insn) -> Verdict | None:
    """Into the kernel at LSTAR; the return address goes to RCX, RFLAGS to R11."""
    if "linux" in cpu.services:  # the kernel is the pack linux, not code in the guest
        return Decline()
    _check_syscall(cpu)
    read = cpu.registers.bank.read
    flags, selector = cpu.rflags, read("star") >> 32 & 0xFFFC
    cpu.gpr[RCX] = (cpu.rip + insn.length) & _MASK64
    cpu.gpr[R11] = flags & ~RF
    cpu.rflags = flags & ~(read("fmask") | RF) | 2
    _enter_ring(cpu, flat_code(selector, 0, True), selector + 8)
    return Resume(read("lstar"))


@handler("sysret", "sysretq")
def sysret(cpu: Cpu, insn: Insn) -> Verdict | None:
    """Back to CPL 3: with REX.W to 64-bit code at RCX, else to 32-bit code at ECX."""
    _check_syscall(cpu)
    wide = insn.mnemonic == "sysretq"
    target = cpu.gpr[RCX] if wide else cpu.gpr[RCX] & _LOW
    if cpu.cpl or not is_canonical(target):
        raise Fault(GP, 0)
    base = cpu.registers.bank.read("star") >> 48
    cpu.rflags = cpu.gpr[R11] & 0x3C_7FD7 | 2
    _enter_ring(cpu, flat_code((base + 16 if wide else base) | 3, 3, wide), (base + 8) | 3)
    return Resume(target)


@handler("sysenter")
def sysenter(cpu: Cpu, insn: Insn) -> Verdict | None:
    bank = cpu.registers.bank
    selector = bank.read("sysenter_cs") & 0xFFFC
    if not bank.read("cr0") & CR0_PE or not selector:
        raise Fault(GP, 0)
    long_mode = bool(bank.read("efer") & EFER_LMA)
    mask = _MASK64 if long_mode else _LOW
    cpu.rflags &= ~(VM | IF | RF)
    _enter_ring(cpu, flat_code(selector, 0, long_mode), selector + 8)
    cpu.gpr[RSP] = bank.read("sysenter_esp") & mask
    return Resume(bank.read("sysenter_eip") & mask)


@handler("sysexit", "sysexitq")
def sysexit(cpu: Cpu, insn: Insn) -> Verdict | None:
    """Back to CPL 3 at RDX with the stack at RCX."""
    bank = cpu.registers.bank
    wide = insn.mnemonic == "sysexitq"
    selector = bank.read("sysenter_cs") & 0xFFFC
    mask = _MASK64 if wide else _LOW
    target, stack = cpu.gpr[RDX] & mask, cpu.gpr[RCX] & mask
    allowed = bank.read("cr0") & CR0_PE and selector and not cpu.cpl
    if not allowed or not is_canonical(target) or not is_canonical(stack):
        raise Fault(GP, 0)
    cs = flat_code((selector + (32 if wide else 16)) | 3, 3, wide)
    _enter_ring(cpu, cs, cs.selector + 8)
    cpu.gpr[RSP] = stack
    return Resume(target)
