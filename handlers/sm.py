"""SM3 rounds and message schedule, SM4 rounds and key schedule.

GB/T 32905-2016 (SM3), GB/T 32907-2016 (SM4); SDM Vol. 2: VSM3*, VSM4*.
Lanes are 32-bit words, the lowest first.
"""

from __future__ import annotations

from functools import reduce
from operator import xor
from struct import Struct

from handlers.operands import Form, Step
from handlers.vector import Extent, Plan, operation, planned

_MASK = 0xFFFF_FFFF
_WORDS = Struct("<4I")
_unpack_from, _pack_into = _WORDS.unpack_from, _WORDS.pack_into


def _left(x: int, count: int) -> int:
    """A 32-bit word rotated left."""
    count &= 31
    return (x << count | x >> 32 - count) & _MASK


# SM3


_TWICE = 1 << 32 | 1
"""A word times this stands twice, so that a shift to the right rotates it."""


def _permute_0(x: int) -> int:
    twice = x * _TWICE
    return (x ^ twice >> 23 ^ twice >> 15) & _MASK


def _permute_1(x: int) -> int:
    twice = x * _TWICE
    return (x ^ twice >> 17 ^ twice >> 9) & _MASK


@operation("vsm3msg1", "b,b,b->b", Extent.WHOLE)
def message_1(form: Form, w7: memoryview, w13: memoryview, w0: memoryview, out: memoryview) -> Step:
    """The sources start with words 7, 13 and 0 of the message; lane 3 lacks word 16."""

    def step() -> None:
        x0, x1, x2, x3 = _unpack_from(w7)
        y0, y1, y2, y3 = _unpack_from(w0)
        z0, z1, z2, _ = _unpack_from(w13)
        _pack_into(
            out,
            0,
            _permute_1(x0 ^ y0 ^ (z0 << 15 & _MASK | z0 >> 17)),
            _permute_1(x1 ^ y1 ^ (z1 << 15 & _MASK | z1 >> 17)),
            _permute_1(x2 ^ y2 ^ (z2 << 15 & _MASK | z2 >> 17)),
            _permute_1(x3 ^ y3),
        )

    return step


@operation("vsm3msg2", "b,b,b->b", Extent.WHOLE)
def message_2(
    form: Form, partial: memoryview, w3: memoryview, w10: memoryview, out: memoryview
) -> Step:
    """Words 16 to 19, of the result of VSM3MSG1 and of words 3 to 6 and 10 to 13."""

    def step() -> None:
        x0, x1, x2, x3 = _unpack_from(partial)
        y0, y1, y2, y3 = _unpack_from(w3)
        z0, z1, z2, z3 = _unpack_from(w10)
        w16 = x0 ^ z0 ^ (y0 << 7 & _MASK | y0 >> 25)
        w17 = x1 ^ z1 ^ (y1 << 7 & _MASK | y1 >> 25)
        w18 = x2 ^ z2 ^ (y2 << 7 & _MASK | y2 >> 25)
        w19 = x3 ^ z3 ^ (y3 << 7 & _MASK | y3 >> 25) ^ _permute_1(_left(w16, 15))
        _pack_into(out, 0, w16, w17, w18, w19)

    return step


