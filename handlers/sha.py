"""SHA-1, SHA-256 and SHA-512 rounds and message schedules.

FIPS 180-4; SDM Vol. 2: SHA1*, SHA256*, VSHA512*. Operands hold words, the lowest lane first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import Any

from handlers.operands import Form, Step
from handlers.vector import Extent, Plan, operation, planned

_MASK32 = 0xFFFF_FFFF
_WORDS32, _WORDS64 = Struct("<4I"), Struct("<4Q")
_unpack, _pack_into = _WORDS32.unpack, _WORDS32.pack_into


def _left(x: int, count: int) -> int:
    """A 32-bit word rotated left."""
    return (x << count | x >> 32 - count) & _MASK32


# SHA-1. The state is A B C D from lane 3 down to lane 0, message words likewise.


def _choose(b: int, c: int, d: int) -> int:
    return b & (c ^ d) ^ d


def _parity(b: int, c: int, d: int) -> int:
    return b ^ c ^ d


def _majority(b: int, c: int, d: int) -> int:
    return b & c ^ b & d ^ c & d


_SHA1_ROUNDS: tuple[tuple[Callable[[int, int, int], int], int], ...] = (
    (_choose, 0x5A827999),
    (_parity, 0x6ED9EBA1),
    (_majority, 0x8F1BBCDC),
    (_parity, 0xCA62C1D6),
)
"""Function and constant by the immediate (FIPS 180-4, 4.1.1 and 4.2.1)."""


@operation("sha1rnds4", "b,b->b", Extent.WHOLE)
def sha1_rounds(form: Form, state: memoryview, words: memoryview, out: memoryview) -> Step:
    """Four rounds. The highest word comes with E already added (by SHA1NEXTE)."""
    function, constant = _SHA1_ROUNDS[form.imm & 3]

    def step() -> None:
        d, c, b, a = _unpack(state)
        e = 0
        for word in reversed(_unpack(words)):
            total = (a << 5 | a >> 27) + function(b, c, d) + e + word + constant & _MASK32
            a, b, c, d, e = total, a, (b << 30 | b >> 2) & _MASK32, c, d
        _pack_into(out, 0, d, c, b, a)

    return step


@operation("sha1nexte", "b,b->b", Extent.WHOLE)
def sha1_next_e(form: Form, state: memoryview, words: memoryview, out: memoryview) -> Step:
    def step() -> None:
        a = _unpack(state)[3]
        w3, w2, w1, w0 = _unpack(words)
        _pack_into(out, 0, w3, w2, w1, w0 + _left(a, 30) & _MASK32)

    return step


@operation("sha1msg1", "b,b->b", Extent.WHOLE)
def sha1_message_1(form: Form, a: memoryview, b: memoryview, out: memoryview) -> Step:
    def step() -> None:
        w3, w2, w1, w0 = _unpack(a)
        _, _, w5, w4 = _unpack(b)
        _pack_into(out, 0, w3 ^ w5, w2 ^ w4, w1 ^ w3, w0 ^ w2)

    return step


@operation("sha1msg2", "b,b->b", Extent.WHOLE)
def sha1_message_2(form: Form, a: memoryview, b: memoryview, out: memoryview) -> Step:
    def step() -> None:
        x0, x1, x2, x3 = _unpack(a)
        w15, w14, w13, _ = _unpack(b)
        w16 = _left(x3 ^ w13, 1)
        _pack_into(out, 0, _left(x0 ^ w16, 1), _left(x1 ^ w15, 1), _left(x2 ^ w14, 1), w16)

    return step


# SHA-256 and SHA-512, which differ in the word and in the rotations (FIPS 180-4, 4.1.2, 4.1.3)

Mixer = Callable[[int], int]


def _rotations_and_shift(bits: int, first: int, second: int, shift: int) -> Mixer:
    """The exclusive or of two rotations to the right and a shift; above the word is garbage."""
    twice = 1 << bits | 1

    def mix(x: int) -> int:
        y = x * twice
        return y >> first ^ y >> second ^ x >> shift

    return mix


@dataclass(frozen=True, slots=True)
class _Family:
    """``words``: four of them in memory; the rotations to the right of capital sigma 0 and 1; the
    functions small sigma 0 and 1."""

    words: Struct
    mask: int
    big: tuple[tuple[int, int, int], tuple[int, int, int]]
    small: tuple[Mixer, Mixer]


_SHA256 = _Family(
    _WORDS32,
    _MASK32,
    ((2, 13, 22), (6, 11, 25)),
    (_rotations_and_shift(32, 7, 18, 3), _rotations_and_shift(32, 17, 19, 10)),
)
_SHA512 = _Family(
    _WORDS64,
    (1 << 64) - 1,
    ((28, 34, 39), (14, 18, 41)),
    (_rotations_and_shift(64, 1, 8, 7), _rotations_and_shift(64, 19, 61, 6)),
)


def _rounds(family: _Family) -> Plan:
    """Two rounds: F E B A from the lowest lane up, and H G D C; words with constants added."""
    unpack, pack_into, mask = family.words.unpack, family.words.pack_into, family.mask
    (a0, a1, a2), (e0, e1, e2) = family.big
    twice = mask + 2  # a word times this stands twice, so that a shift rotates it

    def plan(form: Form, cdgh: Any, abef: Any, words: memoryview, out: memoryview) -> Step:
        two = Struct(family.words.format.replace("4", "2")).unpack_from

        def step() -> None:
            h, g, d, c = unpack(cdgh)
            f, e, b, a = unpack(abef)
            for word in two(words):
                ee, aa = e * twice, a * twice
                t1 = h + (ee >> e0 ^ ee >> e1 ^ ee >> e2) + (e & (f ^ g) ^ g) + word & mask
                t2 = (aa >> a0 ^ aa >> a1 ^ aa >> a2) + (a & b | (a | b) & c)
                a, b, c, d, e, f, g, h = t1 + t2 & mask, a, b, c, d + t1 & mask, e, f, g
            pack_into(out, 0, f, e, b, a)

        return step

    return plan


def _message_1(family: _Family) -> Plan:
    """``w[i] + sigma0(w[i + 1])``; the second source starts with the fifth word."""
    unpack, pack_into, mask = family.words.unpack, family.words.pack_into, family.mask
    sigma, one = family.small[0], family.words.size // 4

    def plan(form: Form, a: memoryview, b: memoryview, out: memoryview) -> Step:
        fifth = b[:one]

        def step() -> None:
            w0, w1, w2, w3 = unpack(a)
            w4 = int.from_bytes(fifth, "little")
            pack_into(
                out,
                0,
                w0 + sigma(w1) & mask,
                w1 + sigma(w2) & mask,
                w2 + sigma(w3) & mask,
                w3 + sigma(w4) & mask,
            )

        return step

    return plan


def _message_2(family: _Family) -> Plan:
    """``w[i] + sigma1(w[i - 2])``, where the last two depend on the first two of the result."""
    unpack, pack_into, mask = family.words.unpack, family.words.pack_into, family.mask
    sigma = family.small[1]

    def plan(form: Form, a: memoryview, b: memoryview, out: memoryview) -> Step:
        def step() -> None:
            x0, x1, x2, x3 = unpack(a)
            _, _, before_last, last = unpack(b)
            w0 = x0 + sigma(before_last) & mask
            w1 = x1 + sigma(last) & mask
            pack_into(out, 0, w0, w1, x2 + sigma(w0) & mask, x3 + sigma(w1) & mask)

        return step

    return plan


ROUNDS_AND_SCHEDULES = [
    handler
    for name, family in (("sha256", _SHA256), ("vsha512", _SHA512))
    for handler in (
        planned(f"{name}rnds2", "b,b,b->b", _rounds(family), Extent.WHOLE),
        planned(f"{name}msg1", "b,b->b", _message_1(family), Extent.WHOLE),
        planned(f"{name}msg2", "b,b->b", _message_2(family), Extent.WHOLE),
    )
]
