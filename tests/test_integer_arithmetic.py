"""Integer arithmetic, logic, multiplication and division give what the host CPU gives."""

from __future__ import annotations

import random

import pytest

from sandbox.decode import Insn, decode
from sandbox.native import State
from sandbox.registers import AF, CF, OF, PF, RAX, RDX, SF, ZF
from tests.integer_cases import STATUS, assert_like_hardware, insns_of, needs_native, undefined


@needs_native
@pytest.mark.parametrize("mnemonic", "add adc sub sbb cmp inc dec neg adcx adox".split())
def test_addition_and_subtraction(mnemonic: str) -> None:
    assert_like_hardware(insns_of(mnemonic))


@needs_native
@pytest.mark.parametrize("mnemonic", "and or xor test not".split())
def test_logic(mnemonic: str) -> None:
    assert_like_hardware(insns_of(mnemonic), undefined(AF))


@needs_native
def test_andn() -> None:
    assert_like_hardware(insns_of("andn"), undefined(AF | PF), states=16)


@needs_native
@pytest.mark.parametrize("mnemonic", ["mul", "imul"])
def test_multiplication(mnemonic: str) -> None:
    assert_like_hardware(insns_of(mnemonic), undefined(SF | ZF | AF | PF), states=12)


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
    insns = insns_of(mnemonic)
    assert_like_hardware(insns, undefined(STATUS), states=40, prepare=_small_dividend)


@needs_native
@pytest.mark.parametrize("code", ["00e0", "28fc", "30ed", "fec7", "f6d4", "f6e4", "f6fd", "f6f7"])
def test_high_byte_registers(code: str) -> None:
    """AH, CH, DH and BH as source and as destination."""
    mul_div = code in ("f6e4", "f6fd", "f6f7")
    ignored = undefined(STATUS & ~(CF | OF) if code == "f6e4" else STATUS if mul_div else AF)
    assert_like_hardware([decode(bytes.fromhex(code), 64)], ignored, states=100)
