"""The program's address space: which ranges it has mapped, how, and on which frames.

Pages are populated when they are mapped. A range without any access right (PROT_NONE) costs no
frames until it gets one, so that reserving much address space is cheap, as programs expect.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from errno import EINVAL, ENOMEM
from typing import Protocol

from handlers.linux.outcome import error

PAGE = 4096
PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4

LOWEST = 0x1_0000
"""No mapping below: what a null pointer with an offset hits (vm.mmap_min_addr)."""
HIGHEST = 0x7FFF_FFFF_F000
"""End of the user half with 4-level paging (TASK_SIZE_MAX)."""
MAX_AREAS = 65530
"""vm.max_map_count."""


class AddressSpace(Protocol):
    """Page tables. Addresses and sizes are multiples of 4096."""

    def map(
        self,
        virtual: int,
        physical: int,
        size: int,
        *,
        write: bool,
        execute: bool,
        user: bool = True,
    ) -> None: ...
    def unmap(self, virtual: int, size: int) -> None: ...
    def protect(self, virtual: int, size: int, *, write: bool, execute: bool) -> None: ...


class FrameAllocator(Protocol):
    """Guest physical memory in frames of 4096 bytes.

    ``free`` takes any whole frames of what ``allocate`` gave, also a part of them.
    """

    def allocate(self, size: int) -> int:
        """Physical address of ``size`` contiguous zero bytes; MemoryError if there are none."""
        ...

    def free(self, physical: int, size: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Area:
    """``[start, end)`` with one protection, on contiguous frames or (``physical`` None) on none."""

    start: int
    end: int
    prot: int
    physical: int | None
    anonymous: bool = True

    def part(self, start: int, end: int) -> Area:
        """The part of it between two addresses inside."""
        physical = None if self.physical is None else self.physical + start - self.start
        return replace(self, start=start, end=end, physical=physical)

    @property
    def size(self) -> int:
        return self.end - self.start


def page_down(address: int) -> int:
    return address & -PAGE


def page_up(address: int) -> int:
    return (address + PAGE - 1) & -PAGE


class MemoryMap:
    """All areas of a process. Addresses and sizes given are whole pages; failure is ENOMEM."""

    def __init__(
        self,
        space: AddressSpace,
        frames: FrameAllocator,
        lowest: int = LOWEST,
        highest: int = HIGHEST,
    ) -> None:
        self.space = space
        self.frames = frames
        self.lowest = lowest
        self.highest = highest
        self.mmap_top = highest
        """New areas are placed below, the highest first."""
        self.brk_start = 0
        self.brk = 0
        self._areas: list[Area] = []

    @property
    def areas(self) -> tuple[Area, ...]:
        """All areas by address."""
        return tuple(self._areas)

    def overlapping(self, start: int, end: int) -> Iterator[Area]:
        """The areas that have a page in ``[start, end)``, whole, by address."""
        at = self._index(start)
        while at < len(self._areas) and self._areas[at].start < end:
            yield self._areas[at]
            at += 1

    def is_free(self, start: int, end: int) -> bool:
        """Whether a new area may lie there without touching another one."""
        return self.inside(start, end) and next(self.overlapping(start, end), None) is None

    def inside(self, start: int, end: int) -> bool:
        """Whether the range is in the part of the address space that a program may map."""
        return self.lowest <= start <= end <= self.highest

    def is_mapped(self, start: int, end: int) -> bool:
        """Whether every page of the range belongs to an area."""
        for area in self.overlapping(start, end):
            if area.start > start:
                return False
            start = area.end
        return start >= end

    def find_gap(self, size: int, below: int | None = None) -> int:
        """Start of the highest free range of ``size`` bytes below ``below``."""
        end = self.mmap_top if below is None else below
        for area in reversed(self._areas):
            if area.end + size <= end:
                break
            end = min(end, area.start)
        if end - size < self.lowest:
            raise error(ENOMEM)
        return end - size

    def insert(self, start: int, size: int, prot: int, *, anonymous: bool = True) -> None:
        """Map zero pages, in place of whatever was there."""
        if len(self._areas) >= MAX_AREAS:
            raise error(ENOMEM)
        whole = Area(start, start + size, prot, None, anonymous)
        areas = _on_frames(whole, self._allocate(size)) if prot else [whole]
        self.remove(start, size)
        self._map_all(areas)

    def remove(self, start: int, size: int) -> None:
        """Unmap what is mapped in the range and free its frames."""
        for area in self._take(start, start + size):
            self._hide(area)
            self._free([area])

    def protect(self, start: int, size: int, prot: int) -> None:
        """Change the protection of a range; ENOMEM if a page of it is not mapped."""
        if not self.is_mapped(start, start + size):
            raise error(ENOMEM)
        for area in list(self.overlapping(start, start + size)):
            low, high = max(area.start, start), min(area.end, start + size)
            if area.physical is None:
                if prot:
                    self.insert(low, high - low, prot, anonymous=area.anonymous)
                continue
            (cut,) = self._take(low, high)
            changed = replace(cut, prot=prot)
            try:
                self._change(cut, changed)
            except MemoryError:
                self._store(cut)
                raise error(ENOMEM) from None
            self._store(changed)

    def move(self, start: int, size: int, target: int) -> None:
        """Let a mapped range appear at ``target`` instead, with all it holds."""
        self.remove(target, size)
        moved = self._take(start, start + size)
        for area in moved:
            self._hide(area)
        distance = target - start
        placed = [replace(a, start=a.start + distance, end=a.end + distance) for a in moved]
        try:
            for area in placed:
                self._show(area)
        except MemoryError:  # no page tables for the new place: back to the old one
            self.space.unmap(target, size)
            for area in moved:
                self._show(area)
            placed = moved
            raise error(ENOMEM) from None
        finally:
            for area in placed:
                self._store(area)

    def discard(self, start: int, size: int) -> None:
        """Let anonymous pages of the range read as zero again (MADV_DONTNEED)."""
        for area in list(self.overlapping(start, start + size)):
            if area.physical is not None and area.anonymous:
                low, high = max(area.start, start), min(area.end, start + size)
                self.insert(low, high - low, area.prot)

    def set_brk(self, address: int) -> int:
        """Move the end of the heap if possible; where it is then."""
        old, new = page_up(self.brk), page_up(address)
        if address < self.brk_start or new > self.highest:
            return self.brk
        if new > old:
            if not self.is_free(old, new):
                return self.brk
            try:
                self.insert(old, new - old, PROT_READ | PROT_WRITE)
            except OSError:
                return self.brk
        else:
            self.remove(new, old - new)
        self.brk = address
        return address

    def _index(self, address: int) -> int:
        """Index of the first area that ends above ``address``."""
        return bisect_right(self._areas, address, key=lambda area: area.end)

    def _store(self, area: Area) -> None:
        self._areas.insert(self._index(area.start), area)

    def _map_all(self, areas: list[Area]) -> None:
        """Add new areas; if page tables cannot be had for all of them, none."""
        for area in areas:
            try:
                self._show(area)
            except MemoryError:
                self.space.unmap(areas[0].start, areas[-1].end - areas[0].start)
                self._free(areas)
                raise error(ENOMEM) from None
        for area in areas:
            self._store(area)

    def _free(self, areas: list[Area]) -> None:
        for area in areas:
            if area.physical is not None:
                self.frames.free(area.physical, area.size)

    def _take(self, start: int, end: int) -> list[Area]:
        """Take the areas of a range out of the list, cut at its ends; page tables stay."""
        found = list(self.overlapping(start, end))
        if not found:
            return []
        first = self._index(start)
        head = found[0].part(found[0].start, start) if found[0].start < start else None
        tail = found[-1].part(end, found[-1].end) if found[-1].end > end else None
        self._areas[first : first + len(found)] = [a for a in (head, tail) if a is not None]
        return [area.part(max(area.start, start), min(area.end, end)) for area in found]

    def _hide(self, area: Area) -> None:
        if area.prot and area.physical is not None:
            self.space.unmap(area.start, area.size)

    def _change(self, old: Area, new: Area) -> None:
        """Give pages of an area that has frames another protection."""
        if not new.prot:
            self._hide(old)
        elif old.prot:
            write, execute = _write(new.prot), _execute(new.prot)
            self.space.protect(new.start, new.size, write=write, execute=execute)
        else:
            self._show(new)

    def _show(self, area: Area) -> None:
        if area.prot and area.physical is not None:
            self.space.map(
                area.start,
                area.physical,
                area.size,
                write=_write(area.prot),
                execute=_execute(area.prot),
            )

    def _allocate(self, size: int) -> list[tuple[int, int]]:
        """Frames for ``size`` bytes, in halves where contiguous ones are not to be had."""
        try:
            return [(self.frames.allocate(size), size)]
        except MemoryError:
            if size <= PAGE:
                raise error(ENOMEM) from None
        half = page_up(size // 2)
        low = self._allocate(half)
        try:
            return low + self._allocate(size - half)
        except OSError:
            for physical, length in low:
                self.frames.free(physical, length)
            raise


def _write(prot: int) -> bool:
    return bool(prot & PROT_WRITE)


def _execute(prot: int) -> bool:
    return bool(prot & PROT_EXEC)


def _on_frames(area: Area, pieces: list[tuple[int, int]]) -> list[Area]:
    """``area`` as one area for each run of frames (physical address, size)."""
    areas, at = [], area.start
    for physical, size in pieces:
        areas.append(replace(area, start=at, end=at + size, physical=physical))
        at += size
    return areas


def check_range(memory: MemoryMap, address: int, size: int, number: int = ENOMEM) -> int:
    """The end of the pages of a range that a program names; ``number`` if it cannot exist."""
    if address % PAGE:
        raise error(EINVAL)
    end = address + page_up(size)
    if end > memory.highest:
        raise error(number)
    return end
