"""Segment descriptors and gates as they lie in the GDT, LDT and IDT.

Source: SDM Vol. 3, 3.4.5 (segment descriptors), 6.11 and 6.14.1 (gates), 7.2.3 (long mode system
descriptors). Everything here raises :class:`~sandbox.cpu.Fault` as the processor would, and
only :func:`touch` writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from sandbox.cpu import GP, Fault
from sandbox.registers import Bank, Segment

CODE, CONFORMING, READABLE = 8, 4, 2
"""Bits of ``Segment.type`` of a code segment (``s`` = 1)."""
EXPAND_DOWN, WRITABLE = 4, 2
"""Bits of ``Segment.type`` of a data segment."""
ACCESSED = 1

LDT, TASK_GATE = 2, 5
TSS16, TSS16_BUSY, TSS32, TSS32_BUSY = 1, 3, 9, 11
CALL_GATE16, INTERRUPT_GATE16, TRAP_GATE16 = 4, 6, 7
CALL_GATE, INTERRUPT_GATE, TRAP_GATE = 12, 14, 15
"""System descriptor types (``s`` = 0); 9 and 11 are the 64-bit TSS in long mode."""

EFER_LMA = 1 << 10


class Reader(Protocol):
    """What descriptor look-ups need of a memory: supervisor reads."""

    def read(self, address: int, size: int) -> bytes: ...


class SystemMemory(Reader, Protocol):
    """Memory for the processor's own accesses: supervisor privilege whatever the CPL is."""

    def write(self, address: int, data: bytes) -> None: ...
    def check_write(self, address: int, size: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Gate:
    """An interrupt, trap, task or call gate. ``count``: parameters of a 16/32-bit call gate."""

    selector: int
    offset: int
    type: int
    dpl: int = 0
    present: int = 1
    ist: int = 0
    count: int = 0

    @property
    def interrupt(self) -> bool:
        """Whether entering it clears IF."""
        return self.type in (INTERRUPT_GATE, INTERRUPT_GATE16)


def parse_segment(raw: bytes, selector: int = 0) -> Segment:
    """An 8-byte segment descriptor, or a 16-byte system descriptor of long mode."""
    low = int.from_bytes(raw[:8], "little")
    g = low >> 55 & 1
    limit = (low & 0xFFFF) | (low >> 48 & 0xF) << 16
    base = (low >> 16 & 0xFF_FFFF) | (low >> 56) << 24
    if len(raw) == 16:
        base |= int.from_bytes(raw[8:12], "little") << 32
    return Segment(
        selector=selector,
        base=base,
        limit=limit << 12 | 0xFFF if g else limit,
        type=low >> 40 & 0xF,
        s=low >> 44 & 1,
        dpl=low >> 45 & 3,
        present=low >> 47 & 1,
        avl=low >> 52 & 1,
        l=low >> 53 & 1,
        db=low >> 54 & 1,
        g=g,
    )


def serialise_segment(segment: Segment, *, wide: bool = False) -> bytes:
    """The descriptor of ``segment``; ``wide``: the 16-byte form of long mode system segments."""
    limit = segment.limit >> 12 if segment.g else segment.limit
    if limit > 0xF_FFFF:
        raise ValueError(f"segment limit {segment.limit:#x} needs page granularity (g=1)")
    low = (limit & 0xFFFF) | (segment.base & 0xFF_FFFF) << 16 | segment.type << 40
    low |= segment.s << 44 | segment.dpl << 45 | segment.present << 47 | (limit >> 16) << 48
    low |= segment.avl << 52 | segment.l << 53 | segment.db << 54 | segment.g << 55
    low |= (segment.base >> 24 & 0xFF) << 56
    data = low.to_bytes(8, "little")
    return data + (segment.base >> 32).to_bytes(8, "little") if wide else data


def parse_gate(raw: bytes) -> Gate:
    """An 8-byte gate, or a 16-byte gate of long mode (which has an IST and no count)."""
    low = int.from_bytes(raw[:8], "little")
    wide = len(raw) == 16
    kind = low >> 40 & 0x1F
    offset = low & 0xFFFF
    if wide:
        offset |= (low >> 48) << 16 | int.from_bytes(raw[8:12], "little") << 32
    elif kind & 8:
        offset |= (low >> 48) << 16
    return Gate(
        selector=low >> 16 & 0xFFFF,
        offset=offset,
        type=kind,
        dpl=low >> 45 & 3,
        present=low >> 47 & 1,
        ist=low >> 32 & 7 if wide else 0,
        count=0 if wide else low >> 32 & 0x1F,
    )


def serialise_gate(gate: Gate, *, wide: bool = False) -> bytes:
    """The gate as 8 bytes, or as the 16 bytes that long mode wants."""
    low = (gate.offset & 0xFFFF) | gate.selector << 16 | (gate.ist if wide else gate.count) << 32
    low |= gate.type << 40 | gate.dpl << 45 | gate.present << 47
    low |= (gate.offset >> 16 & 0xFFFF) << 48
    data = low.to_bytes(8, "little")
    return data + (gate.offset >> 32).to_bytes(8, "little") if wide else data


def is_null(selector: int) -> bool:
    """Whether a selector names no descriptor (entry 0 of the GDT, any RPL)."""
    return selector & 0xFFFC == 0


def descriptor_address(bank: Bank, selector: int, size: int = 8) -> int | None:
    """Linear address of a selector's descriptor, None if its table does not reach so far."""
    index = selector & 0xFFF8
    if selector & 4:
        ldt = bank.read_segment("ldtr")
        if is_null(ldt.selector) or not ldt.present or index + size - 1 > ldt.limit:
            return None
        return ldt.base + index
    gdt = bank.read_table("gdtr")
    return None if index + size - 1 > gdt.limit else gdt.base + index


def load_descriptor(
    bank: Bank,
    memory: Reader,
    selector: int,
    size: int = 8,
    *,
    vector: int = GP,
    ext: int = 0,
) -> Segment:
    """Read and parse the descriptor of ``selector``; ``vector(selector + ext)`` if out of limits.

    ``size`` is 16 for system descriptors of long mode.
    """
    address = descriptor_address(bank, selector, size)
    if address is None:
        raise Fault(vector, selector & 0xFFFC | ext)
    return parse_segment(memory.read(address, size), selector)


def is_code(segment: Segment) -> bool:
    return bool(segment.s and segment.type & CODE)


def is_conforming(segment: Segment) -> bool:
    return is_code(segment) and bool(segment.type & CONFORMING)


def is_writable_data(segment: Segment) -> bool:
    return bool(segment.s and not segment.type & CODE and segment.type & WRITABLE)


def is_readable(segment: Segment) -> bool:
    """Data segments always are, code segments if they say so."""
    return bool(segment.s and (not segment.type & CODE or segment.type & READABLE))


def null_segment(selector: int) -> Segment:
    """What a data segment register holds after a null selector was loaded: unusable."""
    return Segment(selector=selector, base=0, limit=0, type=0, s=0, present=0)


def null_stack(cpl: int) -> Segment:
    """SS after a stack switch of long mode: a null selector with the RPL of the new CPL."""
    return Segment(cpl, 0, 0xFFFF_FFFF, type=3, s=1, dpl=cpl, present=1, db=1, g=1)


def within_limit(segment: Segment, offset: int, size: int) -> bool:
    """Whether ``size`` bytes at ``offset`` lie inside a 16/32-bit segment (SDM Vol. 3, 5.3)."""
    last = offset + size - 1
    if segment.s and not segment.type & CODE and segment.type & EXPAND_DOWN:
        return offset > segment.limit and last <= (0xFFFF_FFFF if segment.db else 0xFFFF)
    return last <= segment.limit


def touch(bank: Bank, memory: SystemMemory, segment: Segment) -> tuple[Callable[[], None], Segment]:
    """Set the accessed bit in the descriptor table, as a segment load does.

    Faults come now, the write when the first result is called; the second is ``segment`` with the
    bit set.
    """
    accessed = replace(segment, type=segment.type | ACCESSED)
    address = descriptor_address(bank, segment.selector)
    if address is None or segment.type & ACCESSED:
        return _nothing, accessed
    byte = address + 5
    value = memory.read(byte, 1)[0] | ACCESSED
    memory.check_write(byte, 1)
    return lambda: memory.write(byte, bytes((value,))), accessed


def _nothing() -> None:
    """No accessed bit to set."""
