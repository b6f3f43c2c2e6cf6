"""Where Unicorn keeps what it knows of guest memory: QEMU's softmmu TLB, found and verified.

Translated code reaches memory through it: an entry holds the page that it is for, with low bits
set where an access needs more than a move, and the distance from the guest's linear address to the
host's. Code of the host's own that looks there first touches exactly what the guest may touch.
The layout is no public contract, so it is looked for with loads and stores of which we know what
they must leave there; a Unicorn that keeps it elsewhere has none that we use.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from sandbox.engine.unicorn_layout import Guest, Prober, layout
from sandbox.engine.unicorn_library import UC_PROT_ALL, library, x86
from sandbox.errors import EngineError
from sandbox.memory import PAGE_SIZE

USER, SUPERVISOR = 1, 2
"""Numbers of the TLBs at CPL 3 and below, while SMAP is off."""
FAST_BYTES: Final = 16
"""For each TLB: a mask, by which a page number shifted left finds its entry, and the entries."""
_BEFORE: Final = 512
"""The state has the masks and tables so many bytes or fewer before it."""
_DATA: Final = 0x10_0000
_DATA_PAGES: Final = 4
_ENTRY_BITS: Final = (5, 6)


@dataclass(frozen=True, slots=True)
class TlbLayout:
    """Offsets in bytes."""

    fast: int
    """Of the mask of TLB 0, from the state on: negative."""
    entry_bits: int
    """An entry has two to the power of so many bytes."""
    read: int
    write: int
    addend: int
    """Of what is in an entry."""


class _Data:
    """Pages of memory for a guest to touch, and what the TLB must then have for them."""

    def __init__(self, probe: Prober) -> None:
        self._memory = ctypes.create_string_buffer((_DATA_PAGES + 1) * PAGE_SIZE)
        self.host = (ctypes.addressof(self._memory) + PAGE_SIZE - 1) & -PAGE_SIZE
        where = ctypes.c_uint64(_DATA), ctypes.c_size_t(_DATA_PAGES * PAGE_SIZE)
        error = probe.lib.call.uc_mem_map_ptr(
            probe.handle, *where, UC_PROT_ALL, ctypes.c_void_p(self.host)
        )
        probe.lib.check(error, "uc_mem_map_ptr")

    @property
    def addend(self) -> int:
        return self.host - _DATA & (1 << 64) - 1


def _fast(probe: Prober) -> Iterator[int]:
    """Offsets where three pairs of a mask and a pointer may stand."""
    block = probe.peek(probe.state_at - _BEFORE, _BEFORE)
    for at in range(0, len(block) - 3 * FAST_BYTES + 1, 8):
        words = struct.unpack_from("<6Q", block, at)
        if all(_is_mask(mask) for mask in words[::2]) and all(words[1::2]):
            yield at - _BEFORE


def _is_mask(value: int) -> bool:
    return any(
        value >> bits << bits == value and value >> bits & (value >> bits) + 1 == 0 < value >> bits
        for bits in _ENTRY_BITS
    )


def _entry(probe: Prober, fast: int, tlb: int, bits: int, linear: int) -> tuple[int, ...]:
    """The entry for a linear address, as words."""
    descriptor = probe.peek(probe.state_at + fast + tlb * FAST_BYTES, FAST_BYTES)
    mask, table = struct.unpack("<2Q", descriptor)
    block = probe.peek(table + (linear // PAGE_SIZE << bits & mask), 1 << bits)
    return struct.unpack(f"<{len(block) // 8}Q", block)


def _load(page: int) -> str:
    """MOV AL, [page]; then an exception that ends it."""
    return "8a0425" + (_DATA + page * PAGE_SIZE).to_bytes(4, "little").hex() + "31c9 f7f1"


def _store(page: int) -> str:
    return "880425" + (_DATA + page * PAGE_SIZE).to_bytes(4, "little").hex() + "31c9 f7f1"


def _layout_at(probe: Prober, data: _Data, fast: int, tlb: int) -> Iterator[TlbLayout]:
    """The layouts that fit what is there: page 0 has been read, page 1 written, page 3 neither."""
    read, written = _DATA, _DATA + PAGE_SIZE
    for bits in _ENTRY_BITS:
        one, two, none = (
            _entry(probe, fast, tlb, bits, _DATA + page * PAGE_SIZE) for page in (0, 1, 3)
        )
        if one.count(data.addend) != 1 or two.count(data.addend) != 1 or data.addend in none:
            continue
        addend = one.index(data.addend)
        is_there = one[0] == read and two[1] & -PAGE_SIZE == written
        if is_there and two[addend] == data.addend:
            yield TlbLayout(fast, bits, 0, 8, 8 * addend)


def _touch(probe: Prober, guest: Guest, cpl: int) -> None:
    hflags = ctypes.c_uint32.from_address(probe.state_at + layout().hflags)
    for code in (_load(0), _store(1)):
        guest.settle()
        hflags.value = hflags.value & ~3 | cpl
        guest.run(code)
    hflags.value &= ~3


def _discover() -> TlbLayout | None:
    probe = Prober(library())
    try:
        probe.write(x86.UC_X86_REG_CR3, bytes(8))  # the state is there from the first write on
        probe.use(layout().cpu, layout().state)
        data, guest = _Data(probe), Guest(probe, layout().old_exception)
        _touch(probe, guest, 0)
        found = {
            candidate
            for fast in _fast(probe)
            for candidate in _layout_at(probe, data, fast, SUPERVISOR)
        }
        _touch(probe, guest, 3)
        found &= {
            candidate for fast in _fast(probe) for candidate in _layout_at(probe, data, fast, USER)
        }
    finally:
        probe.close()
    return found.pop() if len(found) == 1 else None


@lru_cache(maxsize=1)
def tlb_layout() -> TlbLayout | None:
    """The layout of the installed Unicorn's TLBs, None if it is not as expected."""
    try:
        return _discover()
    except EngineError:
        return None


def is_nearly_full(state: int, found: TlbLayout) -> bool:
    """Whether QEMU would double one of the TLBs at the next flush: more than 70 % are in use.

    ``state``: host address of the CPU state, which must not be running.
    """
    return any(tags.count(_NOTHING) < 0.3 * len(tags) for tags in _tags(state, found))


def pages_in_use(state: int, found: TlbLayout) -> set[int]:
    """Numbers of the pages that the guest has read from lately; see :func:`is_nearly_full`."""
    return {tag // PAGE_SIZE for tags in _tags(state, found) for tag in tags if tag != _NOTHING}


def _tags(state: int, found: TlbLayout) -> Iterator[list[int]]:
    """The first word of each entry, of either TLB."""
    for number in (USER, SUPERVISOR):
        descriptor = ctypes.string_at(state + found.fast + number * FAST_BYTES, FAST_BYTES)
        mask, table = struct.unpack("<2Q", descriptor)
        count = (mask >> found.entry_bits) + 1
        words = memoryview((ctypes.c_char * (count << found.entry_bits)).from_address(table))
        step = (1 << found.entry_bits) // 8
        yield words.cast("B").cast("Q")[found.read // 8 :: step].tolist()


_NOTHING: Final = (1 << 64) - 1
"""What stands in an entry for nothing."""
