"""Moves, exchanges, conditions and flag instructions give what the host CPU gives."""

from __future__ import annotations

import random

import pytest
from iced_x86 import MemorySizeExt, OpKind

from handlers.flags import CONDITION_NAMES
from handlers.integer import REGISTERS
from sandbox.decode import Insn, decode
from sandbox.native import DATA, State
from sandbox.registers import RAX, RBX, RDX, RSP, Segment
from tests.doubles import make_cpu
from tests.integer_cases import assert_like_hardware, bind, insns_of, needs_native, operand_address


@needs_native
@pytest.mark.parametrize(
    "mnemonic", "mov movzx movsx movsxd movbe movnti movdiri bswap lea xchg xadd".split()
)
def test_moves(mnemonic: str) -> None:
    """The host's own segment selectors are not in the state, so they are left out."""
    insns = [i for i in insns_of(mnemonic) if "SREG" not in i.form]
    assert_like_hardware(insns, states=10)


@needs_native
@pytest.mark.parametrize("mnemonic", "cbw cwde cdqe cwd cdq cqo lahf sahf clc stc cmc".split())
def test_accumulator_and_flags(mnemonic: str) -> None:
    assert_like_hardware(insns_of(mnemonic), states=60)


@needs_native
@pytest.mark.parametrize("mnemonic", "cld std".split())
def test_direction_flag(mnemonic: str) -> None:
    assert_like_hardware(insns_of(mnemonic), states=2)


@needs_native
def test_set_and_move_by_condition() -> None:
    names = [f"{stem}{suffix}" for suffix in CONDITION_NAMES for stem in ("set", "cmov")]
    assert_like_hardware(insns_of(*names), states=6)


def _often_equal(rng: random.Random, insn: Insn, state: State) -> None:
    """Let the comparison of CMPXCHG succeed about half of the time."""
    iced = insn.iced
    if rng.random() < 0.5:
        return
    if iced.op0_kind == OpKind.REGISTER:
        number, _bits, shift = REGISTERS[iced.op0_register]
        state.gpr[RAX] = state.gpr[number] >> shift
        return
    if {RAX, RDX} & {
        REGISTERS[r][0] for r in (iced.memory_base, iced.memory_index) if r in REGISTERS
    }:
        return
    at = operand_address(insn, state)
    if not DATA <= at < DATA + 0x3000:
        return
    size = MemorySizeExt.size(iced.memory_size)
    if size == 16 or insn.mnemonic == "cmpxchg8b":
        half = size // 2
        state.gpr[RAX] = int.from_bytes(state.load(at, half), "little")
        state.gpr[RDX] = int.from_bytes(state.load(at + half, half), "little")
    else:
        state.gpr[RAX] = int.from_bytes(state.load(at, size), "little")


@needs_native
@pytest.mark.parametrize("mnemonic", "cmpxchg cmpxchg8b cmpxchg16b".split())
def test_compare_and_exchange(mnemonic: str) -> None:
    assert_like_hardware(insns_of(mnemonic), states=30, prepare=_often_equal)


@needs_native
@pytest.mark.parametrize("code", ["88e0", "8ae3", "86e0", "0fb6c4", "0fbeec", "0f94c6", "0fc0fc"])
def test_high_byte_registers(code: str) -> None:
    assert_like_hardware([decode(bytes.fromhex(code), 64)], states=60)


@needs_native
@pytest.mark.parametrize("code", ["d7", "67d7"])
def test_xlat(code: str) -> None:
    def prepare(rng: random.Random, _insn: Insn, state: State) -> None:
        state.gpr[RBX] = DATA + rng.randrange(0x1000)

    assert_like_hardware([decode(bytes.fromhex(code), 64)], states=60, prepare=prepare)


@needs_native
@pytest.mark.parametrize(
    "code",
    ["8d0433", "678d0433", "488d8433ffffff7f", "67488d44f380", "668d44f380", "678d4424f0"],
)
def test_lea_cuts_to_address_size_and_operand_size(code: str) -> None:
    assert_like_hardware([decode(bytes.fromhex(code), 64)], states=60)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("668cd8", 0x1122334455660BAD),  # mov ax, ds keeps the rest
        ("8cd8", 0x0BAD),  # mov eax, ds is zero-extended
        ("488cd8", 0x0BAD),
    ],
)
def test_reading_a_segment_register(code: str, expected: int) -> None:
    cpu = make_cpu()
    cpu.registers.bank.write_segment("ds", Segment(selector=0x0BAD))
    cpu.gpr[RAX] = 0x1122334455667788
    bind(cpu, decode(bytes.fromhex(code), 64))()
    assert cpu.gpr[RAX] == expected


def test_a_segment_register_takes_16_bits_of_memory() -> None:
    cpu = make_cpu()
    cpu.registers.bank.write_segment("ds", Segment(selector=0x0BAD))
    cpu.gpr[RAX] = 0x10000
    cpu.write(0x10000, b"\xff" * 8)
    bind(cpu, decode(bytes.fromhex("488c18"), 64))()
    assert cpu.read(0x10000, 4) == b"\xad\x0b\xff\xff"


@pytest.mark.parametrize(("code", "size"), [("0fa0", 8), ("660fa0", 2)])
def test_pushing_a_segment_register(code: str, size: int) -> None:
    cpu = make_cpu()
    cpu.registers.bank.write_segment("fs", Segment(selector=0x0BAD))
    cpu.gpr[RSP] = 0x11000
    bind(cpu, decode(bytes.fromhex(code), 64))()
    assert cpu.gpr[RSP] == 0x11000 - size
    assert cpu.read_int(0x11000 - size, size) == 0x0BAD
