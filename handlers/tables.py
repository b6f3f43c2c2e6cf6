"""Descriptor table registers: LGDT, LIDT, SGDT, SIDT, LLDT, SLDT, LTR, STR (SDM Vol. 2)."""

from __future__ import annotations

from dataclasses import replace

from handlers.control import check_umip, require_cpl0, store_word, word_operand
from sandbox.cpu import GP, NP, UD, Cpu, Fault, is_canonical
from sandbox.decode import Insn
from sandbox.descriptors import (
    EFER_LMA,
    LDT,
    TSS16,
    TSS32,
    SystemMemory,
    descriptor_address,
    is_null,
    load_descriptor,
    null_segment,
)
from sandbox.handler import handler
from sandbox.registers import VM, DescriptorTable, Segment

_BUSY = 2


def system_memory(cpu: Cpu) -> SystemMemory:
    """Memory with the rights of the processor itself: for descriptor tables."""
    found: SystemMemory = cpu.services.get("system_memory", cpu.memory)
    return found


def require_protected(cpu: Cpu) -> None:
    """#UD in real and virtual-8086 mode."""
    if not cpu.registers.bank.read("cr0") & 1 or cpu.rflags & VM:
        raise Fault(UD)


def _base_size(insn: Insn) -> int:
    """Bytes of base in the memory operand, and with 16-bit operands only 24 bits count."""
    return 8 if insn.bitness == 64 else 4


def _narrow(insn: Insn) -> bool:
    return insn.form.endswith("_16")


@handler("lgdt", "lidt")
def load_table(cpu: Cpu, insn: Insn) -> None:
    require_cpl0(cpu)
    size = _base_size(insn)
    data = cpu.read(cpu.address(insn), 2 + size)
    base = int.from_bytes(data[2:], "little")
    if _narrow(insn):
        base &= 0xFF_FFFF
    if not is_canonical(base):
        raise Fault(GP, 0)
    limit = int.from_bytes(data[:2], "little")
    name = "gdtr" if insn.mnemonic == "lgdt" else "idtr"
    cpu.registers.bank.write_table(name, DescriptorTable(base, limit))


@handler("sgdt", "sidt")
def store_table(cpu: Cpu, insn: Insn) -> None:
    check_umip(cpu)
    table = cpu.registers.bank.read_table("gdtr" if insn.mnemonic == "sgdt" else "idtr")
    base = table.base & 0xFF_FFFF if _narrow(insn) else table.base
    data = table.limit.to_bytes(2, "little") + base.to_bytes(8, "little")[: _base_size(insn)]
    cpu.write(cpu.address(insn), data)


@handler("sldt", "str")
def store_selector(cpu: Cpu, insn: Insn) -> None:
    require_protected(cpu)
    check_umip(cpu)
    name = "ldtr" if insn.mnemonic == "sldt" else "tr"
    store_word(cpu, insn, cpu.registers.bank.read_segment(name).selector)


def _system_segment(cpu: Cpu, selector: int, types: frozenset[int]) -> Segment:
    """A present system descriptor of the GDT with one of ``types``, or the fault."""
    bank = cpu.registers.bank
    if selector & 4:
        raise Fault(GP, selector & 0xFFFC)
    size = 16 if bank.read("efer") & EFER_LMA else 8
    found = load_descriptor(bank, system_memory(cpu), selector, size)
    if found.s or found.type not in types:
        raise Fault(GP, selector & 0xFFFC)
    if not found.present:
        raise Fault(NP, selector & 0xFFFC)
    if not is_canonical(found.base):
        raise Fault(GP, selector & 0xFFFC)
    return found


@handler("lldt")
def lldt(cpu: Cpu, insn: Insn) -> None:
    require_protected(cpu)
    require_cpl0(cpu)
    selector = word_operand(cpu, insn).read() & 0xFFFF
    if is_null(selector):
        table = null_segment(selector)
    else:
        table = _system_segment(cpu, selector, frozenset((LDT,)))
    cpu.registers.bank.write_segment("ldtr", table)


@handler("ltr")
def ltr(cpu: Cpu, insn: Insn) -> None:
    """Load the task register and mark the TSS busy."""
    require_protected(cpu)
    require_cpl0(cpu)
    selector = word_operand(cpu, insn).read() & 0xFFFF
    if is_null(selector):
        raise Fault(GP, 0)
    bank, memory = cpu.registers.bank, system_memory(cpu)
    long_mode = bank.read("efer") & EFER_LMA
    task = _system_segment(cpu, selector, frozenset((TSS32,) if long_mode else (TSS16, TSS32)))
    address = descriptor_address(bank, selector)
    assert address is not None
    kind = memory.read(address + 5, 1)[0] | _BUSY
    memory.write(address + 5, bytes((kind,)))
    bank.write_segment("tr", replace(task, type=task.type | _BUSY))
