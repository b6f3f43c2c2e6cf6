"""AVX-NE-CONVERT: golden values, the older conversions, and MXCSR left alone.

No CPU at hand has these; what the host shares with them (VCVTPH2PS, and AVX512_BF16's
VCVTNEPS2BF16) stands for them.
"""

from __future__ import annotations

import struct

import numpy as np
import pytest

from handlers import float_convert, float_no_exceptions
from sandbox.encodings import Memory, encode, form
from sandbox.native import NativeCpu, State, host_features
from tests.vector_forms import DATA, execute, handlers_of, small_cpu

HANDLERS = handlers_of(float_no_exceptions)
SINGLES = [
    0, 0x80000000, 1, 0x807FFFFF, 0x00800000, 0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001,
    0x3F807FFF, 0x7F7FFFFF, 0x7F7F7FFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFBFFFFF,
    0xFF800001, 0xC0490FDB, 0x00800001,
]  # fmt: skip


def loaded(name: str, data: bytes) -> bytes:
    """The destination of a form with a memory operand."""
    cpu = small_cpu()
    cpu.mxcsr = 0  # everything unmasked
    cpu.write(DATA, data.ljust(32, b"\0"))
    execute(HANDLERS, cpu, encode(form(name), (1,), Memory(0)).hex())
    assert cpu.mxcsr == 0
    return cpu.vec.read(1)


def narrowed(singles: list[int]) -> list[int]:
    """Eight values to bfloat16."""
    cpu = small_cpu(v2=struct.pack("<8I", *singles))
    cpu.mxcsr = 0x6000 | 0x8040  # toward zero, FTZ, DAZ, unmasked: all the same to it
    execute(HANDLERS, cpu, encode(form("VEX_VCVTNEPS2BF16_XMM_YMMM256"), (1, 2)).hex())
    assert cpu.mxcsr == 0x6000 | 0x8040 and not any(cpu.vec.read(1)[16:])
    return list(struct.unpack("<8H", cpu.vec.read(1, 16)))


@pytest.mark.parametrize(
    ("single", "brain"),
    [
        (0x3F800000, 0x3F80), (0x3F808000, 0x3F80), (0x3F818000, 0x3F82), (0x3F808001, 0x3F81),
        (0x7F7FFFFF, 0x7F80), (0x7F800000, 0x7F80), (0x807FFFFF, 0x8000), (0x00800000, 0x0080),
        (0x7F800001, 0x7FC0), (0xFFBFFFFF, 0xFFFF), (0x7FFFFFFF, 0x7FFF), (0x00000001, 0x0000),
    ],
)  # fmt: skip
def test_bfloat16_by_the_manuals_rules(single: int, brain: int) -> None:
    assert narrowed([single] * 8) == [brain] * 8


def test_bfloat16_is_what_avx512_hosts_compute() -> None:
    if NativeCpu.available() or not {"AVX512_BF16", "AVX512VL"} <= host_features():
        pytest.skip("the host has no AVX512_BF16")
    code = encode(form("EVEX_VCVTNEPS2BF16_XMM_K1Z_YMMM256B32"), (1, 2))
    source = np.random.default_rng(5)
    for _ in range(40):
        values = [int(x) for x in source.integers(0, 1 << 32, 4)] + [
            int(x) for x in source.choice(SINGLES, 4)
        ]
        state = State()
        vectors = bytearray(state.vectors)
        vectors[128:160] = struct.pack("<8I", *values)
        state.vectors = bytes(vectors)
        native = NativeCpu.shared().run(code, state).state
        assert narrowed(values) == list(struct.unpack("<8H", native.vector(1, 16)))


@pytest.mark.parametrize("letter", ["X", "Y"])
def test_halves_become_what_vcvtph2ps_makes_of_them(letter: str) -> None:
    count = 4 if letter == "X" else 8
    source = np.random.default_rng(7)
    special = [0, 0x8000, 1, 0x83FF, 0x400, 0x7BFF, 0x7C00, 0xFC00, 0x7C01, 0xFE55, 0x3C00]
    for _ in range(30):
        halves = [int(x) for x in source.choice(special, count)]
        halves += [int(x) for x in source.integers(0, 1 << 16, count)]
        source.shuffle(halves)
        data = struct.pack(f"<{2 * count}H", *halves)
        for name, chosen in (
            ("EEPH", halves[::2]), ("EOPH", halves[1::2]), ("SH", halves[:1] * count),
        ):  # fmt: skip
            memory = "M16" if name == "SH" else f"M{32 * count}"
            prefix = "VBCSTNE" if name == "SH" else "VCVTN"
            got = loaded(f"VEX_{prefix}{name}2PS_{letter}MM_{memory}", data)
            cpu = small_cpu(v2=struct.pack(f"<{count}H", *chosen))
            cpu.mxcsr = 0x1F80
            older = encode(form("VEX_VCVTPH2PS_YMM_XMMM128"), (1, 2)).hex()
            execute(handlers_of(float_convert), cpu, older)
            assert got == cpu.vec.read(1)[: 4 * count] + bytes(64 - 4 * count)


def test_bfloat16_widens_by_sixteen_zero_bits() -> None:
    data = struct.pack("<8H", 0x3F80, 0x7F81, 1, 0x8000, 0xFF80, 0xFFFF, 0x1234, 0x4049)
    even = loaded("VEX_VCVTNEEBF162PS_XMM_M128", data)
    odd = loaded("VEX_VCVTNEOBF162PS_XMM_M128", data)
    assert struct.unpack("<4I", even[:16]) == (0x3F800000, 0x10000, 0xFF800000, 0x12340000)
    assert struct.unpack("<4I", odd[:16]) == (0x7F810000, 0x80000000, 0xFFFF0000, 0x40490000)
    all_same = loaded("VEX_VBCSTNEBF162PS_YMM_M16", data[2:])
    assert all_same == struct.pack("<I", 0x7F810000) * 8 + bytes(32)
    assert not any(even[16:] + odd[16:])
