"""Integer arithmetic, logic, multiplication and division give what the host CPU gives."""

from __future__ import annotations

import random

import pytest

from sandbox.decode import Insn, decode
from sandbox.native import State
from sandbox.registers import RAX, RDX
from tests.integer_cases import assert_like_hardware, insns_of, needs_native


@needs_native
@pytest.mark.parametrize("mnemonic", "add adc sub sbb cmp inc dec neg adcx adox".split())
def test_addition_and_subtraction(mnemonic: str) -> None:
    assert_like_hardware(insns_of(mnemonic))


@needs_native
@pytest.mark.parametrize("mnemonic", "and or xor test not".split())
def test_logic(mnemonic: str) -> None:
    assert_like_hardware(insns_of(mnemonic))


@needs_native
def test_andn() -> None:
    assert_like_hardware(insns_of("andn"), states=16)


@needs_native
@pytest.mark.parametrize("mnemonic", ["mul", "imul"])
def test_multiplication(mnemonic: str) -> None:
    assert_like_hardware(insns_of(mnemonic), states=12)


@needs_native
def test_mulx() -> None:
    assert_like_hardware(insns_of("mulx"), states=16)


def _small_dividend(rng: random.Random, _insn: Insn, state: State) -> None:
    """Mostly dividends whose quotient fits."""
    if rng.random() < 0.7:
        state.gpr[RDX] = rng.choice((0, 0, 1, 0xFFFF_FFFF_FFFF_FFFF))
        state.gpr[RAX] &= rng.choice((0xFF, 0x7FFF, 0xFFFF_FFFF_FFFF_FFFF))


@needs_native
@pytest.mark.parametrize("mnemonic", ["div", "idiv"])
def test_division_and_its_errors(mnemonic: str) -> None:
    assert_like_hardware(insns_of(mnemonic), states=40, prepare=_small_dividend)


@needs_native
@pytest.mark.parametrize("code", ["00e0", "28fc", "30ed", "fec7", "f6d4", "f6e4", "f6fd", "f6f7"])
def test_high_byte_registers(code: str) -> None:
    """AH, CH, DH and BH as source and as destination."""
    assert_like_hardware([decode(bytes.fromhex(code), 64)], states=100)
