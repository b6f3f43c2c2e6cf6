"""Guest physical memory: slots over host mappings, and ranges that belong to devices."""

from __future__ import annotations

import ctypes
import mmap
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from sandbox.errors import MemoryMapError

PAGE_SIZE = 4096
PAGE_MASK = PAGE_SIZE - 1
PHYSICAL_BITS = 40
"""MAXPHYADDR, as CPUID tells the guest and as Unicorn has it."""

_MAP_NORESERVE = 0x4000  # Linux, all architectures Unicorn has wheels for
_SLOT_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE


@dataclass(frozen=True, eq=False)
class Slot:
    """RAM or ROM: ``size`` bytes of guest physical memory at ``base``, backed by ``host``."""

    base: int
    size: int
    readonly: bool
    host: mmap.mmap
    address: int
    """Host virtual address of the first byte."""

    @property
    def end(self) -> int:
        return self.base + self.size


class Device(Protocol):
    """What stands behind a device range: MMIO (offset in the range) or IO ports."""

    def read(self, offset: int, size: int) -> int: ...
    def write(self, offset: int, size: int, value: int) -> None: ...


@dataclass(frozen=True, eq=False)
class DeviceRange:
    """``size`` bytes at ``base`` that ``device`` answers for."""

    base: int
    size: int
    device: Device

    @property
    def end(self) -> int:
        return self.base + self.size


class MmioRead(Exception):
    """A handler read guest physical memory that is neither a slot nor a device's."""

    def __init__(self, address: int, size: int) -> None:
        super().__init__(f"MMIO read of {size} bytes at {address:#x}")
        self.address = address
        self.size = size


