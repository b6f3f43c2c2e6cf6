"""AES rounds and carry-less multiplication. FIPS 197; SDM Vol. 2: AES* PCLMULQDQ, and VAES."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from handlers.operands import Form, Step
from handlers.vector import Extent, Plan, operation, planned


def _double(a: int) -> int:
    """Product by x in GF(2^8) with AES's polynomial 11Bh."""
    return a << 1 ^ (0x11B if a & 0x80 else 0)


def _times(a: int, factor: int) -> int:
    product = 0
    while factor:
        product ^= a if factor & 1 else 0
        a, factor = _double(a), factor >> 1
    return product


def _make_sbox() -> bytes:
    """The inverse in GF(2^8), then an affine transformation (FIPS 197, 5.1.1)."""
    powers = [1]  # of the generator 3
    while len(powers) < 255:
        powers.append(powers[-1] ^ _double(powers[-1]))
    box = bytearray(256)
    box[0] = 0x63
    for exponent, value in enumerate(powers):
        inverse = powers[-exponent % 255]
        spread = 0
        for count in range(5):
            spread ^= inverse << count | inverse >> 8 - count
        box[value] = spread & 0xFF ^ 0x63
    return bytes(box)


_SBOX = _make_sbox()
_INVERSE_SBOX = bytes(_SBOX.index(value) for value in range(256))
_IDENTITY = bytes(range(256))

_SHIFT_ROWS = [(i + 4 * (i % 4)) % 16 for i in range(16)]
_INVERSE_SHIFT_ROWS = [(i - 4 * (i % 4)) % 16 for i in range(16)]
_IN_PLACE = list(range(16))

_MIX = (2, 1, 1, 3)
_INVERSE_MIX = (14, 9, 13, 11)
_NO_MIX = (1, 0, 0, 0)
"""First column of the matrix that multiplies each column of the state (FIPS 197, 5.1.3)."""


_PADDING = bytes(256)


@lru_cache(maxsize=16)
def _products(box: bytes, coefficient: int) -> bytes:
    return bytes(_times(value, coefficient) for value in box)


def _bind_mixing(
    box: bytes, column: tuple[int, ...], order: list[int], size: int
) -> Callable[[memoryview], int]:
    """A function from ``size`` bytes of state to the state substituted, shifted and mixed.

    ``bytes.translate`` does the two steps of each term for all bytes at once: it moves the bytes
    that a coefficient of the matrix meets into place, the state being the table, and then gives the
    products with that coefficient.
    """
    terms = []
    for k, coefficient in enumerate(column):
        if coefficient:
            products = _products(box, coefficient)
            moved = [order[i - i % 4 + (i - k) % 4] for i in range(16)]
            terms.append((bytes(at + i for at in range(0, size, 16) for i in moved), products))
    padding = _PADDING[size:]

    def mixed(state: memoryview) -> int:
        table, total = bytes(state) + padding, 0
        for places, products in terms:
            total ^= int.from_bytes(places.translate(table).translate(products), "little")
        return total

    return mixed


def _round(box: bytes, column: tuple[int, ...], order: list[int]) -> Plan:
    def plan(form: Form, state: memoryview, key: memoryview, out: memoryview) -> Step:
        size = len(out)
        mixed = _bind_mixing(box, column, order, size)

        def step() -> None:
            out[:] = (mixed(state) ^ int.from_bytes(key, "little")).to_bytes(size, "little")

        return step

    return plan


ROUNDS = [
    planned(name, "b,b->b", _round(box, column, order), Extent.WHOLE)
    for name, box, column, order in (
        ("aesenc", _SBOX, _MIX, _SHIFT_ROWS),
        ("aesenclast", _SBOX, _NO_MIX, _SHIFT_ROWS),
        ("aesdec", _INVERSE_SBOX, _INVERSE_MIX, _INVERSE_SHIFT_ROWS),
        ("aesdeclast", _INVERSE_SBOX, _NO_MIX, _INVERSE_SHIFT_ROWS),
    )
]


@operation("aesimc", "b->b", Extent.WHOLE)
def inverse_mix_columns(form: Form, state: memoryview, out: memoryview) -> Step:
    mixed = _bind_mixing(_IDENTITY, _INVERSE_MIX, _IN_PLACE, 16)

    def step() -> None:
        out[:] = mixed(state).to_bytes(16, "little")

    return step


@operation("aeskeygenassist", "b->b", Extent.WHOLE)
def key_generation_assist(form: Form, source: memoryview, out: memoryview) -> Step:
    """SubWord of words 1 and 3, each also rotated with the immediate added."""
    constant = form.imm

    def step() -> None:
        boxed = bytes(source).translate(_SBOX)
        for at in (4, 12):
            word = boxed[at : at + 4]
            out[at - 4 : at + 4] = word + bytes((word[1] ^ constant, word[2], word[3], word[0]))

    return step


_BIT_PER_BYTE = int.from_bytes(b"\x01" * 128, "little")
_TO_DIGITS = bytes(ord("0") + (value & 1) for value in range(256))


def _spread(value: int) -> int:
    """Each bit as a byte of its own."""
    return int.from_bytes(f"{value:b}".encode(), "big") & _BIT_PER_BYTE


def carryless_product(a: int, b: int) -> int:
    """Product of polynomials over GF(2), 64 by 64 bits.

    With a byte for each bit no sum of up to 64 products carries, so that an ordinary
    multiplication counts them; the lowest bit of each count is the result.
    """
    counts = (_spread(a) * _spread(b)).to_bytes(128, "big")
    return int(counts.translate(_TO_DIGITS), 2)


@operation("pclmulqdq", "b,b->b", Extent.WHOLE)
def carryless_multiply(form: Form, a: memoryview, b: memoryview, out: memoryview) -> Step:
    """Immediate bits 0 and 4 choose the quadword of each source, in each 128-bit block."""
    first, second = form.imm & 1, form.imm >> 4 & 1
    a_lanes, b_lanes = a.cast("Q"), b.cast("Q")

    def step() -> None:
        for i in range(0, len(a_lanes), 2):
            product = carryless_product(a_lanes[i + first], b_lanes[i + second])
            out[8 * i : 8 * i + 16] = product.to_bytes(16, "little")

    return step
