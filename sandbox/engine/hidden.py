"""Memory of the machine's own in the guest's address space: lowered code and what it works on.

It lies in the upper half of the linear addresses, at a random place in the last 2 GiB, where no
program's memory is and where a patched site reaches it with an absolute jump. The code cannot be
written by the guest. A guest that looks for it may find it: it can then spoil the upper halves of
its own YMM registers, and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from sandbox.lowering import (
    FIRST_GPR,
    SAVED_OFFSET,
    UPPER_OFFSET,
)
from sandbox.memory import PAGE_SIZE, PhysicalMemory
from sandbox.paging import AddressSpace
from sandbox.registers import Registers

_CODE_BASE: Final = 0x48_0000_0000
_DATA_BASE: Final = 0x49_0000_0000
CODE_BYTES: Final = (4 << 20) - (9 << 12)
HOST_ENTRIES: Final = 255 << 8
"""Places where a host run is called. The first of them, the state page and the first code are in
use at once, so no two of them are at a distance that is a multiple of a TLB's pages."""
_HOST_ENTRY_BYTES: Final = 16
PER_PAGE: Final = PAGE_SIZE // _HOST_ENTRY_BYTES
"""The last of so many in each page is the way back."""
_HOST_BYTES: Final = HOST_ENTRIES * _HOST_ENTRY_BYTES
DATA_BYTES: Final = 1 << 18
_JUMP_BYTES: Final = 5
_JUMP_TO_NEXT: Final = bytes.fromhex("ff25f2ffffff")
"""JMP [rip - 14]: by the 8 bytes before it. There because a page more that is in use is one more
that may share its TLB entry with the guest's."""
_SMALL_TLB: Final = 64
"""Entries of the smallest TLB that QEMU has."""
_CODE_LIMIT: Final = CODE_BYTES - _HOST_BYTES
_LAST_2G: Final = (1 << 64) - (1 << 31)
_YMM_COUNT: Final = 16


@dataclass(frozen=True, slots=True)
class Place:
    """A hidden instruction, as the guest sees it."""

    rip: int | None
    """The guest's instruction it belongs to; None: the jump back from a host run."""
    whole: bool
    """Whether the guest's state is that before its instruction."""
    saved: tuple[int, ...]
    """Registers that have to be taken from their save slot."""
    lowered: bool
    """Whether the guest's instruction is lowered, not copied."""
    left: tuple[str, ...]
    """Mnemonics of the lowered instructions of its run, from this one on: what has been counted
    but not executed if the guest leaves here."""


