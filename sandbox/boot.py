"""How guests start: a flat image in one of the three modes, or a Linux process.

The machine's own tables (page tables, GDT) live in slots of their own, high in physical memory,
where a guest that keeps to its RAM never meets them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

from sandbox.engine.protocol import EngineBank
from sandbox.errors import GuestImageError
from sandbox.memory import PAGE_MASK, PAGE_SIZE
from sandbox.paging import AddressSpace, FrameAllocator
from sandbox.registers import RSP, DescriptorTable, Segment
from sandbox.vcpu import Vcpu
from sandbox.vm import Vm

Mode: TypeAlias = Literal["real", "protected", "long"]

RAM_BYTES: Final = 64 << 20
STACK_BYTES: Final = 1 << 20
STACK_TOP: Final = 0x8000_0000
REAL_RAM_BYTES: Final = 1 << 20
REAL_STACK_SEGMENT: Final = 0x7000
TABLES_BASE: Final = 0x40_0000_0000
TABLES_BYTES: Final = 16 << 20
GDT_ADDRESS: Final = STACK_TOP

CODE_64 = Segment(0x08, 0, 0xFFFF_FFFF, type=11, s=1, dpl=0, present=1, l=1, db=0, g=1)
CODE_32 = replace(CODE_64, selector=0x18, l=0, db=1)
DATA = Segment(0x10, 0, 0xFFFF_FFFF, type=3, s=1, dpl=0, present=1, l=0, db=1, g=1)
USER_DATA = replace(DATA, selector=0x2B, dpl=3)
USER_CODE_64 = replace(CODE_64, selector=0x33, dpl=3)

_GDT: Final = b"".join(
    entry.to_bytes(8, "little")
    for entry in (
        0,
        0x00AF9B000000FFFF,  # 08 code, 64-bit
        0x00CF93000000FFFF,  # 10 data
        0x00CF9B000000FFFF,  # 18 code, 32-bit
        0x00CFFB000000FFFF,  # 20 user code, 32-bit
        0x00CFF3000000FFFF,  # 28 user data
        0x00AFFB000000FFFF,  # 30 user code, 64-bit
    )
)

CR0_PE, CR0_MP, CR0_ET, CR0_NE, CR0_WP, CR0_PG = 1, 2, 0x10, 0x20, 1 << 16, 1 << 31
CR4_PAE, CR4_OSFXSR, CR4_OSXMMEXCPT, CR4_FSGSBASE, CR4_OSXSAVE = (
    1 << 5, 1 << 9, 1 << 10, 1 << 16, 1 << 18,
)  # fmt: skip
EFER_SCE, EFER_LME, EFER_LMA, EFER_NXE = 1, 1 << 8, 1 << 10, 1 << 11
XCR0_X87, XCR0_SSE, XCR0_AVX = 1, 2, 4


@dataclass(slots=True)
class Machine:
    """A vCPU ready to run, with the page tables that the machine keeps for it."""

    vm: Vm
    vcpu: Vcpu
    frames: FrameAllocator | None = None
    space: AddressSpace | None = None
    status_of: Callable[[Any], tuple[int, str] | None] | None = None
    """What an end of the run that is no KVM exit means: exit status and a line for people."""


def reset(vm: Vm) -> Vcpu:
    """A vCPU whose x87, SSE and extended state are as after reset, FPU and SSE enabled."""
    vcpu = vm.create_vcpu()
    bank = vcpu.registers.bank
    bank.write("rflags", 2)
    bank.write("mxcsr", 0x1F80)
    bank.write("fpcw", 0x37F)
    bank.write("fptag", 0xFFFF)
    return vcpu


def _control(machine: Machine, cr0: int, cr4: int = 0) -> None:
    """Control registers for SSE and, where it is lit, AVX: as an operating system leaves them."""
    machine.vm.enable_xstate(XCR0_X87 | XCR0_SSE | XCR0_AVX)
    bank = machine.vcpu.registers.bank
    bank.write("cr4", cr4 | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE)
    bank.write("cr0", cr0 | CR0_MP | CR0_ET | CR0_NE)


def boot_flat(vm: Vm, code: bytes, base: int = 0x1000, mode: Mode = "long") -> Machine:
    """Load ``code`` at ``base`` and start there: CPL 0, flat segments, RSP at the top of a stack.

    long: 64-bit, identity-mapped page tables, the image executable and writable, all other RAM
    not executable. protected: 32-bit, paging off. real: 16-bit, CS = 0, SS:SP = 7000:0000.
    """
    if not code:
        raise GuestImageError("the guest image is empty")
    limit = REAL_RAM_BYTES if mode == "real" else RAM_BYTES
    end = base + len(code)
    if base < 0 or end > limit:
        raise GuestImageError(
            f"the image ({len(code)} bytes at {base:#x}) does not fit into the guest's "
            f"{limit:#x} bytes of RAM; choose another base"
        )
    vm.add_memory(0, limit)
    vm.memory.load(base, code)
    machine = Machine(vm, reset(vm))
    {"real": _start_real, "protected": _start_protected, "long": _start_long}[mode](
        machine, base, end
    )
    machine.vcpu.registers.rip = base
    return machine


def _start_real(machine: Machine, _base: int, _end: int) -> None:
    vcpu = machine.vcpu
    bank = _bank(machine)
    bank.leave_long_mode()
    _control(machine, 0)
    bank.write("cr0", CR0_ET)
    for name in ("cs", "ds", "es", "fs", "gs"):
        bank.write_segment(name, Segment(type=11 if name == "cs" else 3))
    stack = Segment(REAL_STACK_SEGMENT, REAL_STACK_SEGMENT << 4)
    bank.write_segment("ss", stack)
    bank.write_table("gdtr", DescriptorTable(0, 0xFFFF))
    bank.write_table("idtr", DescriptorTable(0, 0x3FF))
    vcpu.registers.gpr[RSP] = 0


def _add_gdt(machine: Machine) -> None:
    machine.vm.add_memory(STACK_TOP - STACK_BYTES, STACK_BYTES + PAGE_SIZE)
    machine.vm.memory.load(GDT_ADDRESS, _GDT)
    bank = _bank(machine)
    bank.write_table("gdtr", DescriptorTable(GDT_ADDRESS, len(_GDT) - 1))
    bank.write_table("idtr", DescriptorTable(0, 0))
    machine.vcpu.registers.gpr[RSP] = STACK_TOP


def _start_protected(machine: Machine, _base: int, _end: int) -> None:
    _add_gdt(machine)
    bank = _bank(machine)
    bank.leave_long_mode()
    _control(machine, CR0_PE)
    bank.write_segment("cs", CODE_32)
    for name in ("ss", "ds", "es", "fs", "gs"):
        bank.write_segment(name, DATA)


def _start_long(machine: Machine, base: int, end: int) -> None:
    _add_gdt(machine)
    space = make_space(machine)
    space.map(0, 0, RAM_BYTES, write=True, execute=False)
    image = base & ~PAGE_MASK
    space.map(image, image, end - image, write=True, execute=True)
    stack = STACK_TOP - STACK_BYTES
    space.map(stack, stack, STACK_BYTES + PAGE_SIZE, write=True, execute=False)
    enter_long_mode(machine, space)
    bank = _bank(machine)
    bank.write_segment("cs", CODE_64)
    for name in ("ss", "ds", "es", "fs", "gs"):
        bank.write_segment(name, DATA)


def make_space(machine: Machine) -> AddressSpace:
    """Page tables in memory of the machine's own, empty."""
    machine.vm.add_memory(TABLES_BASE, TABLES_BYTES)
    frames = FrameAllocator(machine.vm.memory, TABLES_BASE, TABLES_BYTES)
    space = AddressSpace(machine.vm.memory, frames, machine.vm.engine.flush_translations)
    machine.space = space
    return space


def enter_long_mode(machine: Machine, space: AddressSpace) -> None:
    """Turn on 4-level paging with ``space`` and the no-execute bit."""
    bank = _bank(machine)
    bank.write("cr3", space.root)
    machine.vm.engine.trust(space)
    bank.write("efer", EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE)
    _control(machine, CR0_PE | CR0_WP | CR0_PG, CR4_PAE | CR4_FSGSBASE)


def _bank(machine: Machine) -> EngineBank:
    return machine.vm.engine.bank
