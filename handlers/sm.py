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


def _permute_0(x: int) -> int:
    return x ^ _left(x, 9) ^ _left(x, 17)


def _permute_1(x: int) -> int:
    return x ^ _left(x, 15) ^ _left(x, 23)


@operation("vsm3msg1", "b,b,b->b", Extent.WHOLE)
def message_1(form: Form, w7: memoryview, w13: memoryview, w0: memoryview, out: memoryview) -> Step:
    """The sources start with words 7, 13 and 0 of the message; lane 3 lacks word 16."""

    def step() -> None:
        *following, _ = _unpack_from(w13)
        rows = zip(_unpack_from(w7), _unpack_from(w0), [*following, 0], strict=True)
        _pack_into(out, 0, *[_permute_1(a ^ b ^ _left(c, 15)) for a, b, c in rows])

    return step


@operation("vsm3msg2", "b,b,b->b", Extent.WHOLE)
def message_2(
    form: Form, partial: memoryview, w3: memoryview, w10: memoryview, out: memoryview
) -> Step:
    """Words 16 to 19, of the result of VSM3MSG1 and of words 3 to 6 and 10 to 13."""

    def step() -> None:
        rows = zip(_unpack_from(partial), _unpack_from(w3), _unpack_from(w10), strict=True)
        words = [_left(b, 7) ^ c ^ a for a, b, c in rows]
        words[3] ^= _permute_1(_left(words[0], 15))
        _pack_into(out, 0, *words)

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
            turned = _left(a, 12)
            ss1 = _left(turned + e + k & _MASK, 7)
            ff = a ^ b ^ c if early else a & b | a & c | b & c
            gg = e ^ f ^ g if early else e & f | ~e & g
            tt1 = ff + d + (ss1 ^ turned) + (w[i] ^ w[i + 2]) & _MASK
            tt2 = gg + h + ss1 + w[i] & _MASK
            a, b, c, d = tt1, a, _left(b, 9), c
            e, f, g, h = _permute_0(tt2), e, _left(f, 19), g
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

    def one(x: int, mixed: int) -> int:
        high = mixed >> 16
        return x ^ t0[mixed & 0xFF] ^ t1[mixed >> 8 & 0xFF] ^ t2[high & 0xFF] ^ t3[high >> 8]

    def plan(form: Form, state: memoryview, keys: memoryview, out: memoryview) -> Step:
        blocks = range(0, len(out), 16)

        def step() -> None:
            for at in blocks:
                a, b, c, d = _unpack_from(state, at)
                k0, k1, k2, k3 = _unpack_from(keys, at)
                a = one(a, b ^ c ^ d ^ k0)
                b = one(b, c ^ d ^ a ^ k1)
                c = one(c, d ^ a ^ b ^ k2)
                d = one(d, a ^ b ^ c ^ k3)
                _pack_into(out, at, a, b, c, d)

        return step

    return plan


CIPHER = [
    planned("vsm4rnds4", "b,b->b", _four_rounds((2, 10, 18, 24)), Extent.WHOLE),
    planned("vsm4key4", "b,b->b", _four_rounds((13, 23)), Extent.WHOLE),
]
