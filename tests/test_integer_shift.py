"""Shifts and rotates give what the host CPU gives, for all counts."""

from __future__ import annotations

import random

import pytest

from sandbox.decode import Insn
from sandbox.native import State
from sandbox.registers import RCX
from tests.integer_cases import assert_like_hardware, insns_of, needs_native
from tests.undefined_flags import operand_bits

COUNTS = (0, 1, 1, 2, 7, 8, 9, 15, 16, 17, 18, 31, 32, 33, 63, 64, 0xFF)


def any_count(rng: random.Random, _insn: Insn, state: State) -> None:
    state.gpr[RCX] = rng.choice(COUNTS) | rng.getrandbits(56) << 8


@needs_native
@pytest.mark.parametrize("mnemonic", "shl sal shr sar".split())
def test_shifts(mnemonic: str) -> None:
    assert_like_hardware(insns_of(mnemonic), states=8, prepare=any_count)


@needs_native
@pytest.mark.parametrize("mnemonic", "rol ror rcl rcr".split())
def test_rotates(mnemonic: str) -> None:
    assert_like_hardware(insns_of(mnemonic), states=8, prepare=any_count)


def defined_count(rng: random.Random, insn: Insn, state: State) -> None:
    """16-bit double shifts by more than 16 are undefined altogether."""
    any_count(rng, insn, state)
    if operand_bits(insn) == 16:
        state.gpr[RCX] = state.gpr[RCX] & ~0x1F | rng.randrange(17)


@needs_native
@pytest.mark.parametrize("mnemonic", "shld shrd".split())
def test_double_shifts(mnemonic: str) -> None:
    found = [
        i for i in insns_of(mnemonic) if operand_bits(i) > 16 or i.iced.immediate8 & 0x1F <= 16
    ]
    assert_like_hardware(found, states=8, prepare=defined_count)


@needs_native
@pytest.mark.parametrize("mnemonic", "shlx shrx sarx rorx".split())
def test_bmi2_shifts(mnemonic: str) -> None:
    assert_like_hardware(insns_of(mnemonic), states=12)