def _place(size: int, busy: set[int]) -> int:
    """A random linear address; if there is one, such that what is used most, the first pages of
    code and data, share no entries of a small TLB with ``busy`` pages: each turn would cost."""
    choose = random.SystemRandom().randrange
    for _attempt in range(100):
        linear = _LAST_2G + choose(((1 << 31) - size) // PAGE_SIZE) * PAGE_SIZE
        used = linear, linear + CODE_BYTES, linear + CODE_BYTES - _HOST_BYTES
        if not busy & {at // PAGE_SIZE % _SMALL_TLB for at in used}:
            break
    return linear


class HiddenMemory:
    """Pages for code, filled from the front, and for data: the state page, then counters.

    ``in_use``: numbers of pages that the guest uses.
    """

    def __init__(
        self,
        physical: PhysicalMemory,
        space: AddressSpace,
        registers: Registers,
        in_use: Collection[int] = (),
    ) -> None:
        self._code = physical.add_slot(_CODE_BASE, CODE_BYTES, readonly=True)
        self._data = physical.add_slot(_DATA_BASE, DATA_BYTES)
        size = CODE_BYTES + DATA_BYTES
        self.linear = _place(size, {page % _SMALL_TLB for page in in_use})
        self.end = self.linear + size
        self.state = self.linear + CODE_BYTES
        """Linear address of the state page."""
        self.host_base = self.state - _HOST_BYTES
        """Linear address of the code from which host runs are called: the end of the code."""
        self.code_host, self.state_host = self._code.address, self._data.address
        space.map(self.linear, _CODE_BASE, CODE_BYTES, write=False, execute=True)
        space.map(self.state, _DATA_BASE, DATA_BYTES, write=True, execute=False)
        self.places: dict[int, Place] = {}
        """By linear address: each instruction there is."""
        self._used = self._used_entries = 0
        self._counters = memoryview(self._data.host).cast("Q")
        self._next_counter = PAGE_SIZE // 8
        import numpy as np  # a guest without vector code need not wait for it

        halves = np.frombuffer(registers.vec.raw, np.complex128).reshape(-1, 4)  # 16 bytes an item
        self.upper = halves[:_YMM_COUNT, 1]
        """The upper halves as handlers see them."""
        self._gpr = registers.gpr
        self._low = memoryview(registers.vec.raw).cast("B")
        at = UPPER_OFFSET // 16
        hidden = np.frombuffer(self._data.host, np.complex128, count=at + _YMM_COUNT)
        self.lent = hidden[at:]
        """The same in the state page, for lowered code."""

    def holds(self, linear: int) -> bool:
        """Whether a linear address is in these pages."""
        return self.linear <= linear < self.end

    def restore(self, place: Place) -> None:
        """Give the guest back the registers that its instruction was using as scratch."""
        for n in place.saved:
            at = SAVED_OFFSET + 16 * n
            if n >= FIRST_GPR:
                self._gpr[n - FIRST_GPR] = int.from_bytes(self._data.host[at : at + 8], "little")
            else:
                self._low[64 * n : 64 * n + 16] = self._data.host[at : at + 16]

    def room(self, size: int) -> int | None:
        """Linear address of ``size`` bytes for code in one page; None if all is used up."""
        if self._used % PAGE_SIZE + size > PAGE_SIZE:
            self._used = (self._used + PAGE_SIZE - 1) & -PAGE_SIZE
        return self.linear + self._used if self._used + size <= _CODE_LIMIT else None

    def write(self, linear: int, code: bytes, places: dict[int, Place]) -> None:
        """Fill what :meth:`room` gave. The guest has not run it yet."""
        self._put(linear, code)
        self._used = (
            linear - self.linear + len(code)
        )  # unaligned: QEMU finds blocks by the low bits of their address
        self.places.update(places)

    def call_host(self) -> tuple[int, int] | None:
        """Number and linear address of a new place to call a host run from; None without room.

        There stands the address of the code, then the code: a jump to the end of the page, where
        ``jmp [next]`` is.
        """
        number = self._used_entries
        if number % PER_PAGE == PER_PAGE - 1:
            number += 1
        if number >= HOST_ENTRIES:
            return None
        self._used_entries = number + 1
        linear = self.host_base + number * _HOST_ENTRY_BYTES
        back = self.back_of(linear)
        jump = b"\xe9" + (back - (linear + 8 + _JUMP_BYTES)).to_bytes(4, "little")
        self._put(linear, (linear + 8).to_bytes(8, "little") + jump)
        self._put(back, _JUMP_TO_NEXT)
        return number, linear

    @staticmethod
    def back_of(linear: int) -> int:
        """Address of the jump back from what a place in this page calls."""
        return (linear | PAGE_SIZE - 1) + 1 - _HOST_ENTRY_BYTES + 8

    def _put(self, linear: int, code: bytes) -> None:
        at = linear - self.linear
        self._code.host[at : at + len(code)] = code

    def next_at(self, linear: int) -> int:
        """Where the jump back goes on in the page of ``linear``."""
        at = (linear | PAGE_SIZE - 1) + 1 - _HOST_ENTRY_BYTES - self.linear
        return int.from_bytes(self._code.host[at : at + 8], "little")

    def free_counter(self) -> int:
        """Linear address of the next counter of 8 bytes; they last for all runs that fit."""
        return self.state + 8 * self._next_counter

    def take_counter(self) -> None:
        """Begin to use that one."""
        self._counters[self._next_counter] = 0
        self._next_counter = min(self._next_counter + 1, len(self._counters) - 1)

    def count(self, linear: int) -> int:
        """What a counter has come to."""
        return self._counters[(linear - self.state) // 8]

    def clear(self) -> None:
        """Forget all code and counters; the engine must have forgotten its blocks."""
        self._used = self._used_entries = 0
        self._next_counter = PAGE_SIZE // 8
        self.places.clear()
