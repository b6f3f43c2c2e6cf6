"""Devices answer the exits of an engine that reports accesses itself, as the kernel does."""

from __future__ import annotations

from sandbox.exits import Exit, Io, Mmio
from sandbox.intercepts import Ports
from sandbox.memory import DeviceRange, PhysicalMemory


def answer(left: Exit, ports: Ports, memory: PhysicalMemory) -> bool:
    """Let the device concerned take an ``Io`` or ``Mmio`` exit; False if there is none."""
    if isinstance(left, Io):
        found = ports.find(left.port)
        if found is not None:
            _port(left, found)
        return found is not None
    if isinstance(left, Mmio):
        at = left.phys_addr
        found = next((d for d in memory.devices if d.base <= at < d.end), None)
        if found is not None:
            _memory(left, found)
        return found is not None
    return False


def _port(left: Io, found: DeviceRange) -> None:
    """All items of an exit: string IO brings several."""
    offset, size = left.port - found.base, left.size
    if left.is_in:
        items = [found.device.read(offset, size) for _ in range(left.count)]
        left.data = b"".join(_cut(item, size) for item in items)
        return
    for at in range(0, len(left.data), size):
        item = int.from_bytes(left.data[at : at + size], "little")
        found.device.write(offset, size, item)


def _memory(left: Mmio, found: DeviceRange) -> None:
    offset = left.phys_addr - found.base
    if left.is_write:
        found.device.write(offset, left.len, left.value)
    else:
        left.data = _cut(found.device.read(offset, left.len), left.len)


def _cut(value: int, size: int) -> bytes:
    return (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
