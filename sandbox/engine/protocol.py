"""What a vCPU asks of an engine: the contract that Unicorn and Linux KVM both fulfil."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Protocol

from sandbox.decode import Insn
from sandbox.exits import Exit, RunPage
from sandbox.lowering import Lowering
from sandbox.paging import AddressSpace, PagedMemory
from sandbox.registers import Bank, Registers


class Stop(IntEnum):
    """Why :meth:`Engine.enter` came back. RIP is at the instruction concerned."""

    INSN = 0
    """An instruction that the engine cannot run or must not run."""
    EXCEPTION = 1
    """The guest raised an exception: see ``vector`` and ``error_code``."""
    MMIO = 2
    """An instruction touched guest physical memory that is in no slot, or wrote to ROM."""
    FETCH = 3
    """The next instruction lies in no slot."""
    ASKED = 4
    """:meth:`Engine.stop` was called."""
    EXIT = 5
    """An exit that the engine itself made: see ``left``; it stands in ``page`` already."""


NEVER: Final = -1


@dataclass(frozen=True, slots=True)
class Entry:
    """:meth:`Engine.enter` in two steps, for a loop that has to be fast."""

    enter: Callable[[], int]
    """Runs from RIP."""
    trapped: int
    """What ``enter`` returns for ``Stop.INSN`` if :meth:`Engine.sync` would do nothing."""
    classify: Callable[[int], Stop | None]
    """What something else means; None: enter again."""

    @staticmethod
    def of(enter: Callable[[], Stop]) -> Entry:
        """In one step."""
        return Entry(enter, NEVER, Stop)


class EngineBank(Bank, Protocol):
    """The registers of an engine, which can also start in other modes than long mode."""

    def leave_long_mode(self) -> None:
        """Clear EFER, LMA too: for a guest that starts in real or protected mode."""
        ...


class Engine(Protocol):
    """Runs guest code until something needs the machine."""

    registers: Registers
    page: RunPage
    """What the vCPU shares with its user."""
    left: Exit | None
    """After ``Stop.EXIT``: the exit."""
    on_float_control: Callable[[str, int], None]
    """Called with name and value after each write of ``mxcsr`` or ``fpcw`` to the registers."""
    memory: PagedMemory
    """Guest memory with the rights of the running code."""
    system_memory: PagedMemory
    """The same with the rights of the processor itself (descriptor tables, event delivery)."""
    vector: int
    error_code: int
    generation: int
    """Changes whenever what was found at a linear address may no longer hold."""

    @property
    def bank(self) -> EngineBank: ...

    def enter(self) -> Stop:
        """Run from RIP; no other method but :meth:`stop` may be called meanwhile."""
        ...

    @property
    def entry(self) -> Entry: ...

    def stop(self) -> None:
        """Make :meth:`enter` come back soon; may be called from any thread."""
        ...

    def trust(self, space: AddressSpace) -> None:
        """``space`` holds page tables that only the machine changes."""
        ...

    def set_traps(
        self,
        traps: bytes,
        traps_insn: Callable[[Insn], bool] | None = None,
        lowered: Callable[[Insn], Lowering | None] | None = None,
        *,
        count: bool = False,
    ) -> None:
        """Which forms (indexed by iced-x86 ``Code``) are never run; takes effect at once.

        Items are ``policy.ALLOW``, ``TRAP`` or ``ASK``: of the latter forms ``traps_insn`` is asked
        about each instruction when its block is translated. ``lowered``: how a trapped instruction
        may be lowered, if it may; an engine that cannot do so ignores it. ``count``: count how
        often lowered instructions run.
        """
        ...

    def lowered(self) -> tuple[Counter[str], Counter[str]]:
        """By mnemonic: how many instructions are lowered, and how often they ran, if counted."""
        ...

    def flush_translations(self) -> None:
        """Page tables were changed behind the guest's back."""
        ...

    def tick(self) -> None:
        """Housekeeping; called a few times a second between two :meth:`enter`."""
        ...

    def failure(self) -> Exit | None:
        """The emulation failure that the engine itself reported for the instruction at RIP."""
        ...

    def run_user_code(self, space: AddressSpace) -> None:
        """What runs from now on is a program at CPL 3 in ``space`` that has no kernel."""
        ...

    def set_exit_on_failure(self, on: bool) -> None:
        """KVM_CAP_EXIT_ON_EMULATION_FAILURE was switched."""
        ...

    def sync(self) -> None:
        """Drop cached translations if the guest may have changed them; call after each stop."""
        ...

    def traps(self, insn: Insn) -> bool:
        """Whether ``insn`` would be trapped, going by its form and its bytes."""
        ...

    def lowers(self, insn: Insn) -> bool:
        """Whether ``insn``, which is trapped, may run as a sequence of allowed instructions."""
        ...

    def close(self) -> None: ...
