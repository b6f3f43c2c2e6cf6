"""What Unicorn translates: looked at when it is reported, and patched where it must trap.

Unicorn reports each block once, when it is translated and before it first runs. The block is
decoded there; if it holds a trapped instruction, the engine stops, puts an invalid opcode over that
instruction in host memory (where Unicorn does not see the write), translates the block again, now
ending in a trap or a jump to lowered code, and restores the bytes before the block runs: a guest
that reads its own code sees its own bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from sandbox.cpu import Fault
from sandbox.decode import MAX_LENGTH, DecodeError, Insn, decode
from sandbox.engine.allowlist import Allowlist, Patch
from sandbox.engine.patched import PatchedBlocks
from sandbox.engine.plain import EXPECTED
from sandbox.engine.unicorn_control import Control
from sandbox.engine.unicorn_entry import PATCHED, UnicornEntry
from sandbox.engine.unicorn_library import (
    TRANSLATION_BLOCK,
    UC_ERR_OK,
    UC_PROT_ALL,
    EdgeCallback,
    library,
)
from sandbox.engine.unicorn_lowering import RuleOf, UnicornLowering
from sandbox.engine.unicorn_state import UnicornBank
from sandbox.errors import EngineError
from sandbox.memory import PAGE_SIZE, MmioRead, PhysicalMemory
from sandbox.paging import PagedMemory
from sandbox.registers import Registers

_TWO_BLOCKS = b"\xeb\x00\xf4"  # jmp $+2; hlt


class Blocks:
    """The blocks of one engine. ``memory`` is as the running code sees it."""

    def __init__(
        self,
        bank: UnicornBank,
        registers: Registers,
        physical: PhysicalMemory,
        memory: PagedMemory,
        system_memory: PagedMemory,
        entry: UnicornEntry,
        control: Control,
    ) -> None:
        self._library = library()
        self._handle = bank.handle
        self._bank = bank
        self._registers = registers
        self._physical = physical
        self._memory = memory
        self._entry = entry
        self._control = control
        self.allowlist = Allowlist(bank, physical, memory, system_memory)
        self.plain = self.allowlist.plain
        self.lowering: UnicornLowering | None = None
        self.reported: list[int] = []
        """Blocks reported before there is an allowlist."""
        self.patch: Patch | None = None
        """To be put in place."""
        self.applied: Patch | None = None
        self.stale: tuple[int, int] | None = None
        """Block (address, size) that Unicorn may have translated through an old TLB entry."""
        self.strayed: tuple[int, int] | None = None
        """Block (address, size) in hidden memory that is no instruction of ours."""
        self.failure: BaseException | None = None
        """What was raised while a block was looked at."""
        self._fresh = self._stepped = -1
        """Address of the block that is about to be, or was last, translated from a flushed TLB."""
        self._patched = PatchedBlocks()
        self._rule: RuleOf | None = None
        self._count_lowered = False
        self.callback = EdgeCallback(self._make_callback())
        """For UC_HOOK_EDGE_GENERATED."""

    def check_reports(self) -> None:
        """Run two blocks of our own, and see that blocks are reported from then on. Do it first.

        Unicorn reports a block only when another ran before it. The allowlist stands on these
        reports, so an engine that does not make them is refused.
        """
        page = 0x1000
        memory = ctypes.create_string_buffer(2 * PAGE_SIZE)
        aligned = (ctypes.addressof(memory) + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1)
        ctypes.memmove(aligned, _TWO_BLOCKS, len(_TWO_BLOCKS))
        where = ctypes.c_uint64(page), ctypes.c_size_t(PAGE_SIZE)
        call, check = self._library.call, self._library.check
        check(
            call.uc_mem_map_ptr(self._handle, *where, UC_PROT_ALL, ctypes.c_void_p(aligned)),
            "uc_mem_map_ptr",
        )
        for _round in range(2):
            self.reported.clear()
            self._registers.rip = page
            check(self._entry.start(), "uc_emu_start")
            self._library.flush_blocks(self._handle)
        if self.reported != [page, page + 2]:
            raise EngineError("this build of Unicorn does not report the blocks it translates")
        check(call.uc_mem_unmap(self._handle, *where), "uc_mem_unmap")
        self._registers.rip = 0

    def set_traps(
        self,
        traps: bytes,
        traps_insn: Callable[[Insn], bool] | None = None,
        lowered: RuleOf | None = None,
        *,
        count: bool = False,
    ) -> None:
        """See :meth:`sandbox.engine.protocol.Engine.set_traps`."""
        self.allowlist.set_traps(traps, traps_insn)
        self._rule, self._count_lowered = lowered, count
        if self.lowering is not None:
            self.lowering.clear()
        self._library.flush_blocks(self._handle)

    def lowers(self, insn: Insn) -> bool:
        """Whether lowered code does a trapped instruction."""
        lowering = self.lowering if self._rule is not None else None
        return lowering is not None and lowering.lowers(insn)

    def revise(self) -> None:
        """Bring lowered code in line with what the machine did while the guest was stopped."""
        lowering = self.lowering
        self._entry.due = False
        if lowering is None:
            return
        if (lowering.was_valid() and not lowering.is_valid()) or lowering.is_full:
            lowering.clear()
            self._library.flush_blocks(self._handle)

    def _make_callback(self) -> Callable[[int, int], None]:
        """The callback for new blocks: plain code is recognised here, all else is looked at."""
        plain, control, look, expected = self.plain, self._control.view, self._on_block, EXPECTED
        unpack, size_of = TRANSLATION_BLOCK.unpack_from, TRANSLATION_BLOCK.size
        known, view = 0, memoryview(b"")

        def on_block(_handle: int, block: int) -> None:
            nonlocal known, view
            try:
                if block != known:  # it is on Unicorn's stack, mostly in the same place
                    known, view = block, memoryview((ctypes.c_char * size_of).from_address(block))
                start, count, size = unpack(view)
                at = start + plain.shift
                end = at + size
                if at < plain.first or end > plain.end:
                    at = plain.move(start, size)
                    end = at + size
                if at >= 0 and control.tobytes() == plain.control:
                    filler, left = expected[count]
                    if plain.split(filler + plain.host[at:end]) == left:
                        return
                look(start, size, count)
            except BaseException as error:  # noqa: BLE001 - ctypes would swallow it; enter() raises
                self.failure = error
            if (self.patch, self.stale, self.failure) != (None, None, None):
                self._library.free.uc_emu_stop(self._handle)

        return on_block

    def _on_block(self, start: int, size: int, count: int) -> None:
        if not self.allowlist:
            self.reported.append(start)
            return
        lowering = self.lowering
        if lowering is not None and lowering.holds(start):
            if start not in lowering.hidden.places:
                self.strayed = start, size
                self._library.free.uc_emu_stop(self._handle)
            return
        applied = self.applied
        if applied is not None:
            self.restore()
        if applied is not None and applied.block == start:
            self.patch = self.allowlist.check_trapped(applied, size, count)
            if self.patch is not None and lowering is not None:
                lowering.refuse(applied.linear)
        elif self._may_be_stale(start, count):
            self.stale = start, size
        else:
            self.patch = self.allowlist.check(start, size, count)
        self.plain.control = None if self._control.untrusted else self._control.known

    def _may_be_stale(self, start: int, count: int) -> bool:
        """Whether Unicorn may have fetched a new block from elsewhere than page tables say now.

        A guest that changes its own page tables without flushing the TLB runs on from the old
        page, as on hardware; we read the new one and would check bytes that do not run. So each
        new block of such a guest is translated a second time, from a flushed TLB. A store into its
        own block is excepted: Unicorn then translates that instruction alone, once, to run it.
        """
        self._control.sync()
        if not self._control.untrusted:
            return False
        fresh, self._fresh = self._fresh, -1
        if start == fresh:
            self._stepped = start
            return False
        return count != 1 or start != self._stepped

    def has_strayed(self) -> bool:
        """Whether the guest jumped into hidden memory, between instructions."""
        if self.strayed is None:
            return False
        self._forget(*self.strayed)
        self.strayed = None
        return True

    def retranslate(self) -> bool:
        """Have the block translated anew for which the guest was stopped; False if for none."""
        if self.patch is not None:
            self._apply()
        elif self.stale is not None:
            self._refresh()
        else:
            return False
        return True

    def _forget(self, start: int, size: int) -> None:
        """Have Unicorn translate a block again, if it comes there again."""
        if self._library.remove_cache(self._handle, start, start + size) != UC_ERR_OK:
            self._library.flush_blocks(self._handle)

    def _refresh(self) -> None:
        assert self.stale is not None
        (start, size), self.stale = self.stale, None
        self._forget(start, size)
        self._bank.flush_tlb()
        self._fresh = start

    def _apply(self) -> None:
        patch = self.applied = self.patch
        self.patch = self.plain.control = None
        assert patch is not None
        if self._rule is not None:
            patch = self.applied = self._lower(patch, self._rule)
        self._entry.note(PATCHED, True)
        patch.apply()
        end = max(patch.block + patch.size, patch.linear + len(patch.trap))
        byte = self._patched.own_byte(patch.block, patch.block + patch.size, end)
        self._library.remove_cache(self._handle, byte, byte + 1)

    def _lower(self, patch: Patch, rule: RuleOf) -> Patch:
        """The patch that leads to lowered code, or ``patch`` itself, if it traps to a handler."""
        lowering, space = self.lowering, self._control.space
        if lowering is None:
            if space is None or not self._has_rule(patch, rule):
                return patch
            lowering = self.lowering = UnicornLowering(
                self._bank, self._registers, self._physical, space, rule, self.allowlist.traps,
                counted=self._count_lowered,
            )  # fmt: skip
            self._entry.lend(lowering.hidden.upper, lowering.hidden.lent)
        lowered = lowering.patch(patch)
        self._entry.due |= lowering.is_full
        return lowered

    def _has_rule(self, patch: Patch, rule: RuleOf) -> bool:
        """Whether the trapped instruction may be lowered: until one is, nothing is made ready."""
        if self._bank.bitness != 64:
            return False
        try:
            insn = decode(patch.slot.host[patch.offset : patch.offset + MAX_LENGTH], 64)
        except DecodeError:
            return False
        return rule(insn) is not None

    def restore(self) -> None:
        """Give the guest its own bytes back."""
        patch, self.applied = self.applied, None
        assert patch is not None
        self._entry.note(PATCHED, False)
        patch.restore()

    def code_written(self, physical: int, size: int) -> None:
        """A handler or a device wrote where translated code may be: make Unicorn forget it."""
        end = physical + size
        while physical < end:
            page = physical >> 12
            stop = min(end, (page + 1) << 12)
            for linear in self._physical.code_pages.get(page, ()):
                base = linear << 12
                first, last = base + physical % PAGE_SIZE, base + (stop - 1) % PAGE_SIZE + 1
                here = self._fetches_from(base, page)
                if not here or self._library.remove_cache(self._handle, first, last) != UC_ERR_OK:
                    self._library.flush_blocks(self._handle)
            physical = stop
        if not self._control.is_trusted:
            self._library.flush_blocks(self._handle)  # the linear addresses may be stale

    def _fetches_from(self, linear: int, physical: int) -> bool:
        """Whether code at a linear address comes from a physical page now: else Unicorn, which
        translates the address, would not find the blocks of that page."""
        try:
            slot, page = self._memory.code_page(linear)
        except (Fault, MmioRead):
            return False
        return (slot.base + page) >> 12 == physical
