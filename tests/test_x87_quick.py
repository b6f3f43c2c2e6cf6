"""The functions by tables give what the series give, to the last bit and flag."""

from __future__ import annotations

import random

import pytest

from handlers import x87_angle, x87_logarithm, x87_quick, x87_series
from sandbox.decode import decode
from sandbox.native import State
from tests.differential import HandlerSubject

INTEGER = 1 << 63
CASES = 400
FORMS = {"f2xm1": "d9f0", "fyl2x": "d9f1", "fyl2xp1": "d9f9", "fpatan": "d9f3"}


def number(rng: random.Random, low: int, high: int, *, positive: bool = False) -> int:
    """A register whose exponent is from ``low`` to ``high``, often with a short significand."""
    significand = rng.getrandbits(63) | INTEGER
    if rng.randrange(3) == 0:
        significand &= -1 << rng.randrange(64)
    sign = 0 if positive else rng.getrandbits(1)
    return sign << 79 | rng.randint(low, high) + 0x3FFF << 64 | significand | INTEGER


def operands(name: str, rng: random.Random) -> list[int]:
    """ST(0) and ST(1), where the function is found quickly and a little beyond."""
    if name == "f2xm1":
        return [number(rng, -20, -1), 0]
    if name == "fyl2xp1":
        return [number(rng, -35, -2), number(rng, -80, 80)]
    if name == "fyl2x":
        near_one = rng.getrandbits(1)
        return [number(rng, -near_one, 0 if near_one else 3000, positive=True), number(rng, -9, 9)]
    return [number(rng, -40, 0), number(rng, -40, 0)]


@pytest.mark.parametrize("name", FORMS)
def test_results_flags_and_c1_are_those_of_the_series(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, insn = random.Random(name), decode(bytes.fromhex(FORMS[name]), 64)
    subject = HandlerSubject([*x87_angle.HANDLERS, *x87_logarithm.HANDLERS])
    states = []
    for _ in range(CASES):
        control = 0x7F | rng.choice((0, 2, 3)) << 8 | rng.randrange(4) << 10
        st = operands(name, rng) + [0] * 6
        states.append(State(st=st, fpcw=control, fpsw=0, fptag=0xFFF0))
    quick = [subject.run(insn, state) for state in states]
    for function in ("power_less_one", "logarithm", "arc_tangent"):
        monkeypatch.setattr(x87_quick, function, lambda *_: None)
    assert [found.state for found in quick] == [subject.run(insn, s).state for s in states]


@pytest.mark.parametrize("seed", range(3))
def test_functions_are_off_by_less_than_they_say(seed: int) -> None:
    rng, cut = random.Random(seed), x87_series.BITS - x87_quick.PLACES

    def distance(value: int, magnitude: tuple[int, int]) -> int:
        m, e = magnitude
        return abs(abs(value) - (m >> -e - x87_quick.PLACES))

    for _ in range(CASES):
        m, e = rng.getrandbits(63) | INTEGER, -63 - rng.randint(1, 15)
        power = x87_quick.power_less_one(negative := bool(rng.getrandbits(1)), m, e)
        assert power is not None
        want = x87_logarithm._power_less_one(negative, m, e)
        assert distance(power, want) < x87_quick.ERROR // 4
        logarithm = x87_quick.logarithm(m, e + 8)
        if logarithm is not None:
            want = x87_logarithm.binary_logarithm(m, e + 8)
            assert distance(logarithm, want) < x87_quick.ERROR // 4
        y, x = sorted((m, rng.getrandbits(64) | 1))
        angle = x87_quick.arc_tangent(y, x)
        if angle is not None:
            series = x87_series.arc_tangent((y << x87_series.BITS) // x) >> cut
            assert abs(angle - series) < x87_quick.ERROR // 4


def test_a_value_too_near_to_where_rounding_turns_is_not_rounded() -> None:
    half = 1 << 63 | 1
    for rest in (-1, 0, 1):
        assert x87_quick.round_within(False, (half << 65 | 1 << 64) + rest, -200, 2, 0x37F) is None
        assert x87_quick.round_within(False, (half << 65) + rest, -200, 2, 0x37F) is None
    found = x87_quick.round_within(False, (half << 65 | 1 << 64) + 3, -200, 2, 0x37F)
    assert found is not None and found.up and found.bits & (1 << 64) - 1 == half + 1
