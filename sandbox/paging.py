"""Linear to physical addresses: the page walk, and page tables that the machine builds itself.

Walks follow SDM Vol. 3, chapter 4: 32-bit, PAE and 4-level paging, with permissions, reserved
bits, SMEP and SMAP, and the accessed and dirty flags.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from sandbox.cpu import GP, PF_, Fault, is_canonical
from sandbox.memory import PAGE_MASK, PAGE_SIZE, PHYSICAL_BITS, MmioRead, PhysicalMemory, Slot
from sandbox.registers import AC

PRESENT, WRITE, USER, ACCESSED, DIRTY, LARGE, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63

CR0_WP, CR0_PG = 1 << 16, 1 << 31
CR4_PSE, CR4_PAE, CR4_SMEP, CR4_SMAP = 1 << 4, 1 << 5, 1 << 20, 1 << 21
EFER_LMA, EFER_NXE = 1 << 10, 1 << 11

ERROR_PRESENT, ERROR_WRITE, ERROR_USER, ERROR_RESERVED, ERROR_FETCH = 1, 2, 4, 8, 16

_ADDRESS = 0x000F_FFFF_FFFF_F000
_RESERVED = _ADDRESS & -(1 << PHYSICAL_BITS)
_PSE36 = 0x1F_E000
"""In the entry of a 4-MiB page: bits 39:32 of its address (SDM Vol. 3, table 4-4)."""
_LOW_32 = 0xFFFF_FFFF
_CANONICAL_END = 1 << 47
_Entries: TypeAlias = "array[int]"


class ControlState(Protocol):
    """The registers that decide how an address is translated."""

    def read(self, name: str) -> int: ...
    @property
    def cpl(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Access:
    """A kind of access: its bits of the #PF error code."""

    write: bool = False
    fetch: bool = False
    implicit: bool = False
    """A supervisor access whatever the CPL: descriptor tables, stacks of event delivery."""


READ = Access()
WRITE_ACCESS = Access(write=True)
FETCH = Access(fetch=True)
SYSTEM_READ = Access(implicit=True)
SYSTEM_WRITE = Access(write=True, implicit=True)


@dataclass(frozen=True, slots=True)
class _Level:
    """One level of a walk: which address bits index it, and what a large page there covers."""

    shift: int
    bits: int
    large: bool


_FOUR_LEVEL = (_Level(39, 9, False), _Level(30, 9, True), _Level(21, 9, True), _Level(12, 9, False))
_PAE = (_Level(30, 2, False), _Level(21, 9, True), _Level(12, 9, False))
_TWO_LEVEL = (_Level(22, 10, True), _Level(12, 10, False))


