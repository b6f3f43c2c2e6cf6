"""The functions by tables, done in place, leave what the series leave, to the last bit and flag."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from handlers import x87_logarithm, x87_quick, x87_series
from handlers.x87_pack import PACK
from sandbox.cpu import MF, NM, Cpu, Fault
from sandbox.decode import decode
from tests.guest import machine
from tests.x87_oracle import random_value

INTEGER = 1 << 63
CASES = 400
FORMS = {"f2xm1": "d9f0", "fyl2x": "d9f1", "fyl2xp1": "d9f9", "fpatan": "d9f3"}
NAMES = ["fpsw", "fpcw", "fptag", "fip", "fop", *(f"st{n}" for n in range(8))]
RIP = 0x1234
State = dict[str, int]


def number(rng: random.Random, low: int, high: int, *, positive: bool = False) -> int:
    """A register whose exponent is from ``low`` to ``high``, often with a short significand."""
    significand = rng.getrandbits(63) | INTEGER
    if rng.randrange(3) == 0:
        significand &= -1 << rng.randrange(64)
    sign = 0 if positive else rng.getrandbits(1)
    return sign << 79 | rng.randint(low, high) + 0x3FFF << 64 | significand | INTEGER


def near(name: str, rng: random.Random) -> tuple[int, int]:
    """ST(0) and ST(1), where the function is found quickly and a little beyond."""
    if name == "f2xm1":
        return number(rng, -20, -1), 0
    if name == "fyl2xp1":
        return number(rng, -70, -1), number(rng, -80, 80)
    if name == "fyl2x":
        near_one = rng.getrandbits(1)
        x = number(rng, -near_one, 0 if near_one else 3000, positive=True)
        return x, number(rng, -16380, 16380 if near_one else 9)
    return number(rng, -40, 0), number(rng, -40, 0)


def random_state(rng: random.Random, x: int, y: int) -> State:
    return {
        "fpcw": 0x7F | rng.choice((0, 2, 3)) << 8 | rng.randrange(4) << 10,
        "fpsw": rng.randrange(8) << 11 | rng.getrandbits(7) | rng.getrandbits(4) << 8 & 0x4700,
        "fptag": 0, "fip": 0, "fop": 0, "st0": x, "st1": y,
        **{f"st{n}": rng.getrandbits(80) for n in range(2, 8)},
    }  # fmt: skip


def runner(cpu: Cpu, name: str) -> Callable[[State], State | int]:
    """What runs an instruction on a state: the state after it, or the vector of a fault."""
    insn = decode(bytes.fromhex(FORMS[name]), 64)
    (handler,) = (h for h in PACK.handlers if name in h.mnemonics)
    action, bank = handler.bind(cpu, insn), cpu.registers.bank
    assert action is not None

    def run(state: State) -> State | int:
        for register, value in state.items():
            bank.write(register, value)
        cpu.registers.rip = RIP
        try:
            assert action() is None
        except Fault as fault:
            return fault.vector
        return {register: bank.read(register) for register in NAMES}

    return run


def both(name: str, states: list[State], patch: pytest.MonkeyPatch) -> list[State | int]:
    """What the states become; the same if only the series are asked."""
    with machine(b"\xf4", handlers=("x87",)) as found:
        run = runner(found.vcpu.cpu, name)
        quick = [run(state) for state in states]
        for function in ("power_less_one", "logarithm", "arc_tangent"):
            patch.setattr(x87_quick, function, lambda *_: None)
        assert quick == [run(state) for state in states]
    return quick


@pytest.mark.parametrize("name", FORMS)
def test_results_flags_and_pointers_are_those_of_the_series(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(name)
    states = [random_state(rng, *near(name, rng)) for _ in range(CASES)]
    after = both(name, states, monkeypatch)
    assert all(isinstance(found, dict) and found["fip"] == RIP for found in after)


@pytest.mark.parametrize("name", FORMS)
def test_what_is_no_number_or_no_operand_is_for_the_series(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operands of all kinds, empty registers, exceptions that are not masked or pending."""
    rng, states = random.Random(name), []
    for _ in range(CASES):
        states.append(random_state(rng, random_value(rng), random_value(rng)))
        states[-1]["fpsw"] |= rng.choice((0, 0, 0, 0x8080))
        states[-1]["fpcw"] &= rng.choice((-1, -1, -1 << 6, ~(1 << rng.randrange(6))))
        states[-1]["fptag"] = rng.choice((0, 0, rng.getrandbits(16)))
    after = both(name, states, monkeypatch)
    assert MF in after


@pytest.mark.parametrize("bit", [4, 8])
def test_a_unit_that_is_switched_off_is_not_available(bit: int) -> None:
    with machine(b"\xf4", handlers=("x87",)) as found:
        run = runner(found.vcpu.cpu, "fyl2x")
        state = random_state(random.Random(1), 0x4001 << 64 | INTEGER | 1, 0x3FFF << 64 | INTEGER)
        assert isinstance(run(state), dict)
        bank = found.vcpu.registers.bank
        bank.write("cr0", bank.read("cr0") | bit)
        assert run(state) == NM


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
    assert found is not None and found[1] and found[0] & (1 << 64) - 1 == half + 1
