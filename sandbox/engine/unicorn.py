"""The fast path: Unicorn runs guest code natively, and only the forms it may run.

The allowlist costs nothing in steady state. Unicorn reports each block once, when it is
translated and before it first runs. The block is decoded there; if it holds a trapped
instruction, the engine stops, puts an invalid opcode over that instruction in host memory (where
Unicorn does not see the write), translates the block again, now ending in a trap, and restores the
bytes before the block runs: a guest that reads its own code sees its own bytes.

What a block may hold is for :mod:`sandbox.engine.allowlist` to say.
"""

from __future__ import annotations

import ctypes
import time
from collections import Counter
from collections.abc import Callable

from sandbox.cpu import PF_, Fault
from sandbox.decode import MAX_LENGTH, DecodeError, Insn, decode
from sandbox.engine.allowlist import Allowlist, Patch
from sandbox.engine.hidden import Place
from sandbox.engine.patched import PatchedBlocks
from sandbox.engine.plain import EXPECTED
from sandbox.engine.protocol import Entry, Stop
from sandbox.engine.unicorn_entry import DUE, ERRORS, TRAPPED, UnicornEntry
from sandbox.engine.unicorn_layout import state_address
from sandbox.engine.unicorn_library import (
    TRANSLATION_BLOCK,
    UC_ERR_FETCH_PROT,
    UC_ERR_FETCH_UNMAPPED,
    UC_ERR_INSN_INVALID,
    UC_ERR_OK,
    UC_ERR_READ_PROT,
    UC_ERR_READ_UNMAPPED,
    UC_ERR_WRITE_PROT,
    UC_ERR_WRITE_UNMAPPED,
    UC_HOOK_EDGE_GENERATED,
    UC_HOOK_INTR,
    UC_PROT_ALL,
    UC_PROT_READ_EXEC,
    EdgeCallback,
    InterruptCallback,
    library,
    x86,
)
from sandbox.engine.unicorn_lowering import RuleOf, UnicornLowering
from sandbox.engine.unicorn_state import CR0_PG, CR0_WP, EFER_LMA, UnicornBank
from sandbox.engine.unicorn_stop import Stopper
from sandbox.engine.unicorn_tlb import is_nearly_full, tlb_layout
from sandbox.errors import EngineError
from sandbox.exits import Exit, RunPage
from sandbox.memory import PAGE_SIZE, MmioRead, PhysicalMemory, Slot
from sandbox.paging import AddressSpace, PagedMemory, Walker
from sandbox.registers import TF

_MMIO_ERRORS = frozenset(
    {UC_ERR_READ_UNMAPPED, UC_ERR_WRITE_UNMAPPED, UC_ERR_WRITE_PROT, UC_ERR_READ_PROT}
)
_FETCH_ERRORS = frozenset({UC_ERR_FETCH_UNMAPPED, UC_ERR_FETCH_PROT})

_DEBUG, _BREAKPOINT = 1, 3
_TWO_BLOCKS = b"\xeb\x00\xf4"  # jmp $+2; hlt
FIRST_FLUSHES = 10
FLUSH_SECONDS = 0.2
_PAGED = CR0_PG | CR0_WP
"""Page tables stand between the guest and each access, CPL 0's stores too."""


