"""A guest that is stopped at any time goes on as if it had not been.

Unicorn's own stop, from another thread, leaves the guest behind a store with RIP at the instruction
that has stored: what reads and writes memory would then be done twice. So each step here changes
its word in every round, and what that must be in the end is known without running it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from sandbox.boot import Machine
from sandbox.engine import unicorn_entry, unicorn_stop
from sandbox.engine.unicorn import UnicornEngine
from sandbox.exits import Mmio
from tests.guest import machine, run_to_hlt

ROUNDS = 1 << 20
DATA = 0x20_0000
DEVICE = 0x4000_0000
STEPS = {
    "add {word}, 3": 3 * ROUNDS,
    "sub {word}, 1": -ROUNDS,
    "inc {word}": ROUNDS,
    "stc; adc {word}, 0": ROUNDS,
    "mov edx, 5; lock xadd {word}, edx": 5 * ROUNDS,
    "btc {word}, 0; jnc even{n}; add {word}, 2; even{n}: nop": ROUNDS,
    "not {word}; dec {word}; neg {word}; sub {word}, 3": -ROUNDS,
    "mov eax, {word}; lea ebx, [eax + 1]; lock cmpxchg {word}, ebx": ROUNDS,
    "mov eax, 1; xchg {word}, eax; add {word}, eax": ROUNDS,
    "call one{n}; jmp after{n}; one{n}: inc {word}; ret; after{n}: nop": ROUNDS,
}
"""What changes a 32-bit word, and what is in it after ROUNDS rounds, if it was 0."""


def program() -> str:
    """A loop that does each step once a round, in a word of its own; it runs in 32 and 64 bits."""
    lines = [f"mov ebp, {ROUNDS}", "again:"]
    for number, step in enumerate(STEPS):
        at = hex(DATA + 64 * number)
        text = step.format(n=number, at=at, word=f"dword ptr [{at}]")
        lines += text.split("; ")
    return "\n".join([*lines, "dec ebp", "jnz again", "hlt"])


@contextmanager
def stopped_often(found: Machine) -> Iterator[list[int]]:
    """Another thread stops the engine as often as it can; yields how often."""
    engine, done, count = found.vm.engine, threading.Event(), [0]

    def stop() -> None:
        while not done.wait(0.0002):
            engine.stop()
            count[0] += 1

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        yield count
    finally:
        done.set()
        thread.join()


def words(found: Machine) -> dict[str, int]:
    memory = found.vm.memory
    return {
        step: int.from_bytes(memory.read(DATA + 64 * number, 4), "little")
        for number, step in enumerate(STEPS)
    }


def runs_whole_blocks(found: Machine) -> bool:
    engine: Any = found.vm.engine
    assert isinstance(engine, UnicornEngine)
    return engine.runs_whole_blocks


@pytest.fixture(params=["machine code", "Python"])
def entry(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts that let us make code, and others."""
    if request.param == "Python":
        for module in (unicorn_entry, unicorn_stop):
            monkeypatch.setattr(module, "executable_page", lambda _code=b"": None)


@pytest.mark.usefixtures("entry")
@pytest.mark.parametrize("mode", ["long", "protected", "long, with a device"])
def test_nothing_is_done_twice(mode: str) -> None:
    with machine(program(), "protected" if mode == "protected" else "long") as found:
        if mode == "long, with a device":
            assert found.space is not None
            found.space.map(DEVICE, DEVICE, 0x1000, write=True, execute=False)
        assert runs_whole_blocks(found) == (mode == "long")
        with stopped_often(found) as stops:
            run_to_hlt(found)
        assert stops[0] > 20
        assert words(found) == {step: count & 0xFFFF_FFFF for step, count in STEPS.items()}


ACCESSES = (f"mov eax, dword ptr [{DEVICE}]", f"mov dword ptr [{DEVICE}], ecx")
"""Unicorn leaves a block at such a load by itself, at a store only by looking for requests."""


def touches_device(access: str) -> str:
    return f"mov ecx, 1\n{access}\ninc ecx\nmov dword ptr [{DATA}], ecx\nhlt"


def ends_at_the_access(found: Machine, start: int, access: str) -> None:
    """Run from ``start``: the exit comes before what stands behind the access, then that runs."""
    found.vm.memory.load(DATA, bytes(4))
    found.vcpu.registers.rip = start
    left: Any = found.vcpu.run(10)
    assert isinstance(left, Mmio) and left.phys_addr == DEVICE
    assert left.is_write == access.endswith("ecx")
    assert found.vcpu.registers.gpr[1] == 1 and not any(found.vm.memory.read(DATA, 4))
    if not left.is_write:
        left.value = 0x1234
    run_to_hlt(found)
    assert found.vcpu.registers.gpr[1] == 2
    assert left.is_write or found.vcpu.registers.gpr[0] == 0x1234
    assert found.vm.memory.read(DATA, 1) == b"\2"


@pytest.mark.parametrize("access", ACCESSES)
def test_a_block_ends_at_a_device_that_is_mapped_later(access: str) -> None:
    """The code has run as a whole block before: by then its page was memory."""
    with machine(touches_device(access)) as found:
        assert found.space is not None
        found.space.map(DEVICE, DATA + 0x1000, 0x1000, write=True, execute=False)
        start = found.vcpu.registers.rip
        run_to_hlt(found)
        assert runs_whole_blocks(found)
        found.space.map(DEVICE, DEVICE, 0x1000, write=True, execute=False)
        assert not runs_whole_blocks(found)
        ends_at_the_access(found, start, access)


@pytest.mark.parametrize("access", ACCESSES)
def test_a_block_ends_where_memory_was_taken_away(access: str) -> None:
    with machine(touches_device(access)) as found:
        assert found.space is not None
        found.vm.add_memory(DEVICE, 0x1000)
        found.space.map(DEVICE, DEVICE, 0x1000, write=True, execute=False)
        start = found.vcpu.registers.rip
        run_to_hlt(found)
        assert runs_whole_blocks(found)
        found.vm.memory.remove_slot(DEVICE)
        ends_at_the_access(found, start, access)


def test_read_only_memory_is_no_place_for_whole_blocks_once_it_may_be_written() -> None:
    with machine("hlt") as found:
        assert found.space is not None
        found.vm.add_memory(DEVICE, 0x1000, readonly=True)
        found.space.map(DEVICE, DEVICE, 0x1000, write=False, execute=False)
        assert runs_whole_blocks(found)
        found.space.protect(DEVICE, 0x1000, write=True, execute=False)
        assert not runs_whole_blocks(found)


@pytest.mark.parametrize("bit", [16, 31], ids=["WP", "PG"])
def test_a_guest_that_gets_around_its_page_tables_runs_no_whole_blocks(bit: int) -> None:
    with machine("hlt") as found:
        bank = found.vm.engine.bank
        assert runs_whole_blocks(found)
        bank.write("cr0", bank.read("cr0") & ~(1 << bit))
        assert not runs_whole_blocks(found)
        bank.write("cr0", bank.read("cr0") | 1 << bit)
        assert runs_whole_blocks(found)