class Walker:
    """Translates linear addresses under the control registers of one vCPU."""

    def __init__(self, control: ControlState, memory: PhysicalMemory) -> None:
        self._control = control
        self._memory = memory

    def translate(self, address: int, access: Access) -> int:
        """Physical address of linear ``address``; raises the :class:`Fault` of a forbidden one."""
        read = self._control.read
        cr0, cr4, efer = read("cr0"), read("cr4"), read("efer")
        if not cr0 & CR0_PG:
            return address & _LOW_32
        user = self._control.cpl == 3 and not access.implicit
        error = (
            (ERROR_WRITE if access.write else 0)
            | (ERROR_USER if user else 0)
            | (ERROR_FETCH if access.fetch and (efer & EFER_NXE or cr4 & CR4_SMEP) else 0)
        )
        if efer & EFER_LMA:
            if not is_canonical(address):
                raise Fault(GP, 0)
            levels: tuple[_Level, ...] = _FOUR_LEVEL
        else:
            levels = _PAE if cr4 & CR4_PAE else _TWO_LEVEL
        entries, offset_bits = self._walk(levels, address, cr4, efer, error)
        self._check(entries, address, access, user, error)
        self._mark(entries, access)
        last = entries[-1][1]
        mask = (1 << offset_bits) - 1
        physical = (last & _ADDRESS & ~mask) | (address & mask)
        if offset_bits == 22:
            physical |= (last & _PSE36) << 19
        return physical

    def _walk(
        self, levels: tuple[_Level, ...], address: int, cr4: int, efer: int, error: int
    ) -> tuple[list[tuple[int, int, int]], int]:
        """Entries passed, as (physical address, value, size), and the page's offset bits."""
        size = 4 if levels is _TWO_LEVEL else 8
        pae_root = levels is _PAE
        table = self._control.read("cr3") & (0xFFFF_FFE0 if pae_root else _ADDRESS)
        entries: list[tuple[int, int, int]] = []
        for level in levels:
            index = address >> level.shift & ((1 << level.bits) - 1)
            where = table + index * size
            value = int.from_bytes(self._memory.read(where, size), "little")
            if not value & PRESENT:
                raise Fault(PF_, error, address)
            pointer = pae_root and level is levels[0]  # a PDPTE has no permission bits
            reserved = 0
            if size == 8:
                reserved = _RESERVED | (0 if pointer or efer & EFER_NXE else NX)
                reserved |= LARGE if level.shift == 39 else 0
            if value & reserved:
                raise Fault(PF_, error | ERROR_PRESENT | ERROR_RESERVED, address)
            if pointer:
                value |= WRITE | USER | ACCESSED
            entries.append((where, value, 0 if pointer else size))
            if level.large and value & LARGE and (size == 8 or cr4 & CR4_PSE):
                low = value & ((1 << level.shift) - 1) & ~0x1FFF
                if low & (_ADDRESS if size == 8 else ~_PSE36):
                    raise Fault(PF_, error | ERROR_PRESENT | ERROR_RESERVED, address)
                return entries, level.shift
            table = value & _ADDRESS
        return entries, 12

    def _check(
        self,
        entries: list[tuple[int, int, int]],
        address: int,
        access: Access,
        user: bool,
        error: int,
    ) -> None:
        allowed = WRITE | USER
        no_execute = 0
        for _where, value, _size in entries:
            allowed &= value
            no_execute |= value & NX
        read = self._control.read
        cr4 = read("cr4")
        bad = bool(access.fetch and no_execute)
        if user:
            bad |= not allowed & USER or (access.write and not allowed & WRITE)
        else:
            bad |= bool(access.write and not allowed & WRITE and read("cr0") & CR0_WP)
            if allowed & USER:
                bad |= bool(access.fetch and cr4 & CR4_SMEP)
                if cr4 & CR4_SMAP and not access.fetch:
                    bad |= access.implicit or not read("rflags") & AC
        if bad:
            raise Fault(PF_, error | ERROR_PRESENT, address)

    def _mark(self, entries: list[tuple[int, int, int]], access: Access) -> None:
        for where, value, size in entries:
            marked = value | ACCESSED
            if access.write and where == entries[-1][0]:
                marked |= DIRTY
            if size and marked != value:
                self._memory.write(where, marked.to_bytes(size, "little"))