@operation("vsm3rnds2", "b,b,b->b", Extent.WHOLE)
def rounds(
    form: Form, cdgh: memoryview, abef: memoryview, words: memoryview, out: memoryview
) -> Step:
    """Two rounds, the first of which the immediate numbers.

    C, D, G and H come as they were two rounds ago, as A, B, E and F: not yet rotated.
    """
    first = form.imm & 0x3E
    early = first < 16
    constant = _left(0x79CC4519 if early else 0x7A879D8A, first)
    constants = constant, _left(constant, 1)

    def step() -> None:
        h, g, d, c = _unpack_from(cdgh)
        f, e, b, a = _unpack_from(abef)
        c, d, g, h = _left(c, 9), _left(d, 9), _left(g, 19), _left(h, 19)
        w = _unpack_from(words)
        for i, k in enumerate(constants):
            turned = (a << 12 | a >> 20) & _MASK
            ss1 = turned + e + k & _MASK
            ss1 = (ss1 << 7 | ss1 >> 25) & _MASK
            ff = a ^ b ^ c if early else a & b | (a | b) & c
            gg = e ^ f ^ g if early else e & (f ^ g) ^ g
            tt1 = ff + d + (ss1 ^ turned) + (w[i] ^ w[i + 2]) & _MASK
            tt2 = gg + h + ss1 + w[i] & _MASK
            a, b, c, d = tt1, a, (b << 9 | b >> 23) & _MASK, c
            e, f, g, h = _permute_0(tt2), e, (f << 19 | f >> 13) & _MASK, g
        _pack_into(out, 0, f, e, b, a)

    return step


# SM4


def _make_sbox() -> bytes:
    """An affine map, the inverse in GF(2^8) by the polynomial 1F5h, the same map again."""

    def times(a: int, b: int) -> int:
        product = 0
        for bit in range(8):
            product ^= a << bit if b >> bit & 1 else 0
        for bit in range(14, 7, -1):
            product ^= 0x1F5 << bit - 8 if product >> bit & 1 else 0
        return product

    def affine(x: int) -> int:
        rows = ((0xA7A7 >> 8 - bit & 0xFF, bit) for bit in range(8))
        return 0xD3 ^ sum(((row & x).bit_count() & 1) << bit for row, bit in rows)

    inverse = [0] * 256
    for a in range(1, 256):
        power = a  # a ** 254
        for _ in range(6):
            power = times(times(power, power), a)
        inverse[a] = times(power, power)
    return bytes(affine(inverse[affine(x)]) for x in range(256))


SBOX = _make_sbox()


def _tables(rotations: tuple[int, ...]) -> list[list[int]]:
    """What each byte of a word adds to ``L(S(word))``; L adds the rotations to the word."""
    tables = []
    for position in range(4):
        words = [SBOX[byte] << 8 * position for byte in range(256)]
        tables.append([reduce(xor, (_left(w, count) for count in rotations), w) for w in words])
    return tables


def _four_rounds(rotations: tuple[int, ...]) -> Plan:
    """``x4 = x0 ^ L(S(x1 ^ x2 ^ x3 ^ key))``."""
    t0, t1, t2, t3 = _tables(rotations)

    def plan(form: Form, state: memoryview, keys: memoryview, out: memoryview) -> Step:
        blocks = range(0, len(out), 16)

        def step() -> None:
            for at in blocks:
                a, b, c, d = _unpack_from(state, at)
                k0, k1, k2, k3 = _unpack_from(keys, at)
                x = b ^ c ^ d ^ k0
                a ^= t0[x & 255] ^ t1[x >> 8 & 255] ^ t2[x >> 16 & 255] ^ t3[x >> 24]
                x = c ^ d ^ a ^ k1
                b ^= t0[x & 255] ^ t1[x >> 8 & 255] ^ t2[x >> 16 & 255] ^ t3[x >> 24]
                x = d ^ a ^ b ^ k2
                c ^= t0[x & 255] ^ t1[x >> 8 & 255] ^ t2[x >> 16 & 255] ^ t3[x >> 24]
                x = a ^ b ^ c ^ k3
                d ^= t0[x & 255] ^ t1[x >> 8 & 255] ^ t2[x >> 16 & 255] ^ t3[x >> 24]
                _pack_into(out, at, a, b, c, d)

        return step

    return plan


CIPHER = [
    planned("vsm4rnds4", "b,b->b", _four_rounds((2, 10, 18, 24)), Extent.WHOLE),
    planned("vsm4key4", "b,b->b", _four_rounds((13, 23)), Extent.WHOLE),
]
