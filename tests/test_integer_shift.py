"""Shifts and rotates give what the host CPU gives, for all counts."""

from __future__ import annotations

import random

import pytest
from iced_x86 import OpKind

from handlers.integer import REGISTERS
from sandbox.decode import Insn
from sandbox.native import State
from sandbox.registers import AF, CF, OF, RCX
from tests.integer_cases import assert_like_hardware, insns_of, needs_native

COUNTS = (0, 1, 1, 2, 7, 8, 9, 15, 16, 17, 18, 31, 32, 33, 63, 64, 0xFF)


def width(insn: Insn) -> int:
    iced = insn.iced
    if iced.op0_kind == OpKind.REGISTER:
        return REGISTERS[iced.op0_register][1]
    return {"8": 8, "6": 16, "2": 32, "4": 64}[insn.form.split("_")[1][-1]]


def count(insn: Insn, state: State) -> int:
    """The masked count of a shift: its last operand, CL or an immediate."""
    last = insn.iced.op_count - 1
    immediate = insn.iced.op_kind(last) == OpKind.IMMEDIATE8
    value = insn.iced.immediate8 if immediate else state.gpr[RCX]
    return value & (63 if width(insn) == 64 else 31)


def undefined_after_shift(insn: Insn, state: State) -> int:
    by = count(insn, state)
    if by == 0:
        return 0
    beyond = by >= width(insn) and insn.mnemonic != "sar"
    return AF | (CF if beyond else 0) | (OF if by > 1 else 0)


def undefined_after_rotate(insn: Insn, state: State) -> int:
    return OF if count(insn, state) > 1 else 0


def any_count(rng: random.Random, _insn: Insn, state: State) -> None:
    state.gpr[RCX] = rng.choice(COUNTS) | rng.getrandbits(56) << 8


def insns(mnemonic: str) -> list[Insn]:
    """Without RCX as the base of an address: it holds the count."""
    return insns_of(mnemonic)


@needs_native
@pytest.mark.parametrize("mnemonic", "shl sal shr sar".split())
def test_shifts(mnemonic: str) -> None:
    assert_like_hardware(insns(mnemonic), undefined_after_shift, states=8, prepare=any_count)


@needs_native
@pytest.mark.parametrize("mnemonic", "rol ror rcl rcr".split())
def test_rotates(mnemonic: str) -> None:
    assert_like_hardware(insns(mnemonic), undefined_after_rotate, states=8, prepare=any_count)


def defined_count(rng: random.Random, insn: Insn, state: State) -> None:
    """16-bit double shifts by more than 16 are undefined altogether."""
    any_count(rng, insn, state)
    if width(insn) == 16:
        state.gpr[RCX] = state.gpr[RCX] & ~0x1F | rng.randrange(17)


@needs_native
@pytest.mark.parametrize("mnemonic", "shld shrd".split())
def test_double_shifts(mnemonic: str) -> None:
    found = [i for i in insns(mnemonic) if width(i) > 16 or i.iced.immediate8 & 0x1F <= 16]

    def undefined(insn: Insn, state: State) -> int:
        by = count(insn, state)
        return (AF if by else 0) | (OF if by > 1 else 0)

    assert_like_hardware(found, undefined, states=8, prepare=defined_count)


@needs_native
@pytest.mark.parametrize("mnemonic", "shlx shrx sarx rorx".split())
def test_bmi2_shifts(mnemonic: str) -> None:
    assert_like_hardware(insns(mnemonic), states=12)
