"""SSE4a against the host; XOP, FMA4, TBM and 3DNow! against plain definitions and what is proven.

No CPU at hand has the latter: bit strings, Python integers, ``math`` and the FMA3 handlers (which
the host has judged) stand in.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from handlers import float_fma, sse4a
from handlers.amd import PACK
from sandbox.cases import Cases
from sandbox.cpu import Cpu
from sandbox.decode import FORM_NAMES, decode
from sandbox.encodings import Memory, all_forms, encode, features_of, form, kinds_of
from sandbox.registers import CF, OF, SF, ZF
from tests.differential import X87Bank, sweep
from tests.vector_forms import DATA, execute, forms_of_handlers, handlers_of, small_cpu, unhandled

HANDLERS = PACK.handlers


def test_sse4a_does_what_the_host_cpu_does() -> None:
    handlers = handlers_of(sse4a)
    sweep(handlers, forms=forms_of_handlers(handlers), cases=8)


def test_every_form_is_handled() -> None:
    wanted = {"XOP", "FMA4", "TBM", "SSE4A", "D3NOW", "D3NOWEXT"}
    forms = [c for c in all_forms() if features_of(c) & wanted and FORM_NAMES[c] != "FEMMS"]
    bextr = {form("XOP_BEXTR_R32_RM32_IMM32"), form("XOP_BEXTR_R64_RM64_IMM32")}
    assert len(forms) > 190
    assert unhandled(HANDLERS, [c for c in forms if c not in bextr]) == []


def lanes(data: bytes, size: int, *, signed: bool = True) -> list[int]:
    return [
        int.from_bytes(data[i : i + size], "little", signed=signed)
        for i in range(0, len(data), size)
    ]


def joined(values: list[int], size: int) -> bytes:
    return b"".join((v & (1 << 8 * size) - 1).to_bytes(size, "little") for v in values)


def operands(seed: object, count: int, size: int) -> Iterator[list[bytes]]:
    """Lists of ``count`` operands of 32 bytes; lanes of ``size`` bytes, many of them corners."""
    source, top = random.Random(str(seed)), 1 << 8 * size
    corners = (0, 1, top - 1, top // 2, top // 2 - 1, top // 2 + 1, 0xFF)
    for _ in range(24):
        yield [
            joined(
                [
                    source.choice(corners) if source.random() < 0.4 else source.randrange(top)
                    for _ in range(32 // size)
                ],
                size,
            )
            for _ in range(count)
        ]


def result(name: str, *values: bytes, immediate: int = 0, size: int = 16) -> bytes:
    """The destination of a form, all of its sources in registers 2, 3, 4; upper bytes are zero."""
    cpu = small_cpu(**{f"v{n}": value for n, value in enumerate(values, 2)})
    execute(HANDLERS, cpu, encode(form(name), (1, 2, 3, 4), None, immediate).hex())
    assert not any(cpu.vec.read(1)[size:])
    return cpu.vec.read(1, size)


# XOP


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


# FMA4


@pytest.mark.parametrize("suffix", ["PS", "PD", "SS", "SD"])
def test_fma4_is_fma3_with_a_destination_of_its_own(suffix: str) -> None:
    """``d = a * b + c`` is VFMADD132 of a, c, b, NaNs and exceptions alike."""
    names = ["VFMADD", "VFMSUB", "VFNMADD", "VFNMSUB"]
    names += ["VFMADDSUB", "VFMSUBADD"] if suffix[0] == "P" else []
    element = {"S": 32, "D": 64}[suffix[1]]
    memory = 256 if suffix[0] == "P" else element
    y = "Y" if suffix[0] == "P" else "X"
    written = memory // 8
    handlers = handlers_of(float_fma)
    for name in names:
        three = form(f"VEX_{name}132{suffix}_{y}MM_{y}MM_{y}MMM{memory}")
        states = Cases(decode(encode(three, (1, 2, 3)), 64), 3, True).take(25)
        for state in states:
            vectors = {f"v{n}": state.vector(n)[:32] for n in (1, 2, 3)}
            older = small_cpu(**vectors)
            a, c, b = (1, 2, 3)
            newer = small_cpu(**vectors)
            for cpu in (older, newer):
                cpu.mxcsr = state.mxcsr | 0x1F80
            execute(handlers, older, encode(three, (a, c, b)).hex())
            for order in ("XMM_XMM_XMMM_XMM", "XMM_XMM_XMM_XMMM"):
                four = order.replace("XMMM", f"{y}MMM{memory}").replace("XMM", f"{y}MM")
                code = encode(form(f"VEX_{name}{suffix}_{four}"), (5, a, b, c))
                execute(HANDLERS, newer, code.hex())
                got = newer.vec.read(5)
                assert got[:written] == older.vec.read(1)[:written]
                assert not any(got[written:])
                assert newer.mxcsr == older.mxcsr


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


# TBM


def trailing(bits: str, digit: str) -> tuple[str, str, str]:
    """What stands above the first other digit, that digit, and the run of ``digit`` at the end."""
    kept = bits.rstrip(digit)
    return kept[:-1], kept[-1:], bits[len(kept) :]


def tbm(name: str, bits: str) -> tuple[str, bool]:
    """The manual's words on a string of binary digits; and whether CF is set."""
    ones, zeros = trailing(bits, "1"), trailing(bits, "0")
    width, n, z = len(bits), len(ones[2]), len(zeros[2])
    all_ones, all_zeros = "0" not in bits, "1" not in bits
    match name:
        case "BLCFILL":
            return bits[: width - n] + "0" * n, all_ones
        case "BLCS":
            return ones[0] + "1" * (n + (not all_ones)), all_ones
        case "BLCIC":
            return "0" * len(ones[0]) + ("" if all_ones else "1") + "0" * n, all_ones
        case "BLCI":
            return "1" * len(ones[0]) + ("" if all_ones else "0") + "1" * n, all_ones
        case "BLCMSK":
            return "0" * len(ones[0]) + "1" * (n + (not all_ones)), all_ones
        case "T1MSKC":
            return "1" * (width - n) + "0" * n, all_ones
        case "BLSFILL":
            return bits[: width - z] + "1" * z, all_zeros
        case "BLSIC":
            return "1" * len(zeros[0]) + ("" if all_zeros else "0") + "1" * z, all_zeros
        case _:  # TZMSK
            return "0" * (width - z) + "1" * z, all_zeros


