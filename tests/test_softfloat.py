"""The integer floating point against the host's, through NumPy under the guest's MXCSR.

``python -m tests.test_softfloat 1000000`` runs a longer campaign.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from handlers import softfloat as soft
from handlers.fenv import bracket
from handlers.softfloat import DE, F16, F32, F64, IE, OE, PE, UE, ZE, Format

LANES = 8
MODES = [
    rc << 13 | daz | ftz | 0x1F80 for rc in range(4) for daz in (0, 0x40) for ftz in (0, 0x8000)
]
BINARY: dict[str, tuple[Callable[..., Any], Callable[..., soft.Result]]] = {
    "add": (np.add, soft.add),
    "sub": (np.subtract, soft.sub),
    "mul": (np.multiply, soft.mul),
    "div": (np.divide, soft.div),
}
needs_fenv = pytest.mark.skipif(
    bracket(lambda: None) is None, reason="the host lends no floating-point environment"
)


def operand(f: Format, rng: random.Random) -> int:
    """A bit pattern where things happen: specials, near one, near the ends of the range."""
    p, top = f.precision, 2 * f.bias
    sign, fraction = rng.choice((0, f.sign)), rng.getrandbits(p - 1)
    way = rng.randrange(10)
    if way < 3:
        edges = (0, 1, f.min_normal - 1, f.min_normal, f.min_normal + 1, f.infinity - 1, f.infinity)
        nans = (
            f.infinity | 1,
            f.infinity | f.quiet | fraction >> 1,
            f.infinity | 1 | fraction >> 2,
        )
        return sign | rng.choice((*edges, *nans, fraction, f.bias << (p - 1)))
    if way < 6:
        return sign | (f.bias + rng.randrange(-3, 4)) << (p - 1) | fraction
    if way < 7:
        few = rng.getrandbits(4) << (p - 5)
        return sign | (f.bias + rng.randrange(-3, 4)) << (p - 1) | few
    if way < 9:
        near = rng.choice((0, f.bias // 2, f.bias + f.bias // 2, top)) + rng.randrange(-3, 4)
        return sign | min(max(near, 0), top) << (p - 1) | fraction
    return rng.getrandbits(p + f.exponent_bits)


def operands(f: Format, count: int, rng: random.Random) -> list[int]:
    return [operand(f, rng) for _ in range(count)]


def expect(
    reference: Callable[..., soft.Result], f: Format, *lanes: list[int], mxcsr: int
) -> tuple[list[int], int]:
    results = [reference(f, *ops, mxcsr) for ops in zip(*lanes, strict=True)]
    flags = 0
    for _bits, raised in results:
        flags |= raised
    return [bits for bits, _raised in results], flags


def native(function: Callable[..., Any], types: str, *lanes: list[int], mxcsr: int) -> Any:
    """What NumPy gives under MXCSR; ``types`` is "source target" such as "f4 f8"."""
    source, target = types.split()
    views = [np.array(x, f"u{source[1]}").view(source) for x in lanes]
    out = np.zeros(len(lanes[0]), target)
    run = bracket(partial(function, *views, out))
    assert run is not None
    flags = run(mxcsr)
    return out.view(f"u{target[1]}").tolist(), flags


def _cast(a: Any, out: Any) -> None:
    np.copyto(out, a, "same_kind")


def campaign(count: int, seed: int) -> list[str]:
    """Random vectors through both; a line for each difference."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        mxcsr, width = rng.choice(MODES), rng.choice((1, 2, 4, LANES))
        for f, lane, other_f, other in ((F32, "f4", F64, "f8"), (F64, "f8", F32, "f4")):
            a, b = operands(f, width, rng), operands(f, width, rng)
            if rng.random() < 0.1:
                b = [x ^ rng.choice((0, f.sign, 1)) for x in a]
            for name, (ufunc, reference) in BINARY.items():
                ours = expect(reference, f, a, b, mxcsr=mxcsr)
                theirs = native(ufunc, f"{lane} {lane}", a, b, mxcsr=mxcsr)
                if ours != theirs:
                    found.append(f"{name} {lane} {mxcsr:#x} {a} {b}: {ours} not {theirs}")
            ours = expect(soft.sqrt, f, a, mxcsr=mxcsr)
            theirs = native(np.sqrt, f"{lane} {lane}", a, mxcsr=mxcsr)
            if ours != theirs:
                found.append(f"sqrt {lane} {mxcsr:#x} {a}: {ours} not {theirs}")
            convert = partial(soft.convert, f)
            ours = expect(convert, other_f, a, mxcsr=mxcsr)
            theirs = native(_cast, f"{lane} {other}", a, mxcsr=mxcsr)
            if ours != theirs:
                found.append(f"convert {lane} {mxcsr:#x} {a}: {ours} not {theirs}")
    return found


@needs_fenv
def test_arithmetic_and_conversion_equal_the_host_with_all_flags() -> None:
    assert campaign(1000, seed=1) == []