class PagedMemory:
    """A :class:`sandbox.cpu.VirtualMemory`: memory as the running code sees it.

    Translations are cached per page until :meth:`flush`; a write to a page that holds translated
    code or lies in no slot takes the slow way, where the code is invalidated or MMIO happens.
    """

    def __init__(self, walker: Walker, physical: PhysicalMemory, *, implicit: bool = False) -> None:
        self._walker = walker
        self._physical = physical
        self._accesses = (
            (SYSTEM_READ, SYSTEM_WRITE, FETCH) if implicit else (READ, WRITE_ACCESS, FETCH)
        )
        self._readable: dict[int, tuple[Slot, int]] = {}
        self._writable: dict[int, tuple[Slot, int]] = {}
        self._executable: dict[int, tuple[Slot, int]] = {}

    def flush(self) -> None:
        """Forget all translations."""
        self._readable.clear()
        self._writable.clear()
        self._executable.clear()

    def flush_writable(self) -> None:
        """Forget which pages may be written directly (a page became a code page)."""
        self._writable.clear()

    def read(self, address: int, size: int) -> bytes:
        at = address & PAGE_MASK
        if at + size <= PAGE_SIZE:
            found = self._readable.get(address >> 12)
            if found is not None:
                at += found[1]
                return found[0].host[at : at + size]
        return b"".join(self._read_parts(address, size, self._accesses[0]))

    def fetch(self, address: int, size: int) -> bytes:
        """Read for execution: execute permission."""
        at = address & PAGE_MASK
        if at + size <= PAGE_SIZE:
            found = self._executable.get(address >> 12)
            if found is not None:
                at += found[1]
                return found[0].host[at : at + size]
        return b"".join(self._read_parts(address, size, self._accesses[2]))

    def code_page(self, address: int) -> tuple[Slot, int]:
        """The slot that holds the code page of ``address``, and the page's offset in it.

        Raises :class:`Fault`, or :class:`MmioRead` for a page in no slot.
        """
        found = self._executable.get(address >> 12)
        if found is None:
            physical = self._translate(address, self._accesses[2])
            self._remember(self._executable, address, physical)
            found = self._executable.get(address >> 12)
            if found is None:
                raise MmioRead(physical, 1)
        return found

    def _read_parts(self, address: int, size: int, access: Access) -> list[bytes]:
        spans = [
            (self._translate(part, access), n) for part, n in _page_parts(address, size)
        ]  # all translated first: a fault comes before any MMIO
        if spans:
            cache = self._executable if access.fetch else self._readable
            self._remember(cache, address, spans[0][0])
        return [self._physical.read(physical, n) for physical, n in spans]

    def check_write(self, address: int, size: int) -> None:
        if address >> 12 in self._writable and (address & PAGE_MASK) + size <= PAGE_SIZE:
            return
        for part, _n in _page_parts(address, size):
            self._translate(part, self._accesses[1])

    def write(self, address: int, data: bytes) -> None:
        at = address & PAGE_MASK
        size = len(data)
        if at + size <= PAGE_SIZE:
            found = self._writable.get(address >> 12)
            if found is not None:
                at += found[1]
                found[0].host[at : at + size] = data
                return
        spans = [
            (self._translate(part, self._accesses[1]), n) for part, n in _page_parts(address, size)
        ]
        if spans and spans[0][0] >> 12 not in self._physical.code_pages:
            self._remember(self._writable, address, spans[0][0])
        done = 0
        for physical, n in spans:
            self._physical.write(physical, data[done : done + n])
            done += n

    def _translate(self, address: int, access: Access) -> int:
        return self._walker.translate(address, access)

    def _remember(self, cache: dict[int, tuple[Slot, int]], address: int, physical: int) -> None:
        slot = self._physical.find(physical)
        page = physical & ~PAGE_MASK
        if slot is not None and not (slot.readonly and cache is self._writable):
            cache[address >> 12] = (slot, page - slot.base)


def _entry_run(first: int, count: int) -> _Entries:
    return array("Q", range(first, first + count * PAGE_SIZE, PAGE_SIZE))


def _page_parts(address: int, size: int) -> list[tuple[int, int]]:
    """The access page by page. A part that is not canonical comes first: its #GP goes before
    anything else, as on hardware."""
    parts: list[tuple[int, int]] = []
    beyond = address < _CANONICAL_END < address + size
    while size > 0:
        n = min(size, PAGE_SIZE - (address & PAGE_MASK))
        parts.append((address, n))
        address = (address + n) & 0xFFFF_FFFF_FFFF_FFFF
        size -= n
    return parts[::-1] if beyond else parts


class FrameAllocator:
    """Hands out zero-filled page frames of one range of guest RAM."""

    def __init__(self, memory: PhysicalMemory, base: int, size: int) -> None:
        self._memory = memory
        self._next = base
        self._end = base + size
        self._free: list[tuple[int, int]] = []

    def allocate(self, size: int) -> int:
        """``size`` bytes (rounded up to pages), physically contiguous, zero-filled."""
        size = (size + PAGE_MASK) & ~PAGE_MASK
        for at, (base, room) in enumerate(self._free):
            if room >= size:
                if room == size:
                    del self._free[at]
                else:
                    self._free[at] = (base + size, room - size)
                self._zero(base, size)
                return base
        if self._next + size > self._end:
            raise MemoryError(f"guest RAM is exhausted: {size:#x} bytes asked for")
        base = self._next
        self._next += size
        return base

    def free(self, physical: int, size: int) -> None:
        """Give frames back; neighbours are merged."""
        size = (size + PAGE_MASK) & ~PAGE_MASK
        spans = sorted([*self._free, (physical, size)])
        merged = [spans[0]]
        for base, room in spans[1:]:
            last_base, last_room = merged[-1]
            if last_base + last_room == base:
                merged[-1] = (last_base, last_room + room)
            else:
                merged.append((base, room))
        self._free = merged

    def _zero(self, base: int, size: int) -> None:
        chunk = bytes(min(size, 1 << 20))
        for at in range(0, size, len(chunk)):
            self._memory.load(base + at, chunk[: size - at])


