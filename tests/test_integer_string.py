"""String instructions: against the host CPU, with progress kept at faults."""

from __future__ import annotations

import random

import pytest

from handlers.integer_string import BATCH
from sandbox.cpu import PF_
from sandbox.decode import Insn, decode
from sandbox.handler import Resume
from sandbox.native import CODE, DATA, END, REGION, State
from sandbox.registers import DF, RAX, RCX, RDI, RSI, Segment
from tests.doubles import FlatMemory, make_cpu
from tests.integer_cases import Machine, assert_like_hardware, bind, needs_native

CODES = {"movs": ("a4", "a5"), "cmps": ("a6", "a7"), "stos": ("aa", "ab"), "lods": ("ac", "ad")}
CODES |= {"scas": ("ae", "af")}
WIDTHS = ("", "66", "48")


def encodings(stem: str) -> list[Insn]:
    """All sizes, without and with each repeat prefix, with both address sizes."""
    byte, word = CODES[stem]
    cores = [byte, *(prefix + word for prefix in WIDTHS)]
    prefixes = [p + r for p in ("", "67") for r in ("", "f2", "f3")]
    return [decode(bytes.fromhex(p + core), 64) for p in prefixes for core in cores]


def prepare(rng: random.Random, insn: Insn, state: State) -> None:
    """Indexes near each other or at an edge, alike bytes, either direction, small counts."""
    state.memory = bytes(rng.choice(b"\0\0\0\0\1\x80") for _ in range(512)) * 40
    places = (DATA + 0x900, DATA + 0x907, DATA + 0x1FFC, END - 20, END - 1, DATA + 3, REGION + 5)
    state.gpr[RSI], state.gpr[RDI] = rng.choice(places), rng.choice(places)
    state.gpr[RAX] = rng.choice((0, 0, 1, 0x80))
    state.gpr[RCX] = rng.choice((0, 1, 2, 3, 9, 40))
    if rng.random() < 0.4:
        state.rflags |= DF


@needs_native
@pytest.mark.parametrize("stem", CODES)
def test_strings(stem: str) -> None:
    assert_like_hardware(encodings(stem), states=25, prepare=prepare)


def test_a_faulting_repeat_keeps_its_progress_and_goes_on_when_the_page_is_there() -> None:
    memory = FlatMemory(0x10000, 0x4000)
    cpu = make_cpu(64, 0, memory)
    cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX] = 0x10000, 0x13FFD, 8
    memory.data[:8] = b"abcdefgh"
    action = bind(cpu, decode(b"\xf3\xa4", 64))
    with pytest.raises(Exception) as caught:
        action()
    assert caught.value.args == (PF_, 2, 0x14000)
    assert (cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX]) == (0x10003, 0x14000, 5)
    memory.data.extend(bytes(0x1000))
    action()
    assert (cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX]) == (0x10008, 0x14005, 0)
    assert memory.data[0x3FFD:0x4005] == b"abcdefgh"


def test_a_long_repeat_stays_at_the_instruction_between_batches() -> None:
    machine = Machine()
    state = State()
    state.gpr[RDI], state.gpr[RCX], state.gpr[RAX] = DATA, 3 * BATCH, 0x5A
    action = bind(machine.cpu, decode(b"\xf3\xaa", 64))
    outcome = machine.run(action, state)  # follows the verdicts
    assert outcome.memory[0x1000 : 0x1000 + 3 * BATCH] == b"\x5a" * (3 * BATCH)
    assert outcome.gpr[RCX] == 0
    machine.cpu.gpr[RDI], machine.cpu.gpr[RCX] = DATA, BATCH + 1
    assert action() == Resume(CODE)
    assert machine.cpu.gpr[RCX] == 1
    assert action() is None


def test_16_bit_indexes_wrap_and_use_the_segments() -> None:
    """MOVSB in real mode: DS:SI to ES:DI, SI and DI wrap in 16 bits."""
    cpu = make_cpu(16, 0, FlatMemory(0, 0x40000))
    cpu.registers.bank.write_segment("ds", Segment(base=0x10000))
    cpu.registers.bank.write_segment("es", Segment(base=0x20000))
    cpu.gpr[RSI], cpu.gpr[RDI], cpu.gpr[RCX] = 0xAAAA_FFFF, 0xBBBB_0010, 0xCCCC_0002
    cpu.write(0x1FFFF, b"x")
    cpu.write(0x10000, b"y")
    bind(cpu, decode(b"\xf3\xa4", 16))()
    assert cpu.read(0x20010, 2) == b"xy"
    assert list(cpu.gpr[RCX : RCX + 1]) == [0xCCCC_0000]
    assert (cpu.gpr[RSI], cpu.gpr[RDI]) == (0xAAAA_0001, 0xBBBB_0012)


def test_a_segment_prefix_moves_the_source_alone() -> None:
    cpu = make_cpu(64, 0)
    cpu.registers.bank.write_segment("fs", Segment(base=0x10000))
    cpu.gpr[RSI], cpu.gpr[RDI] = 0x100, 0x10200
    cpu.write(0x10100, b"z")
    bind(cpu, decode(b"\x64\xa4", 64))()
    assert cpu.read(0x10200, 1) == b"z"