ONE, TINY, HUGE = 0x3F800000, 1, 0x7F7FFFFF


@pytest.mark.parametrize(
    ("result", "bits", "flags"),
    [
        (soft.add(F32, ONE, TINY, 0x1F80), ONE, DE | PE),
        (soft.add(F32, ONE, TINY, 0x5F80), ONE + 1, DE | PE),
        (soft.add(F32, ONE, TINY, 0x1FC0), ONE, 0),
        (soft.sub(F32, ONE, ONE, 0x3F80), 1 << 31, 0),  # an exact zero is negative rounding down
        (soft.mul(F32, HUGE, HUGE, 0x1F80), 0x7F800000, OE | PE),
        (soft.mul(F32, HUGE, HUGE, 0x7F80), HUGE, OE | PE),
        (soft.mul(F32, HUGE, 0x40000000, 0x1B80), 0x7F800000, OE),  # exact but for its exponent
        (soft.div(F32, ONE, 0, 0x1F80), 0x7F800000, ZE),
        (soft.div(F32, 0, 0, 0x1F80), 0xFFC00000, IE),
        (soft.mul(F32, 0x00800000, 0x3F000000, 0x1F80), 0x00400000, 0),  # exact: no underflow
        (soft.mul(F32, 0x00800000, 0x3F000000, 0x1780), 0x00400000, UE),  # unless unmasked
        (soft.mul(F32, 0x00800000, 0x3F000000, 0x9F80), 0, UE | PE),  # flushed
        (soft.mul(F32, 0x00800000, 0x3F000000, 0x9780), 0x00400000, UE),
        # tininess is judged after rounding: this product rounds up to the smallest normal
        (soft.mul(F32, 0x00800001, 0x3F7FFFFE, 0x1F80), 0x00800000, PE),
        (soft.mul(F32, 0x00800000, 0x3F7FFFFF, 0x1F80), 0x00800000, UE | PE),
        (soft.add(F32, 0x7FA00000, 0x7FC00001, 0x1F80), 0x7FE00000, IE),
        (soft.fma(F32, 0x7F800000, 0, 0x7FC00001, 0x1F80), 0x7FC00001, 0),
        (soft.fma(F32, 0x7F800000, 0, ONE, 0x1F80), 0xFFC00000, IE),
        (soft.minimum(F32, 0, 1 << 31, 0x1F80), 1 << 31, 0),
        (soft.maximum(F32, 0x7FC00000, ONE, 0x1F80), ONE, IE),
        (soft.to_int(F32, 0x4F000000, 32, True, 0x1F80), 0x80000000, IE),
        (soft.to_int(F32, 0x40200000, 32, True, 0x1F80), 2, PE),  # 2.5 to even
        (soft.to_int(F32, 0xC0200000, 32, True, 0x3F80), 0xFFFFFFFD, PE),
        (soft.to_int(F32, 0xBF800000, 32, False, 0x1F80), 0xFFFFFFFF, IE),
        (soft.from_int(F32, (1 << 24) + 1, 0x1F80), 0x4B800000, PE),
        (soft.from_int(F64, -3, 0x1F80), 0xC008000000000000, 0),
        (soft.round_integral(F32, 0xBE800000, 0x1F80), 0x80000000, PE),
        (soft.convert(F32, F16, 0x7FA02000, 0x1F80), 0x7F01, IE),
        (soft.convert(F32, F16, 0x33800000, 0x1F80), 0x0001, 0),
        (soft.convert(F32, F16, 0x33000000, 0x1F80), 0x0000, UE | PE),
    ],
)
def test_known_answers_from_the_manual(result: soft.Result, bits: int, flags: int) -> None:
    assert result == (bits, flags)


def test_every_half_survives_the_way_to_single_and_double_and_back() -> None:
    for wide in (F32, F64):
        for half in range(1 << 16):
            there, _flags = soft.convert(F16, wide, half, 0x1F80)
            quiet = half | F16.quiet if soft.is_nan(F16, half) else half
            assert soft.convert(wide, F16, there, 0x1F80) == (quiet, 0)


def test_predicates_partition_the_relations() -> None:
    for predicate in range(32):
        opposite = predicate ^ 4
        held = soft.PREDICATES[predicate] | soft.PREDICATES[opposite]
        assert held == 15 and not soft.PREDICATES[predicate] & soft.PREDICATES[opposite]


def test_unmasked_pre_computation_exception_hides_the_others() -> None:
    assert soft.committed(IE | OE | PE, 0x1F00) == IE
    assert soft.committed(IE | OE | PE, 0x1B80) == IE | OE | PE
    assert soft.unmasked(IE | PE, 0x1F00) == IE


if __name__ == "__main__":
    differences = campaign(int(sys.argv[1]), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(*differences[:20], f"{len(differences)} differences", sep="\n")
