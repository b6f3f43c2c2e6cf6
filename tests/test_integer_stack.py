"""The stack instructions: against the host CPU in 64-bit mode, against the manual elsewhere."""

from __future__ import annotations

import random

import pytest

from sandbox.cpu import GP, SS_, Fault
from sandbox.decode import Insn, decode
from sandbox.native import DATA, READONLY, REGION, State
from sandbox.registers import CF, IF, IOPL, RAX, RBP, RBX, RF, RSP, TF, VM, Segment
from tests.doubles import DictBank, FlatMemory, make_cpu
from tests.integer_cases import Machine, assert_like_hardware, bind, insns_of, needs_native


def near_an_edge(rng: random.Random, _insn: Insn, state: State) -> None:
    """A stack pointer that sometimes lies where pushes and pops fault."""
    if rng.random() < 0.25:
        state.gpr[RSP] = rng.choice((DATA, DATA + 1, REGION, REGION + 3, REGION + 0x5000 - 1))


def harmless_flags(rng: random.Random, _insn: Insn, state: State) -> None:
    """Any flags on the stack but TF, which would trap after the instruction."""
    state.store(state.gpr[RSP], (rng.getrandbits(64) & ~TF).to_bytes(8, "little"))


def not_segments(insns: list[Insn]) -> list[Insn]:
    """Selectors are the host's own."""
    return [i for i in insns if not i.form.endswith(("FS", "GS"))]


@needs_native
@pytest.mark.parametrize("mnemonic", "push pop pushfq pushf".split())
def test_push_and_pop(mnemonic: str) -> None:
    insns = not_segments(insns_of(mnemonic))
    assert_like_hardware(insns, states=10, prepare=near_an_edge)


@needs_native
@pytest.mark.parametrize("mnemonic", "popfq popf".split())
def test_popped_flags(mnemonic: str) -> None:
    assert_like_hardware(insns_of(mnemonic), states=60, prepare=harmless_flags)


@needs_native
@pytest.mark.parametrize(
    "code", ["54", "5c", "8f0424", "8f442408", "ff3424", "ff742408", "668f0424", "678f0424"]
)
def test_operands_that_use_the_stack_pointer(code: str) -> None:
    """PUSH RSP pushes the old value; POP [RSP+n] addresses with the new one."""

    def prepare(rng: random.Random, insn: Insn, state: State) -> None:
        state.gpr[RSP] = DATA + 0x100 + 8 * rng.randrange(16)

    assert_like_hardware([decode(bytes.fromhex(code), 64)], states=20, prepare=prepare)


@needs_native
@pytest.mark.parametrize("level", [0, 1, 2, 3, 7, 31, 33])
@pytest.mark.parametrize("prefix", ["", "66"])
def test_enter(prefix: str, level: int) -> None:
    def prepare(rng: random.Random, _insn: Insn, state: State) -> None:
        state.gpr[RBP] = DATA + 0x2800 + 8 * rng.randrange(16)
        state.gpr[RSP] = DATA + 0x1000 + 8 * rng.randrange(16)

    code = bytes.fromhex(prefix + "c8") + (0x120).to_bytes(2, "little") + bytes([level])
    assert_like_hardware([decode(code, 64)], states=10, prepare=prepare)


@needs_native
@pytest.mark.parametrize("code", ["c9", "66c9"])
def test_leave(code: str) -> None:
    def prepare(rng: random.Random, _insn: Insn, state: State) -> None:
        state.gpr[RBP] = rng.choice((DATA + 0x800, DATA + 0x813, REGION - 8, REGION - 4))

    assert_like_hardware([decode(bytes.fromhex(code), 64)], states=20, prepare=prepare)


def run(code: str, state: State, bitness: int = 64) -> Machine:
    machine = Machine(bitness)
    machine.bank.segments["ss"] = Segment(db=1 if bitness == 32 else 0)
    outcome = machine.run(bind(machine.cpu, decode(bytes.fromhex(code), bitness)), state)
    if outcome.fault is not None:
        raise outcome.fault
    return machine


def test_a_non_canonical_stack_is_a_stack_fault() -> None:
    state = State()
    state.gpr[RSP] = 0x8000_0000_0000_0000
    with pytest.raises(Fault) as caught:
        run("50", state)
    assert (caught.value.vector, caught.value.error_code) == (SS_, 0)


