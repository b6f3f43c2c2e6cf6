"""Into the guest and back: the number that comes back tells of all there is to see to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from sandbox.boot import Machine
from sandbox.engine import unicorn_entry
from sandbox.engine.protocol import Stop
from sandbox.engine.unicorn_entry import CHANGED, DUE, PATCHED, TRAPPED, UNTRUSTED, UnicornEntry
from sandbox.exits import GuestException
from sandbox.registers import RCX
from tests.guest import BASE, machine, own_tables, policy, run_to_hlt

TRAPS = "inc ecx\ncrc32 eax, ecx\nhlt"


def entry_of(found: Machine) -> UnicornEntry:
    engine: Any = found.vm.engine
    made = engine._entry
    assert isinstance(made, UnicornEntry)
    return made


@pytest.fixture(params=["machine code", "Python"])
def trapped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A guest that has stopped at a trapped instruction and been looked at."""
    if request.param == "Python":
        monkeypatch.setattr(unicorn_entry, "executable_page", lambda _code=b"": None)
    with machine(TRAPS, policy=policy("crc32")) as found:
        for _block in range(2):  # the one that ends in the trap, the one that begins with it
            found.vm.engine.enter()
        found.vm.engine.sync()
        yield found


def test_a_trap_and_nothing_else_is_told_by_one_number(trapped: Machine) -> None:
    assert entry_of(trapped).enter() == TRAPPED


def test_each_byte_of_the_control_state_is_compared(trapped: Machine) -> None:
    entry = entry_of(trapped)
    for at in range(len(entry.saved)):
        entry.saved[at] ^= 0x80
        assert entry.enter() == TRAPPED | CHANGED, at
        entry.saved[at] ^= 0x80
    assert entry.enter() == TRAPPED


def test_page_tables_that_the_guest_may_change_are_told(trapped: Machine) -> None:
    space = own_tables(trapped)
    trapped.vm.engine.bank.write("cr3", space.root)
    trapped.vm.engine.sync()
    trapped.vm.engine.enter()
    assert entry_of(trapped).enter() == TRAPPED | UNTRUSTED


def test_a_patch_in_place_is_told_until_it_is_taken_away(trapped: Machine) -> None:
    entry = entry_of(trapped)
    entry.note(PATCHED, True)
    assert entry.enter() == TRAPPED | PATCHED
    entry.note(PATCHED, False)
    assert entry.enter() == TRAPPED


def test_nothing_runs_while_something_is_due(trapped: Machine) -> None:
    entry, registers = entry_of(trapped), trapped.vcpu.registers
    registers.rip, entry.due = BASE, True
    assert entry.enter() == DUE
    assert (registers.rip, registers.gpr[RCX]) == (BASE, 1)
    assert trapped.vm.engine.enter() is Stop.INSN  # which sees to what is due
    assert not entry.due and registers.gpr[RCX] == 2


def test_lowered_code_does_not_outlive_avx() -> None:
    """XCR0 written from outside, not by the guest's XSETBV."""
    with machine(
        "vpaddd ymm0, ymm1, ymm2\nhlt", policy="verified", handlers=("integer", "avx2", "system")
    ) as found:
        for _round in range(2):
            found.vcpu.registers.rip = BASE
            run_to_hlt(found)
        assert found.vcpu.stats.lowered_sites == {"vpaddd": 1}
        found.vcpu.registers.xcr0 = 1
        found.vcpu.registers.rip = BASE
        left: Any = found.vcpu.run(10)
        assert isinstance(left, GuestException) and left.exception == 6
