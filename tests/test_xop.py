"""XOP against bit strings, Python integers and ``math``: no CPU at hand has it."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import numpy as np
import pytest

from sandbox.encodings import encode, form, kinds_of
from tests.amd_forms import HANDLERS, joined, lanes, operands, result
from tests.vector_forms import execute, small_cpu


def test_kinds_of_operands_are_as_the_tests_assume() -> None:
    assert kinds_of(form("XOP_VPPERM_XMM_XMM_XMM_XMMM128"))[2] == "XMM_IS4"


@pytest.mark.parametrize(("letter", "size"), [("X", 16), ("Y", 32)])
def test_vpcmov_selects_bits(letter: str, size: int) -> None:
    name = f"XOP_VPCMOV_{letter}MM_{letter}MM_{letter}MMM{8 * size}_{letter}MM"
    for a, b, selector in operands("vpcmov", 3, 8):
        want = bytes(x & s | y & ~s & 0xFF for x, y, s in zip(a, b, selector, strict=True))
        assert result(name, a, b, selector, size=size) == want[:size]


def test_vpperm_of_sources_in_either_place() -> None:
    """Blend of two sources by index 0 to 31; then the eight operations on a byte."""
    first, second = bytes(range(100, 116)), bytes(range(200, 216))
    control = bytes([0, 15, 16, 31, 5, 21, *range(10)])
    want = bytes((first + second)[i] for i in control)
    assert result("XOP_VPPERM_XMM_XMM_XMMM128_XMM", first, second, control) == want
    # the other encoding has the control in the r/m operand
    assert result("XOP_VPPERM_XMM_XMM_XMM_XMMM128", first, second, control) == want
    byte = bytes([0b1011_0010] + [0] * 15)
    changes = bytes(op << 5 for op in range(8)) * 2
    got = result("XOP_VPPERM_XMM_XMM_XMMM128_XMM", byte, byte, changes)[:8]
    assert got == bytes([0xB2, 0x4D, 0x4D, 0xB2, 0x00, 0xFF, 0xFF, 0x00])


@pytest.mark.parametrize("kind", ["PS", "PD"])
def test_vpermil2_table(kind: str) -> None:
    """The manual's table of selector, match bit and the immediate's zeroing bits."""
    size = 4 if kind == "PS" else 8
    count = 16 // size
    first, second = (
        joined(list(range(10, 10 + 32 // size)), size),
        joined([-1] * (32 // size), size),
    )
    for zeroing in range(4):
        for match in (0, 1):
            for pick in range(2 * count):
                source, lane = divmod(pick, count)
                selector = match << 3 | source << 2 | lane << (size == 8)
                got = lanes(
                    result(
                        f"VEX_VPERMIL2{kind}_YMM_YMM_YMMM256_YMM_IMM4", first, second,
                        joined([selector] * (32 // size), size), immediate=zeroing, size=32,
                    ),
                    size,
                )  # fmt: skip
                blocks = [10 + lane, 10 + count + lane] if not source else [-1, -1]
                zero = (zeroing, match) in ((2, 1), (3, 0))
                assert got == [0 if zero else b for b in blocks for _ in range(count)]


WORDS = [("B", 1), ("W", 2), ("D", 4), ("Q", 8)]


@pytest.mark.parametrize(("letter", "size"), WORDS)
@pytest.mark.parametrize("sign", ["", "U"])
def test_vpcom(letter: str, size: int, sign: str) -> None:
    relations: list[Callable[[int, int], bool]] = [
        lambda a, b: a < b, lambda a, b: a <= b, lambda a, b: a > b, lambda a, b: a >= b,
        lambda a, b: a == b, lambda a, b: a != b, lambda a, b: False, lambda a, b: True,
    ]  # fmt: skip
    for number, (a, b) in enumerate(operands((letter, sign), 2, size)):
        if number % 3 == 0:
            b = a[:8] + b[8:]
        got = result(f"XOP_VPCOM{sign}{letter}_XMM_XMM_XMMM128_IMM8", a, b, immediate=number & 7)
        pairs = zip(lanes(a, size, signed=not sign), lanes(b, size, signed=not sign), strict=True)
        want = [-1 if relations[number & 7](x, y) else 0 for x, y in pairs]
        assert lanes(got, size) == want[: 16 // size]


def rotated(bits: str, count: int) -> str:
    count %= len(bits)
    return bits[count:] + bits[:count]


def shifted(bits: str, count: int, fill: str) -> str:
    width = len(bits)
    if count >= 0:
        count %= width
        return bits[count:] + "0" * count
    count = -count % width
    return (fill * count + bits)[:width]


@pytest.mark.parametrize(("letter", "size"), WORDS)
@pytest.mark.parametrize("name", ["ROT", "SHL", "SHA"])
def test_shifts_and_rotations_by_signed_counts(letter: str, size: int, name: str) -> None:
    for a, b in operands((letter, name), 2, size):
        want = []
        for x, y in zip(lanes(a, size, signed=False), lanes(b, size), strict=True):
            count = (y & 0xFF) - (256 if y & 0x80 else 0)
            bits = f"{x:0{8 * size}b}"
            fill = bits[0] if name == "SHA" else "0"
            moved = rotated(bits, count) if name == "ROT" else shifted(bits, count, fill)
            want.append(int(moved, 2))
        for order in ("XMM_XMMM128_XMM", "XMM_XMM_XMMM128"):
            got = result(f"XOP_VP{name}{letter}_{order}", a, b)
            assert lanes(got, size, signed=False) == want[: 16 // size]
        if name == "ROT":
            got = result(f"XOP_VPROT{letter}_XMM_XMMM128_IMM8", a, immediate=b[0])
            count = b[0] - (256 if b[0] & 0x80 else 0)
            texts = [f"{x:0{8 * size}b}" for x in lanes(a, size, signed=False)]
            moved_lanes = [int(rotated(text, count), 2) for text in texts]
            assert lanes(got, size, signed=False) == moved_lanes[: 16 // size]


@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize(
    ("name", "narrow", "wide", "lane"),
    [("WW", 2, 2, 0), ("WD", 2, 4, 1), ("DD", 4, 4, 0), ("DQL", 4, 8, 0), ("DQH", 4, 8, 1)],
)
def test_multiply_accumulate(name: str, narrow: int, wide: int, lane: int, saturate: bool) -> None:
    limit = 1 << 8 * wide - 1
    for a, b, _ in operands(name, 3, narrow):
        c = next(iter(operands((name, a), 1, wide)))[0]
        step = wide // narrow
        products = [x * y for x, y in zip(lanes(a, narrow), lanes(b, narrow), strict=True)]
        sums = [p + z for p, z in zip(products[lane::step], lanes(c, wide), strict=True)]
        if saturate:
            sums = [max(-limit, min(limit - 1, total)) for total in sums]
        got = result(f"XOP_VPMAC{'SS' if saturate else 'S'}{name}_XMM_XMM_XMMM128_XMM", a, b, c)
        assert got == joined(sums, wide)[:16]


@pytest.mark.parametrize("saturate", [False, True])
def test_multiply_accumulate_pairs(saturate: bool) -> None:
    low, high = -1 << 31, (1 << 31) - 1
    for a, b, c in operands("madc", 3, 2):
        products = [x * y for x, y in zip(lanes(a, 2), lanes(b, 2), strict=True)]
        sums = [
            p + q + z for p, q, z in zip(products[::2], products[1::2], lanes(c, 4), strict=True)
        ]
        if saturate:
            sums = [max(low, min(high, total)) for total in sums]
        name = f"XOP_VPMADC{'SS' if saturate else 'S'}WD_XMM_XMM_XMMM128_XMM"
        assert result(name, a, b, c) == joined(sums, 4)[:16]


@pytest.mark.parametrize("pair", ["BW", "BD", "BQ", "WD", "WQ", "DQ"])
def test_horizontal_sums_and_differences(pair: str) -> None:
    sizes = {"B": 1, "W": 2, "D": 4, "Q": 8}
    narrow, wide = sizes[pair[0]], sizes[pair[1]]
    step = wide // narrow
    for (a,) in operands(pair, 1, narrow):
        for sign in ("", "U"):
            values = lanes(a, narrow, signed=not sign)
            sums = [sum(values[i : i + step]) for i in range(0, len(values), step)]
            assert result(f"XOP_VPHADD{sign}{pair}_XMM_XMMM128", a) == joined(sums, wide)[:16]
        if step == 2:
            values = lanes(a, narrow)
            differences = [x - y for x, y in zip(values[::2], values[1::2], strict=True)]
            assert result(f"XOP_VPHSUB{pair}_XMM_XMMM128", a) == joined(differences, wide)[:16]


@pytest.mark.parametrize("seed", range(3))
def test_vfrcz_is_the_fraction(seed: int) -> None:
    source = np.random.default_rng(seed)
    exponents = source.integers(-30, 60, 4)
    values = (source.normal(size=4) * 2.0**exponents).tolist()
    got = struct.unpack(
        "<4d", result("XOP_VFRCZPD_YMM_YMMM256", struct.pack("<4d", *values), size=32)
    )
    assert list(got) == [math.modf(v)[0] + 0.0 for v in values]


@pytest.mark.parametrize(
    ("single", "mxcsr", "fraction", "flags"),
    [
        (0xBFC00000, 0x1F80, 0xBF000000, 0),  # -1.5
        (0xC0000000, 0x1F80, 0x00000000, 0),  # -2.0: a difference of equals is +0
        (0xC0000000, 0x3F80, 0x80000000, 0),  # but -0 when rounding down
        (0x7F800000, 0x1F80, 0xFFC00000, 1),  # infinity: invalid
        (0x7F800001, 0x1F80, 0x7FC00001, 1),
        (0xFFC00005, 0x1F80, 0xFFC00005, 0),
        (0x00000001, 0x1F80, 0x00000001, 2),  # denormal
        (0x80000001, 0x1FC0, 0x00000000, 0),  # DAZ
        (0x80000001, 0x9F80, 0x80000000, 0x32),  # FTZ
    ],
)
def test_vfrcz_corners(single: int, mxcsr: int, fraction: int, flags: int) -> None:
    cpu = small_cpu(v2=struct.pack("<I", single))
    cpu.mxcsr = mxcsr
    execute(HANDLERS, cpu, encode(form("XOP_VFRCZSS_XMM_XMMM32"), (1, 2)).hex())
    assert cpu.vec.read(1) == struct.pack("<I", fraction) + bytes(60)
    assert cpu.mxcsr == mxcsr | flags
