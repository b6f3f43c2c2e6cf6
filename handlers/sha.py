"""SHA-1, SHA-256 and SHA-512 rounds and message schedules.

FIPS 180-4; SDM Vol. 2: SHA1*, SHA256*, VSHA512*. Lanes are words, the lowest first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from handlers.operands import Form, Lanes, Step
from handlers.vector import Extent, Operation, operation, planned

_MASK32, _MASK64 = 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF


def _left(x: int, count: int) -> int:
    """A 32-bit word rotated left."""
    return (x << count | x >> 32 - count) & _MASK32


# SHA-1. The state is A B C D from lane 3 down to lane 0, message words likewise.


def _choose(b: int, c: int, d: int) -> int:
    return b & c ^ ~b & d


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


@operation("sha1rnds4", "u4,u4->u4", Extent.WHOLE)
def sha1_rounds(form: Form, state: Lanes, words: Lanes, out: Lanes) -> Step:
    """Four rounds. The highest word comes with E already added (by SHA1NEXTE)."""
    function, constant = _SHA1_ROUNDS[form.imm & 3]

    def step() -> None:
        d, c, b, a = state.tolist()
        e = 0
        for word in reversed(words.tolist()):
            total = _left(a, 5) + (function(b, c, d) & _MASK32) + e + word + constant & _MASK32
            a, b, c, d, e = total, a, _left(b, 30), c, d
        out[:] = d, c, b, a

    return step


@operation("sha1nexte", "u4,u4->u4", Extent.WHOLE)
def sha1_next_e(form: Form, state: Lanes, words: Lanes, out: Lanes) -> Step:
    def step() -> None:
        *low, high = words.tolist()
        out[:] = *low, high + _left(int(state[3]), 30) & _MASK32

    return step


@operation("sha1msg1", "u4,u4->u4", Extent.WHOLE)
def sha1_message_1(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    def step() -> None:
        w3, w2, w1, w0 = a.tolist()
        _, _, w5, w4 = b.tolist()
        out[:] = w3 ^ w5, w2 ^ w4, w1 ^ w3, w0 ^ w2

    return step


@operation("sha1msg2", "u4,u4->u4", Extent.WHOLE)
def sha1_message_2(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    def step() -> None:
        x0, x1, x2, x3 = a.tolist()
        w15, w14, w13, _ = b.tolist()
        w16 = _left(x3 ^ w13, 1)
        out[:] = _left(x0 ^ w16, 1), _left(x1 ^ w15, 1), _left(x2 ^ w14, 1), w16

    return step


# SHA-256 and SHA-512, which differ in the word and in the rotations (FIPS 180-4, 4.1.2, 4.1.3)


def _mix(bits: int, rotations: tuple[int, ...], shift: int, x: int) -> int:
    """The exclusive or of ``x`` rotated right by each count and, if not 0, shifted right."""
    result = x >> shift if shift else 0
    for count in rotations:
        result ^= x >> count | x << bits - count
    return result & (1 << bits) - 1


_big_0 = {4: partial(_mix, 32, (2, 13, 22), 0), 8: partial(_mix, 64, (28, 34, 39), 0)}
_big_1 = {4: partial(_mix, 32, (6, 11, 25), 0), 8: partial(_mix, 64, (14, 18, 41), 0)}
_small_0 = {4: partial(_mix, 32, (7, 18), 3), 8: partial(_mix, 64, (1, 8), 7)}
_small_1 = {4: partial(_mix, 32, (17, 19), 10), 8: partial(_mix, 64, (19, 61), 6)}
"""The functions capital and small sigma 0 and 1, by the size of a word."""


def _rounds(form: Form, cdgh: Lanes, abef: Lanes, words: Lanes, out: Lanes) -> Step:
    """Two rounds: F E B A from the lowest lane up, and H G D C; words with constants added."""
    mask = (1 << 8 * out.itemsize) - 1
    big_0, big_1 = _big_0[out.itemsize], _big_1[out.itemsize]

    def step() -> None:
        h, g, d, c = cdgh.tolist()
        f, e, b, a = abef.tolist()
        for word in words.tolist()[:2]:
            t1 = h + big_1(e) + _choose(e, f, g) + word
            t2 = big_0(a) + _majority(a, b, c)
            a, b, c, d, e, f, g, h = t1 + t2 & mask, a, b, c, d + t1 & mask, e, f, g
        out[:] = f, e, b, a

    return step


def _message_1(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    """``w[i] + sigma0(w[i + 1])``."""
    mask, sigma = (1 << 8 * out.itemsize) - 1, _small_0[out.itemsize]

    def step() -> None:
        words = a.tolist()
        out[:] = [
            w + sigma(following) & mask
            for w, following in zip(words, [*words[1:], int(b[0])], strict=True)
        ]

    return step


def _message_2(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    """``w[i] + sigma1(w[i - 2])``, where the last two depend on the first two of the result."""
    mask, sigma = (1 << 8 * out.itemsize) - 1, _small_1[out.itemsize]

    def step() -> None:
        x0, x1, x2, x3 = a.tolist()
        w0 = x0 + sigma(int(b[2])) & mask
        w1 = x1 + sigma(int(b[3])) & mask
        out[:] = w0, w1, x2 + sigma(w0) & mask, x3 + sigma(w1) & mask

    return step


SCHEDULES: list[Operation] = [
    planned("sha256rnds2", "u4,u4,u4->u4", _rounds, Extent.WHOLE),
    planned("sha256msg1", "u4,u4->u4", _message_1, Extent.WHOLE),
    planned("sha256msg2", "u4,u4->u4", _message_2, Extent.WHOLE),
    planned("vsha512rnds2", "u8,u8,u8->u8", _rounds, Extent.WHOLE),
    planned("vsha512msg1", "u8,u8->u8", _message_1, Extent.WHOLE),
    planned("vsha512msg2", "u8,u8->u8", _message_2, Extent.WHOLE),
]
