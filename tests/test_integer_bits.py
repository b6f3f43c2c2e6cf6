"""Bit instructions give what the host CPU gives."""

from __future__ import annotations

import random

import pytest
from iced_x86 import OpKind

from handlers.integer import REGISTERS
from sandbox.decode import Insn
from sandbox.native import State
from tests.integer_cases import assert_like_hardware, insns_of, needs_native


def any_field(rng: random.Random, insn: Insn, state: State) -> None:
    """For BEXTR and BZHI: starts and lengths about the width of the operand."""
    control = insn.iced.op_register(insn.iced.op_count - 1)
    if insn.mnemonic in ("bextr", "bzhi") and rng.random() < 0.8:
        start, length = (rng.choice((0, 1, 5, 31, 32, 33, 63, 64, 65, 255)) for _ in "xy")
        state.gpr[REGISTERS[control][0]] = rng.getrandbits(48) << 16 | length << 8 | start


@needs_native
@pytest.mark.parametrize(
    "mnemonic",
    "tzcnt lzcnt popcnt bextr bzhi blsi blsr blsmsk pdep pext crc32 bsf bsr".split(),
)
def test_bit_manipulation(mnemonic: str) -> None:
    def prepare(rng: random.Random, insn: Insn, state: State) -> None:
        if insn.iced.op_kind(insn.iced.op_count - 1) == OpKind.REGISTER:
            memory_in_use = OpKind.MEMORY in (insn.iced.op0_kind, insn.iced.op1_kind)
            if not memory_in_use:
                any_field(rng, insn, state)

    insns = insns_of(mnemonic)
    assert_like_hardware(insns, states=16, prepare=prepare)


def near_bits(rng: random.Random, insn: Insn, state: State) -> None:
    """Bit offsets that lead to other words, before and after, but not out of the test memory."""
    iced = insn.iced
    if iced.op0_kind != OpKind.MEMORY or iced.op1_kind != OpKind.REGISTER:
        return
    number, bits, _shift = REGISTERS[iced.op1_register]
    if number in {REGISTERS[r][0] for r in (iced.memory_base, iced.memory_index) if r in REGISTERS}:
        return
    offset = rng.choice(
        (0, 1, 7, 63, 64, 65, 700, -1, -8, -64, -65, -700, rng.randrange(-999, 999))
    )
    upper = rng.getrandbits(64) >> bits << bits
    state.gpr[number] = upper | offset & ((1 << bits) - 1)


@needs_native
@pytest.mark.parametrize("mnemonic", "bt bts btr btc".split())
def test_bit_tests_and_bit_strings(mnemonic: str) -> None:
    assert_like_hardware(insns_of(mnemonic), states=24, prepare=near_bits)
