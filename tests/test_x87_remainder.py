"""FPREM, FPREM1, FSCALE and FXTRACT against the host CPU, and against exact fractions."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from handlers import x87_remainder
from handlers.x87_format import value_of
from sandbox.decode import decode
from sandbox.native import State
from tests.differential import HandlerSubject
from tests.x87_oracle import C0, C023, C1, C2, C3, assert_same, needs_host

FPREM, FPREM1 = "d9f8", "d9f5"


@needs_host
@pytest.mark.parametrize("code", [FPREM, FPREM1])
def test_remainders_do_what_the_host_cpu_does(code: str) -> None:
    assert_same(code, x87_remainder.HANDLERS)


@needs_host
@pytest.mark.parametrize("code", ["d9fd", "d9f4"], ids=["fscale", "fxtract"])
def test_exponent_operations_do_what_the_host_cpu_does(code: str) -> None:
    assert_same(code, x87_remainder.HANDLERS, undefined=C023)


def fraction(a: int) -> Fraction:
    m, e = value_of(a)
    return m * Fraction(2) ** e


@pytest.mark.parametrize(("code", "nearest"), [(FPREM, False), (FPREM1, True)])
def test_a_loop_of_remainders_ends_at_the_exact_one(code: str, nearest: bool) -> None:
    subject, insn = HandlerSubject(x87_remainder.HANDLERS), decode(bytes.fromhex(code), 64)
    rng = random.Random(1)
    for _ in range(60):
        state = State(fptag=0)
        for number in (0, 1):
            exponent = rng.randrange(0x3F00, 0x4100)
            state.st[number] = rng.getrandbits(80) | 1 << 63
            state.st[number] = state.st[number] & ~(0x7FFF << 64) | exponent << 64
        a, b = fraction(state.st[0]), fraction(state.st[1])
        quotient = a / b
        whole = round(quotient) if nearest else int(quotient)
        for _step in range(20):
            state = subject.run(insn, state).state
            if not state.fpsw & C2:
                break
        assert fraction(state.st[0]) == a - b * whole
        shown = [bool(state.fpsw & bit) for bit in (C0, C3, C1)]
        assert shown == [bool(abs(whole) & bit) for bit in (4, 2, 1)]
