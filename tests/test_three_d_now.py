"""3DNow! against Python's floats and integers and the manual: no CPU at hand has it."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest

from sandbox.cpu import Cpu
from sandbox.encodings import encode, form
from tests.amd_forms import HANDLERS, lanes
from tests.differential import X87Bank
from tests.vector_forms import execute, small_cpu


def on_mmx(name: str, a: bytes, b: bytes) -> bytes:
    """``name mm1, mm2``."""
    cpu: Cpu = small_cpu()
    cpu.registers.bank = bank = X87Bank()
    bank.physical[1], bank.physical[2] = (int.from_bytes(x, "little") for x in (a, b))
    execute(HANDLERS, cpu, encode(form(f"D3NOW_{name}_MM_MMM64"), (1, 2)).hex())
    assert bank.read("fptag") == 0 and bank.physical[1] >> 64 == 0xFFFF
    return bank.read("mm1").to_bytes(8, "little")


def floats(name: str, a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    low, high = struct.unpack("<2f", on_mmx(name, struct.pack("<2f", *a), struct.pack("<2f", *b)))
    return low, high


def f32(value: float) -> float:
    return float(np.float32(value))


@pytest.mark.parametrize("seed", range(5))
def test_3dnow_arithmetic(seed: int) -> None:
    source = np.random.default_rng(seed)
    a0, a1, b0, b1 = (f32(x) for x in source.normal(size=4) * 100)
    a, b = (a0, a1), (b0, b1)
    assert floats("PFADD", a, b) == (f32(a0 + b0), f32(a1 + b1))
    assert floats("PFSUB", a, b) == (f32(a0 - b0), f32(a1 - b1))
    assert floats("PFSUBR", a, b) == (f32(b0 - a0), f32(b1 - a1))
    assert floats("PFMUL", a, b) == (f32(a0 * b0), f32(a1 * b1))
    assert floats("PFACC", a, b) == (f32(a0 + a1), f32(b0 + b1))
    assert floats("PFNACC", a, b) == (f32(a0 - a1), f32(b0 - b1))
    assert floats("PFPNACC", a, b) == (f32(a0 - a1), f32(b0 + b1))
    assert floats("PFMIN", a, b) == (min(a0, b0), min(a1, b1))
    assert floats("PFMAX", a, b) == (max(a0, b0), max(a1, b1))
    packed = struct.pack("<2f", *a), struct.pack("<2f", *b)
    for name, relation in (
        ("PFCMPEQ", float.__eq__), ("PFCMPGT", float.__gt__), ("PFCMPGE", float.__ge__),
    ):  # fmt: skip
        want = [-relation(a0, b0), -relation(a1, b1)]
        assert lanes(on_mmx(name, *packed), 4) == want


def test_3dnow_overflow_underflow_and_zeros() -> None:
    largest = struct.unpack("<f", b"\xff\xff\x7f\x7f")[0]
    assert floats("PFMUL", (1e30, -1e30), (1e30, 1e30)) == (largest, -largest)
    assert floats("PFADD", (largest, 1e-40), (largest, 0.0)) == (largest, 0.0)
    assert floats("PFMUL", (1e-30, 1e-40), (1e-30, 1e30)) == (0.0, 0.0)
    assert on_mmx("PFMAX", struct.pack("<2f", -0.0, -1.0), struct.pack("<2f", -0.0, -0.0)) == bytes(
        8
    )
    assert floats("PFRCP", (0.0, 0.0), (0.0, 5.0)) == (largest, largest)
    assert floats("PFRCP", (0.0, 0.0), (-0.0, 5.0)) == (-largest, -largest)


def test_3dnow_division_and_square_root_by_the_manuals_sequences() -> None:
    """Section "Division" and "Square Root": full precision at the end, 14 and 15 bits before."""
    for value in (3.0, 0.1, 1e20, 7.25, 1e-20, 123456.0):
        x = struct.pack("<2f", value, value)
        approximation = on_mmx("PFRCP", x, x)
        step = on_mmx("PFRCPIT1", x, approximation)
        inverse = on_mmx("PFRCPIT2", step, approximation)
        assert inverse == struct.pack("<2f", *[1 / f32(value)] * 2)
        assert abs(struct.unpack("<2f", approximation)[0] * f32(value) - 1) < 2**-14
        approximation = on_mmx("PFRSQRT", x, x)
        square = on_mmx("PFMUL", approximation, approximation)
        step = on_mmx("PFRSQIT1", square, x)
        root = on_mmx("PFRCPIT2", step, approximation)
        assert root == struct.pack("<2f", *[1 / math.sqrt(f32(value))] * 2)
    negative = struct.pack("<2f", -4.0, 1.0)
    assert struct.unpack("<2f", on_mmx("PFRSQRT", negative, negative)) == (-0.5, -0.5)


def test_3dnow_conversions() -> None:
    def convert(name: str, code: str, *values: float) -> list[int]:
        return lanes(on_mmx(name, bytes(8), struct.pack(code, *values)), 4)

    assert convert("PF2ID", "<2f", 2.9, -2.9) == [2, -2]
    assert convert("PF2ID", "<2f", 1e20, -1e20) == [0x7FFFFFFF, -0x80000000]
    assert convert("PF2IW", "<2f", 40000.0, -32768.9) == [32767, -32768]
    as_floats = on_mmx("PI2FD", bytes(8), struct.pack("<2i", 0x7FFFFFFF, -0x1000001))
    assert struct.unpack("<2f", as_floats) == (float(0x7FFFFF80), float(-0x1000000))
    words = on_mmx("PI2FW", bytes(8), struct.pack("<4h", -5, 99, 32767, 99))
    assert struct.unpack("<2f", words) == (-5.0, 32767.0)


def test_3dnow_integers() -> None:
    a, b = (
        struct.pack("<4h", 0x7FFF, -0x8000, 3, -3),
        struct.pack("<4h", 2, -0x8000, 0x5555, 0x2AAB),
    )
    assert lanes(on_mmx("PMULHRW", a, b), 2) == [1, 0x4000, 1, -1]
    assert on_mmx("PAVGUSB", bytes([0, 255, 3, 4] * 2), bytes([1, 255, 4, 4] * 2)) == bytes(
        [1, 255, 4, 4] * 2
    )
    assert on_mmx("PSWAPD", bytes(8), b"abcdefgh") == b"efghabcd"