class PhysicalMemory:
    """All memory slots and device ranges of one VM, addressed by guest physical address.

    What is in neither is MMIO for the caller of ``Vcpu.run()``, as in KVM: a read raises
    :class:`MmioRead` until ``mmio_replies`` holds its answer, a write is queued in
    ``mmio_writes``.
    """

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.devices: list[DeviceRange] = []
        self._starts: list[int] = []
        self.mmio_replies: dict[tuple[int, int], bytes] = {}
        self.mmio_writes: list[tuple[int, bytes]] = []
        self.mmio_used = False
        """Whether either of them holds something."""
        self.on_slot: list[Callable[[Slot], None]] = []
        """Called with each new slot: the engine maps it."""
        self.on_unslot: list[Callable[[Slot], None]] = []
        self.code_pages: dict[int, set[int]] = {}
        """Physical pages that hold translated code, with the linear pages they run at (page
        numbers); kept by the engine."""
        self.on_code_write: Callable[[int, int], None] | None = None
        """Called with (address, size) after a write of ours into such a page."""

    def add_slot(self, base: int, size: int, *, readonly: bool = False) -> Slot:
        """Map ``size`` bytes of fresh zero-filled memory at guest physical ``base``."""
        self._check_range("memory slot", base, size, PAGE_SIZE)
        try:
            host = mmap.mmap(-1, size, flags=_SLOT_FLAGS)
        except (OSError, OverflowError, ValueError) as error:
            raise MemoryMapError(
                f"memory slot of {size:#x} bytes at {base:#x}: the host cannot map it ({error})"
            ) from None
        address = ctypes.addressof(ctypes.c_char.from_buffer(host))
        slot = Slot(base, size, readonly, host, address)
        at = bisect_right(self._starts, base)
        self.slots.insert(at, slot)
        self._starts.insert(at, base)
        for notify in self.on_slot:
            notify(slot)
        return slot

    def remove_slot(self, base: int) -> None:
        """Unmap the slot that starts at ``base``."""
        for slot in self.slots:
            if slot.base == base:
                break
        else:
            raise MemoryMapError(f"no memory slot starts at {base:#x}")
        for notify in self.on_unslot:
            notify(slot)
        at = self.slots.index(slot)
        del self.slots[at], self._starts[at]

    def add_device(self, base: int, size: int, device: Device) -> DeviceRange:
        """Let ``device`` answer for guest physical ``base`` .. ``base + size - 1`` (MMIO)."""
        self._check_range("device range", base, size, 1)
        found = DeviceRange(base, size, device)
        self.devices.append(found)
        return found

    def _check_range(self, what: str, base: int, size: int, granule: int) -> None:
        where = f"{what} {base:#x}..{base + size - 1:#x}"
        if size <= 0:
            raise MemoryMapError(f"{what} at {base:#x}: its size is {size}; give at least 1 byte")
        if base % granule or size % granule:
            raise MemoryMapError(
                f"{what} at {base:#x} of {size:#x} bytes: both must be multiples of {granule:#x}"
            )
        if base < 0 or base + size > 1 << PHYSICAL_BITS:
            raise MemoryMapError(f"{where}: outside the {PHYSICAL_BITS}-bit physical space")
        taken: list[Slot | DeviceRange] = [*self.slots, *self.devices]
        for other in taken:
            if base < other.end and other.base < base + size:
                kind = "memory slot" if isinstance(other, Slot) else "device range"
                raise MemoryMapError(
                    f"{where} overlaps the {kind} {other.base:#x}..{other.end - 1:#x}"
                )

    def find(self, address: int) -> Slot | None:
        """The slot that holds guest physical ``address``, or None."""
        at = bisect_right(self._starts, address) - 1
        if at >= 0 and address < self.slots[at].end:
            return self.slots[at]
        return None

    def _device(self, address: int) -> DeviceRange | None:
        for found in self.devices:
            if found.base <= address < found.end:
                return found
        return None

    def _run(self, address: int, size: int) -> tuple[Slot | None, int]:
        """The slot at ``address`` and how many of ``size`` bytes lie in it (or in no slot)."""
        slot = self.find(address)
        if slot is not None:
            return slot, min(size, slot.end - address)
        at = bisect_right(self._starts, address)
        ahead = self._starts[at] - address if at < len(self._starts) else size
        return None, min(size, ahead)

    def is_memory(self, address: int, size: int, *, write: bool) -> bool:
        """Whether ``size`` bytes are in slots; ``write``: in slots that may be written."""
        while size > 0:
            slot, n = self._run(address, size)
            if slot is None or (write and slot.readonly):
                return False
            address, size = address + n, size - n
        return True

    def read(self, address: int, size: int) -> bytes:
        """Read ``size`` bytes; raises :class:`MmioRead` where no slot and no device answers."""
        slot, n = self._run(address, size)
        if slot is not None:
            at = address - slot.base
            data = slot.host[at : at + n]
        else:
            data = self._read_mmio(address, n)
        return data if n == size else data + self.read(address + n, size - n)

    def write(self, address: int, data: bytes) -> None:
        """Write ``data``; what no slot and no device takes is queued as an MMIO write."""
        slot, n = self._run(address, len(data))
        if slot is not None and not slot.readonly:
            at = address - slot.base
            slot.host[at : at + n] = data[:n]
            if self.code_pages:
                self._note_code_write(address, n)
        else:
            self._write_mmio(address, data[:n])
        if n < len(data):
            self.write(address + n, data[n:])

    def load(self, address: int, data: bytes) -> None:
        """Write ``data`` into slots as a loader does: ROM too, devices never."""
        while data:
            slot, n = self._run(address, len(data))
            if slot is None:
                raise MemoryMapError(f"nothing is mapped at {address:#x}: add a memory slot first")
            at = address - slot.base
            slot.host[at : at + n] = data[:n]
            if self.code_pages:
                self._note_code_write(address, n)
            address, data = address + n, data[n:]

    def _note_code_write(self, address: int, size: int) -> None:
        pages = range(address >> 12, (address + size - 1 >> 12) + 1)
        if self.on_code_write and any(page in self.code_pages for page in pages):
            self.on_code_write(address, size)

    def _read_mmio(self, address: int, size: int) -> bytes:
        found = self._device(address)
        if found is not None:
            value = found.device.read(address - found.base, size)
            return (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        reply = self.mmio_replies.get((address, size))
        if reply is None:
            raise MmioRead(address, size)
        return reply

    def _write_mmio(self, address: int, data: bytes) -> None:
        found = self._device(address)
        if found is None:
            self.mmio_writes.append((address, data))
            self.mmio_used = True
        else:
            value = int.from_bytes(data, "little")
            found.device.write(address - found.base, len(data), value)