class AddressSpace:
    """4-level page tables that the machine builds in guest memory; the guest cannot see them.

    ``on_change`` is called when a mapping that may be cached was changed or taken away.
    """

    def __init__(
        self, memory: PhysicalMemory, frames: FrameAllocator, on_change: Callable[[], None]
    ) -> None:
        self._memory = memory
        self._frames = frames
        self._on_change = on_change
        self._tables: dict[tuple[int, int], int] = {}
        self.root = frames.allocate(PAGE_SIZE)
        """Physical address of the PML4: what goes into CR3."""
        self.only_memory = True
        """Whether each page is in a memory slot, and what is writable not in a read-only one."""
        memory.on_unslot.append(self._slot_removed)

    def map(
        self,
        virtual: int,
        physical: int,
        size: int,
        *,
        write: bool,
        execute: bool,
        user: bool = True,
    ) -> None:
        """Map pages; ``size`` is rounded up. What was mapped there before is replaced."""
        flags = PRESENT | (WRITE if write else 0) | (USER if user else 0)
        flags |= 0 if execute else NX
        replaced = not self._still_only_memory(physical, size, write)
        pages = (size + PAGE_MASK) >> 12
        page, entry = virtual, physical | flags
        while pages > 0:
            count = min(pages, 512 - (page >> 12 & 511))
            replaced |= self._set(page, _entry_run(entry, count))
            pages -= count
            page += count * PAGE_SIZE
            entry += count * PAGE_SIZE
        if replaced:
            self._on_change()

    def unmap(self, virtual: int, size: int) -> None:
        """Take pages away; those not mapped are passed over."""
        self._update(virtual, size, lambda _entry: 0)

    def protect(self, virtual: int, size: int, *, write: bool, execute: bool) -> None:
        """Change the permissions of the pages that are mapped."""
        flags = (WRITE if write else 0) | (0 if execute else NX)
        self._update(virtual, size, lambda entry: entry & ~(WRITE | NX) | flags)

    def _slot_removed(self, _slot: Slot) -> None:
        self.only_memory = False
        self._on_change()

    def _still_only_memory(self, physical: int, size: int, write: bool) -> bool:
        """False if a new mapping ends :attr:`only_memory`."""
        if not self.only_memory or self._memory.is_memory(physical, size, write=write):
            return True
        self.only_memory = False
        return False

    def _update(self, virtual: int, size: int, change: Callable[[int], int]) -> None:
        """Rewrite the entries that are present in a range."""
        end = virtual + size
        page = virtual
        while page < end:
            after = min(end, (page | 0x1F_FFFF) + 1)
            table = self._tables.get((1, page >> 21))
            if table is not None:
                count = (after - page + PAGE_MASK) >> 12
                old = self._entries(table, page, count)
                new = array("Q", (change(entry) if entry & PRESENT else entry for entry in old))
                for entry in new if self.only_memory else ():
                    if entry & (PRESENT | WRITE) == PRESENT | WRITE:
                        self._still_only_memory(entry & _ADDRESS, PAGE_SIZE, write=True)
                self._memory.load(table + (page >> 12 & 511) * 8, new.tobytes())
            page = after
        self._on_change()

    def _set(self, page: int, entries: _Entries) -> bool:
        """Write entries of one page table; True if one was present before."""
        table = self._table(page)
        before = self._entries(table, page, len(entries))
        self._memory.load(table + (page >> 12 & 511) * 8, entries.tobytes())
        return any(entry & PRESENT for entry in before)

    def _entries(self, table: int, page: int, count: int) -> _Entries:
        data = self._memory.read(table + (page >> 12 & 511) * 8, count * 8)
        return array("Q", data)

    def _table(self, page: int) -> int:
        """The page table for ``page``, made with its parents if it is new."""
        found = self._tables.get((1, page >> 21))
        if found is not None:
            return found
        table = self.root
        for level, shift in ((3, 39), (2, 30), (1, 21)):
            key = (level, page >> shift)
            child = self._tables.get(key)
            if child is None:
                child = self._tables[key] = self._frames.allocate(PAGE_SIZE)
                entry = child | PRESENT | WRITE | USER
                where = table + (page >> shift & 511) * 8
                self._memory.load(where, entry.to_bytes(8, "little"))
            table = child
        return table
