"""The x87 transcendental functions: within one unit in the last place of the host CPU, exactly
equal in special cases, and right where there is no such host."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from decimal import Decimal, localcontext

import pytest

from handlers import x87_angle, x87_logarithm
from handlers.x87_format import value_of
from sandbox.decode import decode
from sandbox.native import State
from tests.differential import HandlerSubject
from tests.x87_oracle import BIAS, C1, ONE, assert_same, differences, needs_host

FUNCTIONS = {
    "f2xm1": "d9f0", "fyl2x": "d9f1", "fyl2xp1": "d9f9", "fpatan": "d9f3",
    "fsin": "d9fe", "fcos": "d9ff", "fsincos": "d9fb", "fptan": "d9f2",
}  # fmt: skip
HANDLERS = [*x87_angle.HANDLERS, *x87_logarithm.HANDLERS]
PI_66 = 0xC90FDAA22168C234C


def number(rng: random.Random, low: int, high: int) -> int:
    """A random normal number of an exponent in a range."""
    exponent = BIAS + rng.randrange(low, high)
    return rng.getrandbits(1) << 79 | exponent << 64 | 1 << 63 | rng.getrandbits(63)


def near_multiple_of_pi(rng: random.Random) -> int:
    multiple = rng.randrange(1, 1 << rng.randrange(1, 60)) * PI_66
    length = multiple.bit_length()
    return BIAS + length - 68 << 64 | (multiple >> length - 64) + rng.randrange(-1, 2)


def near_one(rng: random.Random) -> int:
    distance = rng.randrange(1, 1 << rng.randrange(1, 63))
    return rng.choice((ONE + distance, ONE - (1 << 64) + (1 << 63) - distance))


@needs_host
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_do_what_the_host_cpu_does(name: str) -> None:
    assert_same(FUNCTIONS[name], HANDLERS, undefined=C1, ulps=1)


Operands = Callable[[random.Random], tuple[int, int]]
REGIONS: dict[str, tuple[tuple[str, ...], Operands]] = {
    "all angles": (("fsin", "fcos", "fptan", "fsincos"), lambda r: (number(r, -90, 63), 0)),
    "multiples of pi": (("fsin", "fcos", "fptan"), lambda r: (near_multiple_of_pi(r), 0)),
    "logarithms near 0": (("fyl2x",), lambda r: (near_one(r), number(r, -5, 5))),
    "any logarithm": (
        ("fyl2x",),
        lambda r: (number(r, -16000, 16000) & ~(1 << 79), number(r, -5, 5)),
    ),
    "powers of two": (
        ("fyl2x",),
        lambda r: (r.randrange(1, 0x7FFF) << 64 | 1 << 63, number(r, -5, 5)),
    ),
    "small numbers": (("fyl2xp1", "f2xm1"), lambda r: (number(r, -200, -1), number(r, -5, 5))),
    "all directions": (("fpatan",), lambda r: (number(r, -100, 100), number(r, -100, 100))),
}


@needs_host
@pytest.mark.parametrize("region", REGIONS)
def test_regions_of_interest_do_what_the_host_cpu_does(region: str) -> None:
    names, operands = REGIONS[region]
    rng = random.Random(region)
    for name in names:
        given = []
        for _ in range(250):
            state = State(fptag=0xFFF0, fpcw=0x37F | rng.randrange(4) << 10)
            state.st[:2] = operands(rng)
            given.append(state)
        found = differences(FUNCTIONS[name], HANDLERS, given, C1, 1)
        assert not found, found[0]


def run(name: str, *operands: int) -> State:
    state = State(fptag=0xFFF0)
    state.st[: len(operands)] = operands
    return HandlerSubject(HANDLERS).run(decode(bytes.fromhex(FUNCTIONS[name]), 64), state).state


def to_float(a: int) -> float:
    m, e = value_of(a)
    return math.ldexp(m, e)


def test_angles_agree_with_the_c_library_in_its_precision() -> None:
    rng = random.Random(2)
    for _ in range(40):
        a, b = number(rng, -20, 3), number(rng, -20, 3)
        x, y = to_float(a), to_float(b)
        assert to_float(run("fsin", a).st[0]) == pytest.approx(math.sin(x), rel=1e-14)
        assert to_float(run("fcos", a).st[0]) == pytest.approx(math.cos(x), rel=1e-14)
        assert to_float(run("fptan", a).st[1]) == pytest.approx(math.tan(x), rel=1e-14)
        assert to_float(run("fpatan", a, b).st[0]) == pytest.approx(math.atan2(y, x), rel=1e-14)


def exact(a: int) -> Decimal:
    m, e = value_of(a)
    return m * Decimal(2) ** e


def test_logarithms_and_powers_are_right_to_half_a_unit() -> None:
    rng = random.Random(3)
    with localcontext() as context:
        context.prec = 80
        ln2 = Decimal(2).ln()
        for _ in range(40):
            a = number(rng, -60, 0)
            magnitude = a & ~(1 << 79)
            cases = {
                run("fyl2x", magnitude, ONE).st[0]: exact(magnitude).ln() / ln2,
                run("fyl2xp1", a, ONE).st[0]: (1 + exact(a)).ln() / ln2,
                run("f2xm1", a).st[0]: (exact(a) * ln2).exp() - 1,
            }
            for got, want in cases.items():
                unit = Decimal(2) ** value_of(got)[1]
                assert abs(exact(got) - want) <= unit * Decimal("0.5000001")


@pytest.mark.parametrize(
    ("name", "st0", "st1", "result"),
    [
        # SDM Vol. 2, tables of FYL2X and FPATAN
        ("fyl2x", ONE, ONE, 0),
        ("fyl2x", 0, ONE, 0xFFFF_8000000000000000),
        ("fyl2x", 0x4002_8000000000000000, ONE, 0x4000_C000000000000000),
        ("fyl2x", 0xBFFF_8000000000000000, ONE, 0xFFFF_C000000000000000),
        ("fpatan", 0xBFFF_8000000000000000, 0, 0x4000_C90FDAA22168C235),
        ("fpatan", ONE, 1 << 79, 1 << 79),
        ("fpatan", 0x7FFF_8000000000000000, 0xFFFF_8000000000000000, 0xBFFE_C90FDAA22168C235),
        ("f2xm1", 0xBFFF_8000000000000000, 0, 0xBFFE_8000000000000000),
        ("f2xm1", ONE, 0, ONE),
        ("fsin", 0x8000_0000000000000000, 0, 0x8000_0000000000000000),
        ("fcos", 0x8000_0000000000000000, 0, ONE),
        ("fcos", 0x7FFF_8000000000000000, 0, 0xFFFF_C000000000000000),
        # the 66-bit pi: a quarter of a unit is left of the nearest number to pi
        ("fsin", 0x4000_C90FDAA22168C235, 0, 0xBFBF_8000000000000000),
    ],
)
def test_special_results(name: str, st0: int, st1: int, result: int) -> None:
    assert run(name, st0, st1).st[0] == result


def test_angles_out_of_range_set_c2_and_stay() -> None:
    angle = 0x403E_8000000000000000
    for name in ("fsin", "fcos", "fsincos", "fptan"):
        after = run(name, angle)
        assert (after.fpsw, after.st[0]) == (0x400, angle)
