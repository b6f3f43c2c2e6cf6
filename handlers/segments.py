"""Segment registers: MOV and POP to them, LDS to LSS, and LAR, LSL, VERR, VERW (SDM Vol. 2).

The checks of a load are SDM Vol. 2, MOV; what a load does to the hidden part Vol. 3, 3.4.4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from iced_x86 import Register

from handlers.control import word_operand
from handlers.integer import bind_register
from handlers.integer_stack import Stack
from handlers.tables import require_protected, system_memory
from sandbox.cpu import GP, NP, SHADOW, SS_, Cpu, Fault
from sandbox.decode import Insn
from sandbox.descriptors import (
    EFER_LMA,
    descriptor_address,
    is_code,
    is_conforming,
    is_null,
    is_readable,
    is_writable_data,
    load_descriptor,
    null_segment,
    null_stack,
    parse_segment,
    touch,
)
from sandbox.handler import handler
from sandbox.registers import RSP, VM, ZF, Segment

SEGMENT_NAMES: Final = {
    getattr(Register, name.upper()): name for name in ("es", "cs", "ss", "ds", "fs", "gs")
}


@dataclass(frozen=True, slots=True)
class Load:
    """A segment load that passed its checks; :meth:`commit` does it."""

    cpu: Cpu
    name: str
    segment: Segment
    mark: Callable[[], None] | None = None
    """Sets the accessed bit in the descriptor."""

    def commit(self) -> None:
        if self.mark is not None:
            self.mark()
        self.cpu.registers.bank.write_segment(self.name, self.segment)


def real_mode_segment(cpu: Cpu, name: str, selector: int) -> Segment:
    """The segment after a load in real mode (the limit stays) or virtual-8086 mode."""
    if cpu.rflags & VM:
        return Segment(selector, selector << 4, 0xFFFF, type=3, s=1, dpl=3, present=1)
    old = cpu.registers.bank.read_segment(name)
    return replace(old, selector=selector, base=selector << 4)


def is_protected(cpu: Cpu) -> bool:
    return bool(cpu.registers.bank.read("cr0") & 1) and not cpu.rflags & VM


def load_segment(cpu: Cpu, name: str, selector: int) -> Load:
    """Check a load of a data or stack segment register. CS is loaded by far transfers only."""
    if not is_protected(cpu):
        return Load(cpu, name, real_mode_segment(cpu, name, selector))
    if name == "ss":
        return _load_stack(cpu, selector, cpu.cpl)
    if is_null(selector):
        return Load(cpu, name, null_segment(selector))
    bank, memory = cpu.registers.bank, system_memory(cpu)
    segment = load_descriptor(bank, memory, selector)
    error = selector & 0xFFFC
    outranked = segment.dpl < max(cpu.cpl, selector & 3) and not is_conforming(segment)
    if not is_readable(segment) or outranked:
        raise Fault(GP, error)
    if not segment.present:
        raise Fault(NP, error)
    mark, segment = touch(bank, memory, segment)
    return Load(cpu, name, segment, mark)


def _load_stack(cpu: Cpu, selector: int, cpl: int) -> Load:
    """SS for a code privilege level of ``cpl``."""
    if is_null(selector):
        if cpu.bitness != 64 or cpl == 3 or selector != cpl:
            raise Fault(GP, 0)
        return Load(cpu, "ss", null_stack(cpl))
    return load_stack(cpu, selector, cpl)


def load_stack(cpu: Cpu, selector: int, cpl: int) -> Load:
    """A stack segment for code of privilege level ``cpl``."""
    bank, memory = cpu.registers.bank, system_memory(cpu)
    segment = load_descriptor(bank, memory, selector)
    error = selector & 0xFFFC
    if selector & 3 != cpl or segment.dpl != cpl or not is_writable_data(segment):
        raise Fault(GP, error)
    if not segment.present:
        raise Fault(SS_, error)
    mark, segment = touch(bank, memory, segment)
    return Load(cpu, "ss", segment, mark)


@handler(form=("MOV_SREG_RM16", "MOV_SREG_R32M16", "MOV_SREG_R64M16"))
def mov_to_segment(cpu: Cpu, insn: Insn) -> None:
    """CS cannot be the target: the decoder refuses it."""
    name = SEGMENT_NAMES[insn.iced.op0_register]
    load_segment(cpu, name, word_operand(cpu, insn, 1).read() & 0xFFFF).commit()
    _hold_interrupts(cpu, insn, name)


@handler(
    form=[
        f"POP{size}_{name}"
        for name, sizes in (
            *((n, "WD") for n in ("ES", "SS", "DS")),
            *((n, "WDQ") for n in ("FS", "GS")),
        )
        for size in sizes
    ]
)
def pop_segment(cpu: Cpu, insn: Insn) -> None:
    stack = Stack(cpu, insn.bitness)
    name = SEGMENT_NAMES[insn.iced.op0_register]
    load = load_segment(cpu, name, cpu.read_int(stack.top(), 2))
    mask = stack.mask()  # of the stack that was, if it is SS that is loaded
    load.commit()
    pointer = cpu.gpr[RSP]
    moved = pointer + insn.iced.stack_pointer_increment
    cpu.gpr[RSP] = pointer & ~mask & 0xFFFF_FFFF_FFFF_FFFF | moved & mask
    _hold_interrupts(cpu, insn, name)


def _hold_interrupts(cpu: Cpu, insn: Insn, name: str) -> None:
    """Interrupts wait behind a load of SS, so that it and that of the stack pointer are one."""
    if name == "ss":
        cpu.services[SHADOW] = cpu.rip + insn.length


@handler("lds", "les", "lfs", "lgs", "lss")
def load_far_pointer(cpu: Cpu, insn: Insn) -> None:
    target = bind_register(cpu, insn.iced.op0_register)
    assert target is not None
    size = target.bits // 8
    data = cpu.read(cpu.address(insn), size + 2)
    load = load_segment(cpu, insn.mnemonic[1:], int.from_bytes(data[size:], "little"))
    load.commit()
    target.write(int.from_bytes(data[:size], "little"))


# LAR, LSL, VERR, VERW

_LAR_TYPES: Final = {False: frozenset((1, 2, 3, 4, 5, 9, 11, 12)), True: frozenset((2, 9, 11, 12))}
_LSL_TYPES: Final = {False: frozenset((1, 2, 3, 9, 11)), True: frozenset((2, 9, 11))}
"""System descriptor types that the instruction knows, outside and in long mode."""


def _visible(cpu: Cpu, selector: int) -> tuple[Segment, int] | None:
    """A descriptor and its second doubleword, or None if the selector does not show one.

    Privilege hides all but conforming code.
    """
    if is_null(selector):
        return None
    address = descriptor_address(cpu.registers.bank, selector)
    if address is None:
        return None
    raw = system_memory(cpu).read(address, 8)
    segment = parse_segment(raw, selector)
    if not is_conforming(segment) and segment.dpl < max(cpu.cpl, selector & 3):
        return None
    return segment, int.from_bytes(raw[4:], "little")


def _set_zf(cpu: Cpu, value: bool) -> None:
    cpu.rflags = cpu.rflags | ZF if value else cpu.rflags & ~ZF


@handler("lar", "lsl")
def load_descriptor_part(cpu: Cpu, insn: Insn) -> None:
    """Access rights, or the limit in bytes; ZF tells whether the descriptor could be seen."""
    require_protected(cpu)
    rights = insn.mnemonic == "lar"
    long_mode = bool(cpu.registers.bank.read("efer") & EFER_LMA)
    types = (_LAR_TYPES if rights else _LSL_TYPES)[long_mode]
    found = _visible(cpu, word_operand(cpu, insn, 1).read() & 0xFFFF)
    if found is None or not (found[0].s or found[0].type in types):
        _set_zf(cpu, False)
        return
    segment, high = found
    word_operand(cpu, insn, 0).write(high & 0x00F0_FF00 if rights else segment.limit)
    _set_zf(cpu, True)


@handler("verr", "verw")
def verify(cpu: Cpu, insn: Insn) -> None:
    require_protected(cpu)
    found = _visible(cpu, word_operand(cpu, insn).read() & 0xFFFF)
    good = is_readable if insn.mnemonic == "verr" else is_writable_data
    _set_zf(cpu, found is not None and good(found[0]))


def code_segment(cpu: Cpu, selector: int) -> Segment:
    """The code segment that a far transfer names: #GP for null, out of limits or not code."""
    if is_null(selector):
        raise Fault(GP, 0)
    segment = load_descriptor(cpu.registers.bank, system_memory(cpu), selector)
    if not is_code(segment):
        raise Fault(GP, selector & 0xFFFC)
    if cpu.registers.bank.read("efer") & EFER_LMA and segment.l and segment.db:
        raise Fault(GP, selector & 0xFFFC)
    return segment