TBM = ["BLCFILL", "BLCS", "BLCIC", "BLCI", "BLCMSK", "T1MSKC", "BLSFILL", "BLSIC", "TZMSK"]


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("name", TBM)
def test_tbm(name: str, bits: int) -> None:
    source, mask = random.Random(name), (1 << bits) - 1
    values = [0, 1, mask, mask >> 1, 1 << bits - 1, mask - 1, 0x17, 0x58]
    values += [source.getrandbits(bits) | (1 << source.randrange(bits)) - 1 for _ in range(20)]
    values += [source.getrandbits(bits) << source.randrange(bits) & mask for _ in range(20)]
    code = encode(form(f"XOP_{name}_R{bits}_RM{bits}"), (1, 2))
    loading = encode(form(f"XOP_{name}_R{bits}_RM{bits}"), (1,), Memory(0))
    for value in values:
        text, carry = tbm(name, f"{value:0{bits}b}")
        want = int(text, 2)
        for raw in (code, loading):
            cpu = small_cpu()
            cpu.gpr[1], cpu.gpr[2] = -1 & (1 << 64) - 1, value
            cpu.write_int(DATA, value, bits // 8)
            cpu.rflags = 0x202 | OF
            execute(HANDLERS, cpu, raw.hex())
            assert cpu.gpr[1] == want, (name, hex(value))
            flags = (CF if carry else 0) | (0 if want else ZF)
            flags |= SF if want >> bits - 1 else 0
            assert cpu.rflags == 0x202 | flags


# 3DNow!


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


def test_kinds_of_operands_are_as_the_tests_assume() -> None:
    assert kinds_of(form("XOP_VPPERM_XMM_XMM_XMM_XMMM128"))[2] == "XMM_IS4"
