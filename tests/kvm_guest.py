"""What tests of the engine ``kvm`` share: the same guest on both engines, compared exit by exit.

Some things hold for one kernel only: those are marked LOCAL; they were seen on the module
``kvm_pvm``, which emulates all code at CPL 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from guests.assemble import assemble
from sandbox.abi import KVM_CAP_EXIT_ON_EMULATION_FAILURE as CAP
from sandbox.boot import Machine, Mode, boot_flat
from sandbox.engine.kvm_device import unavailable
from sandbox.exits import EmulationFailure, Exit, Hlt, Intr, read_exit
from sandbox.registers import RSP
from sandbox.vm import ENGINES, Vm
from tests.guest import BASE, BITNESS, KERNEL_STACK, add_idt, enter_user_mode, quads

REASON = unavailable()
KVM = pytest.mark.skipif(REASON is not None, reason=f"no KVM: {REASON}")
"""For the tests that need it."""


GUESTS = sorted((Path(__file__).parent.parent / "guests" / "asm").glob("*.asm"))
HOLE = 0x7000_0000
"""Linear and guest physical address of a page with no memory behind it."""
FLAGS = 0xCD5 | 0x100
"""Status flags, DF and TF. RF is left out: Unicorn keeps it after the instruction it was for."""
FLDS = bytes.fromhex("d900")
"""flds [rax]: what the kernel's own tests use; no kernel emulates it."""
Left = tuple[Any, ...]


@contextmanager
def guest(
    engine: str,
    code: bytes | str,
    mode: Mode = "long",
    *,
    cap: bool = True,
    base: int = BASE,
    **options: Any,
) -> Iterator[Machine]:
    """A flat guest on ``engine``. The policy is the same for both; only Unicorn goes by it."""
    if isinstance(code, str):
        code = assemble(code, base, BITNESS[mode])
    with Vm(options.pop("policy", "baseline"), engine=engine, **options) as vm:
        vm.enable_cap(CAP, int(cap))
        yield boot_flat(vm, code, base, mode)


def seen(found: Machine, left: Exit) -> Left:
    """What both engines must agree on after an exit. Debug words are no ABI."""
    registers = found.vcpu.registers
    state = registers.rip, tuple(registers.gpr), registers.rflags & FLAGS
    if isinstance(left, EmulationFailure):
        assert len(left.debug) == 5
        fields: Left = (left.suberror, left.ndata, left.flags, left.insn_size, left.insn_bytes)
    else:
        fields = (left,)
    page = found.vcpu.page
    assert str(read_exit(page)) == str(left), "the page does not hold the exit"
    return page.run.exit_reason, *fields, *state


def compare(
    code: bytes | str,
    mode: Mode = "long",
    *,
    prepare: Callable[[Machine], None] | None = None,
    answer: Callable[[Machine, Exit], None] | None = None,
    exits: int = 20,
    **options: Any,
) -> list[Exit]:
    """Run on both engines until HLT, or ``exits`` exits; all must be alike. Those of KVM."""
    story: dict[str, list[Left]] = {}
    kept: list[Exit] = []
    for engine in ENGINES:
        with guest(engine, code, mode, **options) as found:
            if prepare is not None:
                prepare(found)
            story[engine], kept = [], []
            for _ in range(exits):
                left = found.vcpu.run(5)
                story[engine].append(seen(found, left))
                kept.append(left)
                if isinstance(left, (Hlt, Intr)):
                    break
                if answer is not None:
                    answer(found, left)
    assert story["kvm"] == story["unicorn"]
    return kept


def map_hole(found: Machine) -> None:
    """The page at HOLE, as in exit_on_emulation_failure_test.c: mapped, with no memory behind."""
    if found.space is not None:
        found.space.map(HOLE, HOLE, 0x1000, write=True, execute=True)


def skip(size: int) -> Callable[[Machine, Exit], None]:
    """Step over an instruction of ``size`` bytes that could not be emulated."""

    def answer(found: Machine, left: Exit) -> None:
        assert isinstance(left, EmulationFailure)
        found.vcpu.registers.rip += size

    return answer


VADDPS = bytes.fromhex("c5f458c2")
"""LOCAL: at CPL 0 ``kvm_pvm`` gives it to KVM's emulator, which knows no VEX."""


def vex_fails_at_cpl_0() -> bool:
    if REASON is not None:
        return False
    with guest("kvm", VADDPS + b"\xf4") as found:
        return isinstance(found.vcpu.run(5), EmulationFailure)


LOCAL = pytest.mark.skipif(
    not vex_fails_at_cpl_0(), reason="LOCAL: this kernel does not emulate code at CPL 0"
)


def through_the_idt(engine: str, text: str) -> tuple[int, list[int]]:
    """Run user code under a 64-bit IDT with all vectors: the one that came, and the stack there."""
    handlers = BASE + 0x100
    code = assemble(text, BASE).ljust(handlers - BASE, b"\xcc") + b"\xf4" * 256
    with guest(engine, code) as found:
        add_idt(found, {vector: handlers + vector for vector in range(256)})
        enter_user_mode(found)
        left = found.vcpu.run(5)
        assert isinstance(left, Hlt), left
        top = found.vcpu.registers.gpr[RSP]
        return found.vcpu.registers.rip - 1 - handlers, quads(found, top, (KERNEL_STACK - top) // 8)


def user_interrupt_vector(number: int) -> int:
    """The vector that INT ``number`` at CPL 3 raises under KVM: another one is the kernel's error,
    for the gate allows it."""
    return through_the_idt("kvm", f"int {number}")[0]