class UnicornEngine:
    """A vCPU on Unicorn."""

    def __init__(self, physical: PhysicalMemory) -> None:
        self._library = library()
        self._handle = self._library.open()
        self._library.use_model(self._handle, x86.UC_CPU_X86_ICELAKE_SERVER)
        self._library.use_no_exits(self._handle)
        self._stopper = Stopper(self._handle)
        self._physical = physical
        self._bank = UnicornBank(self._handle)
        self.registers = self._bank.registers()
        walker = Walker(self._bank, physical)
        self.memory = PagedMemory(walker, physical)
        self.system_memory = PagedMemory(walker, physical, implicit=True)
        self._trusted: AddressSpace | None = None
        self._lowering: UnicornLowering | None = None
        self._strayed: tuple[int, int] | None = None
        """Block (address, size) in hidden memory that is no instruction of ours."""
        self.page = RunPage()
        self.left: Exit | None = None
        self.vector = self.error_code = self.generation = 0
        self._reported: list[int] = []
        self._allowlist = Allowlist(self._bank, physical, self.memory, self.system_memory)
        self._plain = self._allowlist.plain
        self._patch: Patch | None = None
        self._applied: Patch | None = None
        self._exception = -1
        self._failure: BaseException | None = None
        self._entry = UnicornEntry(self._handle, self._bank)
        self._control = self._entry.control
        self._controlled = b""
        self.registers.on_xcr0 = self._xcr0_written
        self.sync = self._make_sync()
        self._untrusted = False
        """Whether the guest runs under page tables that it may change without our knowing."""
        self._stale: tuple[int, int] | None = None
        """Block (address, size) that Unicorn may have translated through an old TLB entry."""
        self._fresh = self._stepped = -1
        """Address of the block that is about to be, or was last, translated from a flushed TLB."""
        self._stepping = False
        self._patched = PatchedBlocks()
        self._rule: RuleOf | None = None
        self._count_lowered = False
        self._flushes = 0
        self._next_flush = 0.0
        self._closed = False
        self._add_hooks()
        self._first_blocks()
        self._bank.on_control = self._control_written
        for slot in physical.slots:
            self._map(slot)
        physical.on_slot.append(self._map)
        physical.on_unslot.append(self._unmap)
        physical.on_code_write = self._code_written

    def trust(self, space: AddressSpace) -> None:
        self._trusted = space
        self._choose_stops()

    @property
    def _trusted_root(self) -> int | None:
        return None if self._trusted is None else self._trusted.root

    @property
    def bank(self) -> UnicornBank:
        return self._bank

    @property
    def on_float_control(self) -> Callable[[str, int], None]:
        return self._bank.on_float_control

    @on_float_control.setter
    def on_float_control(self, call: Callable[[str, int], None]) -> None:
        self._bank.on_float_control = call

    def _add_hooks(self) -> None:
        call = self._library.call
        self._callbacks = (
            EdgeCallback(self._make_on_block()),
            InterruptCallback(self._on_interrupt),
        )
        always = ctypes.c_uint64(1), ctypes.c_uint64(0)  # begin > end: at every address
        for kind, callback in zip(
            (UC_HOOK_EDGE_GENERATED, UC_HOOK_INTR), self._callbacks, strict=True
        ):
            hook = ctypes.c_size_t()
            error = call.uc_hook_add(
                self._handle, ctypes.byref(hook), kind, callback, None, *always
            )
            self._library.check(error, "uc_hook_add")

    @property
    def entry(self) -> Entry:
        return Entry(self._entry.enter, TRAPPED, self._classify)

    def enter(self) -> Stop:
        while True:
            code = self._entry.enter()
            stop = Stop.INSN if code == TRAPPED else self._classify(code)
            if stop is not None:
                return stop

    def _revise(self) -> None:
        """Bring lowered code in line with what the machine did while the guest was stopped."""
        lowering = self._lowering
        self._entry.due = False
        if lowering is None:
            return
        if (lowering.was_valid() and not lowering.is_valid()) or lowering.is_full:
            lowering.clear()
            self._library.flush_blocks(self._handle)

    def _first_blocks(self) -> None:
        """Run two blocks of our own, and see that blocks are reported from then on.

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
            self._reported.clear()
            self.registers.rip = page
            check(self._entry.start(), "uc_emu_start")
            self._library.flush_blocks(self._handle)
        if self._reported != [page, page + 2]:
            raise EngineError("this build of Unicorn does not report the blocks it translates")
        check(call.uc_mem_unmap(self._handle, *where), "uc_mem_unmap")
        self.registers.rip = 0

    def _map(self, slot: Slot) -> None:
        error = self._library.call.uc_mem_map_ptr(
            self._handle,
            ctypes.c_uint64(slot.base),
            ctypes.c_size_t(slot.size),
            UC_PROT_READ_EXEC if slot.readonly else UC_PROT_ALL,
            ctypes.c_void_p(slot.address),
        )
        self._library.check(error, f"mapping the slot at {slot.base:#x}")
        self._flush()

    def _unmap(self, slot: Slot) -> None:
        error = self._library.call.uc_mem_unmap(
            self._handle, ctypes.c_uint64(slot.base), ctypes.c_size_t(slot.size)
        )
        self._library.check(error, f"unmapping the slot at {slot.base:#x}")
        self._library.flush_blocks(self._handle)
        self._flush()

    # -- running ------------------------------------------------------------------------------

    def _classify(self, code: int) -> Stop | None:
        """What a stop other than the plain trap means; None: go on."""
        if code & DUE:
            self._revise()
            return None
        error = code & ERRORS
        if error == UC_ERR_INSN_INVALID and self._applied is None:
            return Stop.INSN
        if self._applied is not None:
            self._restore()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        lowering = self._lowering
        if lowering is not None:
            done = lowering.bailed()
            if done is not None:
                self._entry.due |= lowering.is_full
                return None if done else Stop.INSN
            place = lowering.place(self.registers.rip)
            if place:
                return self._surface(place, error)
        if self._exception >= 0:
            self.vector, self._exception = self._exception, -1
            stop = self._excepted()
            early = self.vector == PF_ and self._bank.read("cr2") % PAGE_SIZE < MAX_LENGTH
            return self._failed_fetch(stop) if early else stop
        if error == UC_ERR_INSN_INVALID:
            return Stop.INSN
        if self._patch is not None:
            self._apply()
            return None
        if self._stale is not None:
            self._refresh()
            return None
        if self._strayed is not None:
            return self._expel(*self._strayed)
        if error in _MMIO_ERRORS:
            return Stop.MMIO
        if error in _FETCH_ERRORS:
            return self._failed_fetch(Stop.FETCH)
        self._library.check(error, f"running at {self.registers.rip:#x}")
        assert error == UC_ERR_OK
        if self._lowering is not None:
            self._lowering.leave_patch(self.memory)
        return Stop.ASKED

    def _surface(self, place: Place, error: int) -> Stop | None:
        """The guest stopped in hidden code: bring it back to its own.

        A lowered instruction that cannot go on has changed nothing yet: the handler has it.
        """
        lowering = self._lowering
        assert lowering is not None
        stop = Stop.ASKED
        if self._exception >= 0:
            self.vector, self._exception = self._exception, -1
            stop = self._excepted()
        elif error in _MMIO_ERRORS:
            stop = Stop.MMIO
        elif not place.whole:
            return self._step_on(lowering)
        lowering.surface(place)
        return Stop.INSN if stop is not Stop.ASKED and place.lowered else stop

    def _step_on(self, lowering: UnicornLowering) -> Stop | None:
        """Finish a guest instruction in hidden code, then stop as asked."""
        bank = self._bank
        flags, status = bank.read("rflags"), bank.read("dr6")
        while True:
            bank.write("rflags", bank.read("rflags") | TF)
            due, self._entry.due = self._entry.due, False  # not yet: the guest is in hidden code
            error = self._entry.enter() & ERRORS
            self._entry.due = due
            bank.write("rflags", bank.read("rflags") & ~TF | flags & TF)
            place = lowering.place(self.registers.rip)
            if self._exception == _DEBUG:
                self._exception = -1
                self._none_in_flight()
                bank.write("dr6", status)
                if place is not None and not place.whole:
                    continue
            if place is None:
                return Stop.ASKED
            return self._surface(place, error)

    def _excepted(self) -> Stop:
        words = self._bank.words
        code = words[self._bank.error_code_index]
        self.error_code = code - (1 << 32) if code >> 31 else code
        self._none_in_flight()
        if self.vector == _BREAKPOINT:
            self.registers.rip -= 1
            return Stop.INSN
        return Stop.EXCEPTION

    def _none_in_flight(self) -> None:
        """Delivery is ours: Unicorn must not take the next exception for a double fault."""
        self._bank.words[self._bank.old_exception_index] = 0xFFFF_FFFF

    def _failed_fetch(self, stop: Stop) -> Stop | None:
        """A fetch failed; if it was not due yet, run what comes before it.

        Unicorn translates a block as a whole before it runs it, also where the block runs on into
        a page that cannot be fetched. Then RIP is at an instruction that can: it is run alone.
        """
        if self._stepping or not self._is_fetchable():
            return stop
        self._stepping = True
        try:
            return self._step()
        finally:
            self._stepping = False

    def _is_fetchable(self) -> bool:
        """Whether the instruction at RIP lies in its page as a whole and can be fetched."""
        self.sync()
        bank = self._bank
        linear = self.registers.rip
        if bank.bitness != 64:
            linear = (bank.quads[bank.cs_base_index] + linear) & 0xFFFF_FFFF
        try:
            code = self.memory.fetch(linear, min(MAX_LENGTH, PAGE_SIZE - linear % PAGE_SIZE))
            decode(code, bank.bitness)
        except (Fault, MmioRead, DecodeError):
            return False
        return True

    def _step(self) -> Stop | None:
        """Run one instruction by TF: Unicorn then translates it alone, and raises #DB after it."""
        bank = self._bank
        flags, status = bank.read("rflags"), bank.read("dr6")
        bank.write("rflags", flags | TF)
        stop = self.enter()
        bank.write("rflags", bank.read("rflags") & ~TF | flags & TF)
        if stop is Stop.EXCEPTION and self.vector == _DEBUG and not flags & TF:
            bank.write("dr6", status)
            return None
        return stop

    def stop(self) -> None:
        if not self._closed:
            self._stopper.stop()

    @property
    def runs_whole_blocks(self) -> bool:
        """Whether a block, once begun, is run to its end, unless it faults."""
        return self._stopper.between_blocks

    def _choose_stops(self) -> None:
        """See to it that blocks run as a whole, if and only if each access is to memory."""
        space, bank = self._trusted, self._bank
        whole = (
            space is not None
            and space.only_memory
            and bank.quads[bank.cr_index + 3] == space.root
            and bank.read("cr0") & _PAGED == _PAGED
            and bank.read("efer") & EFER_LMA != 0
        )
        if self._stopper.run_whole_blocks(whole):
            self._library.flush_blocks(self._handle)

    def failure(self) -> Exit | None:
        """None: Unicorn reports no bytes."""
        return None

    def run_user_code(self, space: AddressSpace) -> None:
        """Nothing: what leaves user code is trapped."""

    def set_exit_on_failure(self, on: bool) -> None:
        """Nothing: the run loop goes by the settings."""

    def tick(self) -> None:
        """Let Unicorn's TLB grow with the guest's working set; call it while the guest is stopped.

        QEMU doubles a TLB that it finds more than 70 % full when it is flushed, and only then;
        without flushes it keeps 256 entries, and a guest under paging pays a page walk for most
        accesses beyond 1 MiB. One that is not so full would be made smaller. So a full one is
        flushed at the first stops, then seldom, since what is in use has to be walked again.
        """
        now = time.monotonic()
        if self._flushes < FIRST_FLUSHES or now >= self._next_flush:
            self._flushes += 1
            self._next_flush = now + FLUSH_SECONDS
            found = tlb_layout()
            if found is None or is_nearly_full(state_address(self._handle), found):
                self._bank.flush_tlb()

    def _make_sync(self) -> Callable[[], None]:
        control, saved = self._control.tobytes, self._entry.saved.tobytes

        def sync() -> None:
            if self._untrusted or control() != saved():
                self._control_changed()

        return sync

    def _control_changed(self) -> None:
        self._entry.saved[:] = self._control
        self._controlled = self._control.tobytes()
        quads, cr = self._bank.quads, self._bank.cr_index
        self._untrusted = quads[cr] & CR0_PG != 0 and quads[cr + 3] != self._trusted_root
        self._note()
        self._flush()

    def _note(self) -> None:
        """A patch in place and page tables that may have changed are to be seen to at each stop."""
        self._entry.notice = self._applied is not None or self._untrusted

    def _flush(self) -> None:
        self._none_in_flight()  # Unicorn itself may have faulted, looking for the blocks of a page
        self.generation += 1
        self._entry.due = self._lowering is not None
        self._plain.forget()
        self.memory.flush()
        self.system_memory.flush()

    def _xcr0_written(self) -> None:
        self._entry.due = self._lowering is not None

    def _control_written(self) -> None:
        self._flush()
        self._choose_stops()

    def flush_translations(self) -> None:
        self._flush()
        self._choose_stops()
        self._bank.flush_tlb()

    def set_traps(
        self,
        traps: bytes,
        traps_insn: Callable[[Insn], bool] | None = None,
        lowered: RuleOf | None = None,
        *,
        count: bool = False,
    ) -> None:
        self._allowlist.set_traps(traps, traps_insn)
        self._rule, self._count_lowered = lowered, count
        if self._lowering is not None:
            self._lowering.clear()
        self._library.flush_blocks(self._handle)

    def lowers(self, insn: Insn) -> bool:
        lowering = self._lowering if self._rule is not None else None
        return lowering is not None and lowering.lowers(insn)

    def lowered(self) -> tuple[Counter[str], Counter[str]]:
        runs = self._lowering and self._lowering.runs
        return (runs.sites(), runs.executions()) if runs else (Counter(), Counter())

    def traps(self, insn: Insn) -> bool:
        """Whether ``insn`` would be trapped, going by its form and its bytes."""
        return self._allowlist.traps(insn)

    def close(self) -> None:
        """Free the engine; it must not be running."""
        if not self._closed:
            self._closed = True
            self._physical.on_slot.remove(self._map)
            self._physical.on_unslot.remove(self._unmap)
            self._bank.detach(self.registers)
            self._library.call.uc_close(self._handle)

    # -- callbacks: they note what happened and stop, nothing else ------------------------------

    def _on_interrupt(self, _handle: int, vector: int, _data: int) -> None:
        self._exception = vector
        self._library.free.uc_emu_stop(self._handle)

    def _make_on_block(self) -> Callable[[int, int], None]:
        """The callback for new blocks: plain code is recognised here, all else is looked at."""
        plain, control, look, expected = self._plain, self._control, self._on_block, EXPECTED
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
                self._failure = error
            if (self._patch, self._stale, self._failure) != (None, None, None):
                self._library.free.uc_emu_stop(self._handle)

        return on_block

    def _on_block(self, start: int, size: int, count: int) -> None:
        if not self._allowlist:
            self._reported.append(start)
            return
        lowering = self._lowering
        if lowering is not None and lowering.holds(start):
            if start not in lowering.hidden.places:
                self._strayed = start, size
                self._library.free.uc_emu_stop(self._handle)
            return
        applied = self._applied
        if applied is not None:
            self._restore()
        if applied is not None and applied.block == start:
            self._patch = self._allowlist.check_trapped(applied, size, count)
            if self._patch is not None and lowering is not None:
                lowering.refuse(applied.linear)
        elif self._may_be_stale(start, count):
            self._stale = start, size
        else:
            self._patch = self._allowlist.check(start, size, count)
        self._plain.control = None if self._untrusted else self._controlled

    # -- the allowlist ----------------------------------------------------------------------------

    def _may_be_stale(self, start: int, count: int) -> bool:
        """Whether Unicorn may have fetched a new block from elsewhere than page tables say now.

        A guest that changes its own page tables without flushing the TLB runs on from the old
        page, as on hardware; we read the new one and would check bytes that do not run. So each
        new block of such a guest is translated a second time, from a flushed TLB. A store into its
        own block is excepted: Unicorn then translates that instruction alone, once, to run it.
        """
        self.sync()
        if not self._untrusted:
            return False
        fresh, self._fresh = self._fresh, -1
        if start == fresh:
            self._stepped = start
            return False
        return count != 1 or start != self._stepped

    def _expel(self, start: int, size: int) -> Stop:
        """The guest jumped into hidden memory, between instructions: there is nothing for it."""
        self._strayed = None
        self._forget(start, size)
        return Stop.FETCH

    def _forget(self, start: int, size: int) -> None:
        """Have Unicorn translate a block again, if it comes there again."""
        if self._library.remove_cache(self._handle, start, start + size) != UC_ERR_OK:
            self._library.flush_blocks(self._handle)

    def _refresh(self) -> None:
        assert self._stale is not None
        (start, size), self._stale = self._stale, None
        self._forget(start, size)
        self._bank.flush_tlb()
        self._fresh = start

    def _apply(self) -> None:
        patch = self._applied = self._patch
        self._patch = self._plain.control = None
        assert patch is not None
        if self._rule is not None:
            patch = self._applied = self._lower(patch, self._rule)
        self._note()
        patch.apply()
        end = max(patch.block + patch.size, patch.linear + len(patch.trap))
        byte = self._patched.own_byte(patch.block, patch.block + patch.size, end)
        self._library.remove_cache(self._handle, byte, byte + 1)

    def _lower(self, patch: Patch, rule: RuleOf) -> Patch:
        """The patch that leads to lowered code, or ``patch`` itself, if it traps to a handler."""
        lowering = self._lowering
        if lowering is None:
            if self._trusted is None or not self._has_rule(patch, rule):
                return patch
            lowering = self._lowering = UnicornLowering(
                self._bank, self.registers, self._physical, self._trusted, rule, self.traps,
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

    def _restore(self) -> None:
        patch, self._applied = self._applied, None
        assert patch is not None
        self._note()
        patch.restore()

    def _code_written(self, physical: int, size: int) -> None:
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
        if self._bank.quads[self._bank.cr_index + 3] != self._trusted_root:
            self._library.flush_blocks(self._handle)  # the linear addresses may be stale

    def _fetches_from(self, linear: int, physical: int) -> bool:
        """Whether code at a linear address comes from a physical page now: else Unicorn, which
        translates the address, would not find the blocks of that page."""
        try:
            slot, page = self.memory.code_page(linear)
        except (Fault, MmioRead):
            return False
        return (slot.base + page) >> 12 == physical
