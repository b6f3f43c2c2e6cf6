"""Lowered code in Unicorn: when it may be used, and how the guest's state comes back from it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Final, TypeAlias

from sandbox.cpu import Fault
from sandbox.decode import Insn, decode
from sandbox.engine.allowlist import Patch
from sandbox.engine.hidden import HiddenMemory, Place
from sandbox.engine.host_builder import HostBuilder
from sandbox.engine.lowered_run import RunBuilder
from sandbox.engine.unicorn_layout import state_address
from sandbox.engine.unicorn_state import UnicornBank
from sandbox.engine.unicorn_tlb import pages_in_use, tlb_layout
from sandbox.lowering import Lowering
from sandbox.memory import PAGE_SIZE, MmioRead, PhysicalMemory
from sandbox.paging import AddressSpace, PagedMemory
from sandbox.registers import TF, Registers

CR0_EM = 1 << 2
MASKS: Final = 0x1F80
"""All exceptions masked, in MXCSR."""
CR4_OSFXSR, CR4_OSXSAVE, CR4_SMEP, CR4_SMAP = 1 << 9, 1 << 18, 1 << 20, 1 << 21
XCR0_AVX_STATE, XCR0_AVX512_STATE = 0b110, 0xE0
MAX_BLOCK: Final = 400
"""Instructions in a block: one that is longer may be cut by the padding of a patch."""

NOP: Final = decode(b"\x90", 64)

RuleOf: TypeAlias = Callable[[Insn], Lowering | None]


class UnicornLowering:
    """The lowered code of one engine.

    While the guest runs, the upper halves of YMM registers are in hidden memory; while it is
    stopped, in the registers.
    """

    def __init__(
        self,
        bank: UnicornBank,
        registers: Registers,
        physical: PhysicalMemory,
        space: AddressSpace,
        rule: RuleOf,
        traps: Callable[[Insn], bool],
        *,
        counted: bool,
    ) -> None:
        self._bank = bank
        self._rule = rule
        self._traps = traps
        self._registers = registers
        self._root = space.root
        found = tlb_layout()
        in_use = () if found is None else pages_in_use(state_address(bank.handle), found)
        self.hidden = HiddenMemory(physical, space, registers, in_use)
        host = self._host_code = HostBuilder.make(
            bank.handle, self.hidden, traps, self._is_for_host
        )
        self.runs = RunBuilder(self.hidden, rule, traps, counted=counted, host=host)
        self._refused: set[int] = set()
        self._seen = (0, 0, 0, 0)
        self._valid = False

    def _is_for_host(self, insn: Insn) -> bool:
        """Whether a trapped instruction may be done by the host: a policy that traps even a NOP
        wants everything to go to the handlers."""
        if not self._traps(insn) or self._traps(NOP):
            return False
        lowering = self._rule(insn)
        return lowering is not None and lowering.on_host

    @property
    def is_full(self) -> bool:
        """Whether there is no room for more code."""
        return self.runs.full

    def clear(self) -> None:
        """Forget all code. The engine must not be in it, and must forget its blocks."""
        self.runs.clear()
        self._refused.clear()

    def patch(self, trap: Patch) -> Patch:
        """The patch that has lowered code run in place of a trap, if there is such code."""
        at = trap.linear % PAGE_SIZE
        if trap.linear in self._refused or trap.count > MAX_BLOCK or not self.may_lower():
            return trap
        page = trap.offset - at
        run = self.runs.build(trap.linear, trap.slot.host[trap.offset : page + PAGE_SIZE])
        if run is None or not self.is_valid():
            return trap
        end = trap.offset + len(run.patch)
        original = trap.slot.host[trap.offset : end]
        count = trap.count - 1 + run.patch_count
        return Patch(
            trap.block, trap.linear, count, trap.slot, trap.offset, original, run.patch,
            trap.size, trap,
        )  # fmt: skip

    def refuse(self, linear: int) -> None:
        """Do not lower there any more: Unicorn ended the block elsewhere."""
        self._refused.add(linear)

    def may_lower(self) -> bool:
        """Whether the guest is in 64-bit mode and does not step itself."""
        return self._bank.bitness == 64 and not self._registers.rflags_view[0] & TF

    def is_valid(self) -> bool:
        """Whether AVX is on, and SSE; and the hidden pages are mapped and may be used.

        Not while there is AVX-512, for the upper halves of ZMM registers are not cleared.
        """
        quads, cr = self._bank.quads, self._bank.cr_index
        seen = quads[cr], quads[cr + 3], quads[cr + 4], self._registers.xcr0
        if seen != self._seen:
            self._seen = seen
            cr0, root, cr4, xcr0 = seen
            bits = cr4 & (CR4_OSFXSR | CR4_OSXSAVE | CR4_SMEP | CR4_SMAP)
            self._valid = (
                root == self._root
                and not cr0 & CR0_EM
                and bits == CR4_OSFXSR | CR4_OSXSAVE
                and xcr0 & (XCR0_AVX_STATE | XCR0_AVX512_STATE) == XCR0_AVX_STATE
            )
        return self._valid

    def was_valid(self) -> bool:
        """What :meth:`is_valid` said last."""
        return self._valid

    def holds(self, linear: int) -> bool:
        """Whether the hidden pages are at this address now."""
        return self._valid and self.hidden.holds(linear)

    def place(self, linear: int) -> Place | None:
        """What the guest is doing, if it stopped at ``linear`` in hidden code."""
        place = self.hidden.places.get(linear) if self.holds(linear) else None
        host = self._host_code
        if place is not None and host and (place.rip is None or host.memory.executed):
            host.memory.executed = False
            then = self.hidden.next_at(linear)
            place = self.hidden.places.get(then) or Place(then, True, (), False, ())
        return place

    def lowers(self, insn: Insn) -> bool:
        """Whether a trapped instruction is done without its handler."""
        lowering = self._rule(insn)
        if lowering is None or not self.may_lower():
            return False
        return lowering.rule is not None or self.runs.is_for_host(insn)

    def bailed(self) -> bool | None:
        """Whether a host run has stopped the guest: None if not, False if the instruction at RIP is
        for its handler, True if hidden code does it, to which the guest has been sent."""
        if not self._host_code or not self._host_code.memory.bailed:
            return None
        memory, registers = self._host_code.memory, self._registers
        address, memory.bailed, memory.executed = memory.bailed, 0, False
        registers.rip = self.hidden.next_at(registers.rip)
        entry = self.runs.instead(address, unmasked=self._registers.mxcsr & MASKS != MASKS)
        if entry is None:
            return False
        self._registers.rip = entry
        return True

    def leave_patch(self, memory: PagedMemory) -> None:
        """The guest has stopped: if at the jump in a patch, it has not begun what the run does.

        Unicorn stops in the middle of a block too, at an access to memory.
        """
        run = self.runs.jumps.get(self._registers.rip)
        if run is not None:
            linear, code = run
            with suppress(Fault, MmioRead):
                if memory.fetch(linear, len(code)) == code:  # else other code stands there now
                    self._registers.rip = linear

    def surface(self, place: Place) -> None:
        """Let the guest be where it thinks it is."""
        self.hidden.restore(place)
        self.runs.leave(place)
        assert place.rip is not None
        self._registers.rip = place.rip
