"""A stack as the processor itself uses it: far transfers, returns and event delivery."""

from __future__ import annotations

from collections.abc import Iterable

from sandbox.cpu import SS_, TS, Fault, is_canonical
from sandbox.descriptors import (
    Reader,
    SystemMemory,
    is_null,
    is_writable_data,
    load_descriptor,
    within_limit,
)
from sandbox.registers import Bank, Segment

_MASK64 = 0xFFFF_FFFF_FFFF_FFFF


class Stack:
    """A stack pointer on its way, and what was pushed: nothing is written before :meth:`write`.

    ``flat``: 64-bit mode, where the segment does not matter. ``fault`` is raised for what lies
    beyond the segment's limit or is not canonical. The pointer wraps, an element does not.
    """

    def __init__(self, segment: Segment, pointer: int, fault: Fault, *, flat: bool = False) -> None:
        self.segment = segment
        self.pointer = pointer
        self.fault = fault
        self.flat = flat
        self.mask = _MASK64 if flat else 0xFFFF_FFFF if segment.db else 0xFFFF
        self._parts: list[tuple[int, bytes]] = []

    def push(self, values: Iterable[int], size: int) -> None:
        """Push the low ``size`` bytes of each value."""
        for value in values:
            self.skip(-size)
            data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
            self._parts.append((self._address(size), data))

    def pop(self, memory: Reader, size: int) -> int:
        """Read the top element and go past it."""
        value = int.from_bytes(memory.read(self._address(size), size), "little")
        self.skip(size)
        return value

    def skip(self, size: int) -> None:
        """Move the pointer: only as many of its bits as the stack is wide."""
        self.pointer = self.pointer & ~self.mask | (self.pointer + size) & self.mask

    def _address(self, size: int) -> int:
        offset = self.pointer & self.mask
        if self.flat:
            if not is_canonical(offset) or not is_canonical(offset + size - 1):
                raise self.fault
            return offset
        if not within_limit(self.segment, offset, size):
            raise self.fault
        return (self.segment.base + offset) & 0xFFFF_FFFF

    def check(self, memory: SystemMemory) -> None:
        """Raise what writing the pushed elements would raise."""
        for address, data in self._parts:
            memory.check_write(address, len(data))

    def write(self, memory: SystemMemory) -> None:
        for address, data in self._parts:
            memory.write(address, data)


def read_tss(bank: Bank, memory: Reader, offset: int, size: int, ext: int = 0) -> int:
    """A field of the current TSS; #TS(TR) if it is too short. ``ext``: error code bit 0."""
    tss = bank.read_segment("tr")
    if offset + size - 1 > tss.limit:
        raise Fault(TS, tss.selector & 0xFFFC | ext)
    return int.from_bytes(memory.read(tss.base + offset, size), "little")


def inner_stack(bank: Bank, memory: Reader, cpl: int, ext: int = 0) -> tuple[Segment, int]:
    """SS and ESP for privilege level ``cpl`` from a 16- or 32-bit TSS, checked (Vol. 3, 5.8.5)."""
    if bank.read_segment("tr").type & 8:
        pointer = read_tss(bank, memory, cpl * 8 + 4, 6, ext)
        selector, pointer = pointer >> 32, pointer & 0xFFFF_FFFF
    else:
        pointer = read_tss(bank, memory, cpl * 4 + 2, 4, ext)
        selector, pointer = pointer >> 16, pointer & 0xFFFF
    if is_null(selector):
        raise Fault(TS, ext)
    error = selector & 0xFFFC | ext
    stack = load_descriptor(bank, memory, selector, vector=TS, ext=ext)
    if selector & 3 != cpl or stack.dpl != cpl or not is_writable_data(stack):
        raise Fault(TS, error)
    if not stack.present:
        raise Fault(SS_, error)
    return stack, pointer
