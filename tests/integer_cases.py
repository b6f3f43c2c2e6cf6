"""Differential testing of the integer handlers against the host CPU, on the doubles."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import pytest
from iced_x86 import OpKind

from handlers.integer import REGISTERS
from handlers.integer_pack import PACK
from sandbox.cpu import Cpu, Fault
from sandbox.decode import Insn
from sandbox.encodings import encodings, forms_of
from sandbox.handler import Action, Resume
from sandbox.native import (
    CODE,
    DATA,
    END,
    READONLY,
    REGION,
    REGION_SIZE,
    NativeCpu,
    Result,
    State,
    missing_features,
)
from sandbox.registers import DF, RSP
from tests.doubles import DictBank, FlatMemory, make_cpu
from tests.undefined_flags import STATUS, undefined_flags

_reason = NativeCpu.available()
needs_native = pytest.mark.skipif(_reason is not None, reason=_reason or "")

SPECIAL = tuple(
    value & 0xFFFF_FFFF_FFFF_FFFF
    for value in (
        *(0, 1, 2, 4, 7, 8, 0x0F, 0x10, 0x1F, 0x20, 0x3F, 0x40, -1, -2, -8),
        *(0x5555555555555555, 0xAAAAAAAAAAAAAAAA, 0xFEFEFEFEFEFEFEFE),
        *(0x7F, 0x80, 0x7FFF, 0x8000, 0x7FFFFFFF, 0x80000000, 0x7FFFFFFFFFFFFFFF, 1 << 63),
        *(0xFF, 0xFFFF, 0xFFFFFFFF, 0x8080808080808080, 0x7F7F7F7F7F7F7F7F),
    )
)


def bind(cpu: Cpu, insn: Insn) -> Action:
    """The action of the first handler of the pack that takes ``insn``."""
    for handler in PACK.handlers:
        if insn.mnemonic in handler.mnemonics or insn.form in handler.forms:
            action = handler.bind(cpu, insn)
            if action is not None:
                return action
    raise LookupError(f"no handler for {insn.form}: {insn}")


def is_handled(insn: Insn) -> bool:
    try:
        bind(make_cpu(insn.bitness), insn)
    except LookupError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Outcome:
    gpr: list[int]
    rflags: int
    memory: bytes
    fault: Fault | None
    verdict: object = None


class Machine:
    """The handlers on the memory layout of the native CPU, at privilege level 3."""

    def __init__(self, bitness: int = 64) -> None:
        self.memory = FlatMemory(REGION, REGION_SIZE)
        self.memory.readonly = READONLY
        self.cpu = make_cpu(bitness, 3, self.memory)
        bank = self.cpu.registers.bank
        assert isinstance(bank, DictBank)
        self.bank = bank

    def run(self, action: Action, state: State) -> Outcome:
        """One execution; a verdict that stays at the instruction is followed."""
        for number, value in enumerate(state.gpr):
            self.cpu.gpr[number] = value
        self.bank.values["rflags"] = state.rflags
        self.memory.data[:] = state.memory
        self.cpu.registers.rip = CODE
        fault, verdict = None, None
        try:
            verdict = action()
            while isinstance(verdict, Resume) and verdict.rip == CODE:
                verdict = action()
        except Fault as error:
            fault = error
        flags = self.bank.values["rflags"]
        return Outcome(list(self.cpu.gpr), flags, bytes(self.memory.data), fault, verdict)


def random_state(rng: random.Random) -> State:
    """Registers and memory full of special operands."""
    values = [_operand(rng) for _ in range(16)]
    flags = rng.getrandbits(12) & STATUS
    words = [rng.choice(SPECIAL).to_bytes(8, "little") for _ in range(64)]
    return State(gpr=values, rflags=0x202 | flags, memory=b"".join(words) * (REGION_SIZE // 512))


def _operand(rng: random.Random) -> int:
    return rng.choice((rng.choice(SPECIAL), rng.choice(SPECIAL), rng.getrandbits(64)))


def aim(rng: random.Random, insn: Insn, state: State) -> None:
    """Let the memory operand lie in the test memory; now and then at or over an edge of it."""
    iced = insn.iced
    state.gpr[RSP] = DATA + 0x2000 + 8 * rng.randrange(16)
    kinds = [iced.op_kind(n) for n in range(iced.op_count)]
    if OpKind.MEMORY not in kinds or iced.memory_base not in REGISTERS:
        return
    target = rng.choice((DATA + 0x2010, DATA + 0x1FFD, DATA, DATA + 0x1340, DATA + 0x1340))
    if rng.random() < 0.1:
        target = rng.choice((END - 1, END, READONLY.start + 8, DATA - 1, REGION - 1))
    base = REGISTERS[iced.memory_base][0]
    displacement = iced.memory_displacement
    if iced.memory_index in REGISTERS:
        index = REGISTERS[iced.memory_index][0]
        state.gpr[index] = rng.randrange(64)
        displacement += state.gpr[index] * iced.memory_index_scale
    state.gpr[base] = (target - displacement) & 0xFFFF_FFFF_FFFF_FFFF


def operand_address(insn: Insn, state: State) -> int:
    """Where the memory operand lies on this state."""
    cpu = make_cpu(insn.bitness)
    cpu.gpr[:] = memoryview(struct.pack("<16Q", *state.gpr)).cast("Q")
    cpu.registers.rip = CODE
    return cpu.address(insn)


Prepare = Callable[[random.Random, Insn, State], None]


def cases_of(
    insns: Iterable[Insn], states: int, prepare: Prepare | None = None
) -> Iterator[tuple[Insn, State]]:
    for insn in insns:
        if missing_features(insn):
            continue
        rng = random.Random(insn.raw)
        for _ in range(states):
            state = random_state(rng)
            aim(rng, insn, state)
            if prepare is not None:
                prepare(rng, insn, state)
            yield insn, state


def insns_of(*mnemonics: str) -> list[Insn]:
    """Representative encodings of all 64-bit forms that have a handler."""
    found = [insn for code in forms_of(*mnemonics) for insn in encodings(code)]
    return [insn for insn in found if is_handled(insn)]


def assert_like_hardware(
    insns: Iterable[Insn],
    states: int = 4,
    prepare: Prepare | None = None,
) -> None:
    """Every instruction leaves what the host CPU leaves: registers, flags, memory, faults.

    Flags that the architecture leaves undefined are not compared.
    """
    cases = list(cases_of(insns, states, prepare))
    if not cases:
        pytest.skip("the host CPU has none of these instructions")
    results = NativeCpu.shared().run_batch([(insn.raw, state) for insn, state in cases])
    machine = Machine()
    bound: Insn | None = None
    for (insn, state), native in zip(cases, results, strict=True):
        if insn is not bound:
            action, bound = bind(machine.cpu, insn), insn
        ours = machine.run(action, state)
        difference = _difference(ours, native, ~undefined_flags(insn, state.gpr))
        assert not difference, f"{insn} {insn.raw.hex()} on {describe(insn, state)}: {difference}"


def _difference(ours: Outcome, native: Result, compared: int) -> str:
    assert not native.crashed
    found = []
    if _fault_of(ours) != _trap_of(native):
        found.append(f"fault {_fault_of(ours)}, hardware {_trap_of(native)}")
    for number, (mine, theirs) in enumerate(zip(ours.gpr, native.state.gpr, strict=True)):
        if mine != theirs:
            found.append(f"gpr[{number}] {mine:#x}, hardware {theirs:#x}")
    if (ours.rflags ^ native.state.rflags) & compared & (STATUS | DF):
        found.append(f"flags {ours.rflags:#x}, hardware {native.state.rflags:#x}")
    if ours.memory != native.state.memory:
        at = next(n for n in range(REGION_SIZE) if ours.memory[n] != native.state.memory[n])
        left, right = (memory[at : at + 8].hex() for memory in (ours.memory, native.state.memory))
        found.append(f"memory at {REGION + at:#x} {left}, hardware {right}")
    return "; ".join(found)


def _fault_of(ours: Outcome) -> tuple[int, int, int | None] | None:
    fault = ours.fault
    return None if fault is None else (fault.vector, fault.error_code or 0, fault.address)


def _trap_of(native: Result) -> tuple[int, int, int | None] | None:
    """The host CPU is at level 3 and says so in the error code (4); the double has no levels."""
    trap = native.fault
    return None if trap is None else (trap.vector, trap.error_code & ~4, trap.address)


def describe(insn: Insn, state: State) -> str:
    registers = " ".join(f"{n}:{value:x}" for n, value in enumerate(state.gpr))
    return f"[{registers} rflags:{state.rflags:x}] {insn.form}"
