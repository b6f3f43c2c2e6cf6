"""Approximate reciprocals: within the manual's error bound, exact for special operands."""

from __future__ import annotations

import random
import struct
from fractions import Fraction

import pytest

from handlers import float_approximate
from sandbox.cpu import Cpu
from sandbox.decode import decode
from tests.differential import native_reason, resolve
from tests.doubles import make_cpu

RCPPS, RSQRTPS = "c5fc53cb", "c5fc52cb"  # vrcpps, vrsqrtps ymm1, ymm3
BOUND = Fraction(3, 2) / 4096


def run(code: str, lanes: list[int]) -> tuple[list[int], Cpu]:
    cpu = make_cpu()
    cpu.registers.xcr0 = 7
    cpu.mxcsr = 0x7FC0
    cpu.vec.lanes(3, "u4", 32)[:] = lanes
    found = resolve(float_approximate, cpu, decode(bytes.fromhex(code), 64))
    assert found is not None
    found[1]()
    return cpu.vec.lanes(1, "u4", 32).tolist(), cpu


def value(bits: int) -> Fraction:
    return Fraction(struct.unpack("<f", struct.pack("<I", bits))[0])


def test_reciprocal_is_within_its_error_bound() -> None:
    rng = random.Random(1)
    for _ in range(200):
        lanes = [rng.choice((0, 1 << 31)) | rng.randrange(0x00800000, 0x7E800000) for _ in range(8)]
        for x, r in zip(lanes, run(RCPPS, lanes)[0], strict=True):
            assert abs(value(r) * value(x) - 1) <= BOUND


def test_reciprocal_square_root_is_within_its_error_bound() -> None:
    rng = random.Random(2)
    for _ in range(200):
        lanes = [rng.randrange(0x00800000, 0x7F800000) for _ in range(8)]
        for x, r in zip(lanes, run(RSQRTPS, lanes)[0], strict=True):
            square = value(r) ** 2 * value(x)  # (1 + e)**2
            assert (1 - BOUND) ** 2 <= square <= (1 + BOUND) ** 2


SPECIAL = [0, 1 << 31, 1, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7FA00001, 0xFFC00002]
RECIPROCALS = [0x7F800000, 0xFF800000, 0x7F800000, 0xFF800000, 0, 1 << 31, 0x7FE00001, 0xFFC00002]
ROOTS = [0x7F800000, 0xFF800000, 0x7F800000, 0xFF800000, 0, 0xFFC00000, 0x7FE00001, 0xFFC00002]


@pytest.mark.parametrize(("code", "want"), [(RCPPS, RECIPROCALS), (RSQRTPS, ROOTS)])
def test_special_operands_and_untouched_mxcsr(code: str, want: list[int]) -> None:
    got, cpu = run(code, SPECIAL)
    assert got == want
    assert cpu.mxcsr == 0x7FC0


@pytest.mark.skipif(bool(native_reason()), reason=native_reason())
@pytest.mark.parametrize("code", [RCPPS, RSQRTPS])
def test_special_operands_equal_the_host(code: str) -> None:
    from sandbox.native import NativeCpu, State

    state = State()
    state.set_vector(3, struct.pack("<8I", *SPECIAL))
    result = NativeCpu.shared().run(bytes.fromhex(code), state).state
    assert list(struct.unpack("<8I", result.vector(1, 32))) == run(code, SPECIAL)[0]


def test_tiny_results_are_zeros_and_negative_numbers_have_no_root() -> None:
    assert run(RCPPS, [0x7EFFFFFF, 0xFEFFFFFF] * 4)[0] == [0, 1 << 31] * 4
    assert run(RSQRTPS, [0xBF800000, 0x80800000] * 4)[0] == [0xFFC00000] * 8
