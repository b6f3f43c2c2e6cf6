"""The fast path: Unicorn runs guest code natively, and only the forms it may run.

The allowlist costs nothing in steady state: blocks are looked at when they are translated
(:mod:`sandbox.engine.unicorn_blocks`). What a block may hold is for
:mod:`sandbox.engine.allowlist` to say.
"""

from __future__ import annotations

import ctypes
import time
from collections import Counter
from collections.abc import Callable

from sandbox.cpu import PF_, Fault
from sandbox.decode import MAX_LENGTH, DecodeError, decode
from sandbox.engine.hidden import Place
from sandbox.engine.protocol import Entry, Stop
from sandbox.engine.unicorn_blocks import Blocks
from sandbox.engine.unicorn_control import Control
from sandbox.engine.unicorn_entry import DUE, ERRORS, TRAPPED, UnicornEntry
from sandbox.engine.unicorn_layout import state_address
from sandbox.engine.unicorn_library import (
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
    InterruptCallback,
    library,
    x86,
)
from sandbox.engine.unicorn_lowering import UnicornLowering
from sandbox.engine.unicorn_state import UnicornBank
from sandbox.engine.unicorn_stop import Stopper
from sandbox.engine.unicorn_tlb import is_nearly_full, tlb_layout
from sandbox.exits import Exit, RunPage
from sandbox.memory import PAGE_SIZE, MmioRead, PhysicalMemory, Slot
from sandbox.paging import AddressSpace, PagedMemory, Walker
from sandbox.registers import TF

_MMIO_ERRORS = frozenset(
    {UC_ERR_READ_UNMAPPED, UC_ERR_WRITE_UNMAPPED, UC_ERR_WRITE_PROT, UC_ERR_READ_PROT}
)
_FETCH_ERRORS = frozenset({UC_ERR_FETCH_UNMAPPED, UC_ERR_FETCH_PROT})

_DEBUG, _BREAKPOINT = 1, 3
FIRST_FLUSHES = 10
FLUSH_SECONDS = 0.2


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
        self.page = RunPage()
        self.left: Exit | None = None
        self.vector = self.error_code = self.generation = 0
        self._exception = -1
        self._entry = UnicornEntry(self._handle, self._bank)
        self._control = Control(self._bank, self._entry, self._flush)
        self.sync = self._control.sync
        self._blocks = Blocks(
            self._bank, self.registers, physical, self.memory, self.system_memory, self._entry,
            self._control,
        )  # fmt: skip
        self.set_traps, self.lowers = self._blocks.set_traps, self._blocks.lowers
        self.traps = self._blocks.allowlist.traps
        self.registers.on_xcr0 = self._xcr0_written
        self._stepping = False
        self._flushes = 0
        self._next_flush = 0.0
        self._closed = False
        self._add_hooks()
        self._blocks.check_reports()
        self._bank.on_control = self._control_written
        for slot in physical.slots:
            self._map(slot)
        physical.on_slot.append(self._map)
        physical.on_unslot.append(self._unmap)
        physical.on_code_write = self._blocks.code_written

    def trust(self, space: AddressSpace) -> None:
        self._control.space = space
        self._choose_stops()

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
            self._blocks.callback,
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
            self._blocks.revise()
            return None
        error, blocks = code & ERRORS, self._blocks
        if blocks.applied is not None:
            blocks.restore()
        elif error == UC_ERR_INSN_INVALID:
            return Stop.INSN
        if blocks.failure is not None:
            failure, blocks.failure = blocks.failure, None
            raise failure
        lowering = blocks.lowering
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
        if blocks.retranslate():
            return None
        if blocks.has_strayed():
            return Stop.FETCH
        if error in _MMIO_ERRORS:
            return Stop.MMIO
        if error in _FETCH_ERRORS:
            return self._failed_fetch(Stop.FETCH)
        self._library.check(error, f"running at {self.registers.rip:#x}")
        assert error == UC_ERR_OK
        if lowering is not None:
            lowering.leave_patch(self.memory)
        return Stop.ASKED

    def _surface(self, place: Place, error: int) -> Stop | None:
        """The guest stopped in hidden code: bring it back to its own.

        A lowered instruction that cannot go on has changed nothing yet: the handler has it.
        """
        lowering = self._blocks.lowering
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
        return self._stopper.whole_blocks

    def _choose_stops(self) -> None:
        """See to it that blocks run as a whole, if and only if each access is to memory."""
        if self._stopper.run_whole_blocks(self._control.only_memory):
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

    def _flush(self) -> None:
        self._none_in_flight()  # Unicorn itself may have faulted, looking for the blocks of a page
        self.generation += 1
        self._entry.due = self._blocks.lowering is not None
        self._blocks.plain.forget()
        self.memory.flush()
        self.system_memory.flush()

    def _xcr0_written(self) -> None:
        self._entry.due = self._blocks.lowering is not None

    def _control_written(self) -> None:
        self._flush()
        self._choose_stops()

    def flush_translations(self) -> None:
        self._flush()
        self._choose_stops()
        self._bank.flush_tlb()

    def lowered(self) -> tuple[Counter[str], Counter[str]]:
        lowering = self._blocks.lowering
        runs = lowering and lowering.runs
        return (runs.sites(), runs.executions()) if runs else (Counter(), Counter())

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