@pytest.mark.parametrize("bitness", [16, 32])
def test_push_all_and_pop_all(bitness: int) -> None:
    """SDM Vol. 2, PUSHA and POPA: the order, SP as it was, SP thrown away on the way back."""
    size = bitness // 8
    cpu = make_cpu(bitness, 0, FlatMemory(0, 0x10000))
    cpu.registers.bank.write_segment("ss", Segment(db=1 if bitness == 32 else 0))
    values = [0x1234_5678 * (n + 1) & (1 << bitness) - 1 for n in range(8)]
    values[RSP] = 0x8000
    for number, value in enumerate(values):
        cpu.gpr[number] = value
    bind(cpu, decode(b"\x60", bitness))()
    assert cpu.gpr[RSP] == 0x8000 - 8 * size
    words = [cpu.read_int(0x8000 - size * (n + 1), size) for n in range(8)]
    assert words == values
    for number in range(8):
        if number != RSP:
            cpu.gpr[number] = 0
    cpu.write_int(0x8000 - 5 * size, 0xFFFF, size)
    bind(cpu, decode(b"\x61", bitness))()
    assert list(cpu.gpr[:8]) == values


def test_a_16_bit_stack_in_32_bit_code_wraps_and_keeps_the_upper_half() -> None:
    cpu = make_cpu(32, 0, FlatMemory(0x20000, 0x10000))
    cpu.registers.bank.write_segment("ss", Segment(base=0x20000, db=0))
    cpu.gpr[RSP], cpu.gpr[RAX] = 0xABCD_0000, 0x11223344
    bind(cpu, decode(b"\x50", 32))()
    assert cpu.gpr[RSP] == 0xABCD_FFFC


def test_pop_reads_through_the_segment_base() -> None:
    cpu = make_cpu(16, 0, FlatMemory(0x20000, 0x10000))
    cpu.registers.bank.write_segment("ss", Segment(base=0x20000))
    cpu.gpr[RSP] = 0x100
    cpu.write_int(0x20100, 0xBEEF, 2)
    bind(cpu, decode(b"\x5b", 16))()
    assert (cpu.gpr[RBX], cpu.gpr[RSP]) == (0xBEEF, 0x102)


@pytest.mark.parametrize(
    ("cpl", "before", "popped", "after"),
    [
        (0, 0x2, 0x3202, 0x3202),  # level 0 may change IF and IOPL
        (3, 0x2, 0x3203, 0x3),  # above IOPL neither changes
        (3, 0x3002, 0x0202, 0x3202),  # within IOPL only IF changes
        (0, 0x2 | RF, 0x2, 0x2),  # RF is cleared
        (0, 0x2, 0x0002 | VM, 0x2),  # VM does not change
    ],
)
def test_privilege_rules_of_popf(cpl: int, before: int, popped: int, after: int) -> None:
    cpu = make_cpu(64, cpl)
    cpu.gpr[RSP] = 0x11000
    cpu.write_int(0x11000, popped, 8)
    cpu.rflags = before
    bind(cpu, decode(b"\x9d", 64))()
    assert cpu.rflags == after


def test_pushf_hides_rf_and_vm() -> None:
    cpu = make_cpu(64, 0)
    cpu.gpr[RSP] = 0x11008
    cpu.rflags = 0x3202 | RF | CF
    bind(cpu, decode(b"\x9c", 64))()
    assert cpu.read_int(0x11000, 8) == 0x3203


@pytest.mark.parametrize("code", [b"\x9c", b"\x9d"])
def test_virtual_8086_mode_needs_iopl_3_for_flags(code: bytes) -> None:
    cpu = make_cpu(16, 3, FlatMemory(0, 0x10000))
    cpu.gpr[RSP] = 0x100
    cpu.rflags = 2 | VM
    with pytest.raises(Fault) as caught:
        bind(cpu, decode(code, 16))()
    assert caught.value.vector == GP
    cpu.rflags = 2 | VM | IOPL
    bind(cpu, decode(code, 16))()


@pytest.mark.parametrize(("code", "expected"), [(b"\xfa", 0), (b"\xfb", IF)])
def test_interrupt_flag_needs_iopl(code: bytes, expected: int) -> None:
    cpu = make_cpu(64, 3)
    action = bind(cpu, decode(code, 64))
    with pytest.raises(Fault) as caught:
        action()
    assert (caught.value.vector, caught.value.error_code) == (GP, 0)
    cpu.rflags = 2 | IOPL | (IF ^ expected)
    action()
    assert cpu.rflags == 2 | IOPL | expected
    bank = cpu.registers.bank
    assert isinstance(bank, DictBank)
    bank.cpl = 0
    cpu.rflags = 2
    action()
    assert cpu.rflags == 2 | expected


def test_a_faulting_push_leaves_the_stack_pointer() -> None:
    state = State()
    state.gpr[RSP] = READONLY.stop
    machine = Machine()
    outcome = machine.run(bind(machine.cpu, decode(b"\x50", 64)), state)
    assert outcome.fault is not None
    assert outcome.gpr == state.gpr
