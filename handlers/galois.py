"""GFNI: arithmetic in GF(2^8) with AES's polynomial, and affine maps over GF(2).

SDM Vol. 2: GF2P8MULB, GF2P8AFFINEQB, GF2P8AFFINEINVQB.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from handlers.operands import Form, Lanes, Step
from handlers.vector import Extent, Plan, operation, planned


def _logarithms() -> tuple[list[int], list[int]]:
    """Powers of the generator 3, and the exponent of each byte but 0."""
    powers, logarithms, value = [], [0] * 256, 1
    for exponent in range(255):
        powers.append(value)
        logarithms[value] = exponent
        value ^= value << 1 ^ (0x11B if value & 0x80 else 0)
    return powers, logarithms


_POWERS, _LOGARITHMS = _logarithms()
INVERSE = bytes(_POWERS[-_LOGARITHMS[x] % 255] if x else 0 for x in range(256))
"""The multiplicative inverse of each byte; 0 for 0."""


@lru_cache(maxsize=1)
def _products() -> Lanes:
    """All products, that of a and b at 256 * a + b."""
    table = np.zeros((256, 256), "u1")
    logarithms = np.array(_LOGARITHMS[1:])
    table[1:, 1:] = np.array(_POWERS, "u1")[(logarithms[:, None] + logarithms) % 255]
    return table.reshape(-1)


@operation("gf2p8mulb", "u1,u1->u1", Extent.WHOLE)
def multiply(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    table, at = _products(), np.zeros(len(out), "i8")
    at_bytes = at.view("u1")
    low, high = at_bytes[::8], at_bytes[1::8]

    def step() -> None:
        high[...] = a
        low[...] = b
        table.take(at, None, out, "clip")

    return step


@lru_cache(maxsize=4096)
def affine_map(matrix: bytes, constant: int) -> bytes:
    """``matrix * x + constant`` of all bytes x; row i of the matrix is its byte 7 - i."""
    images = [constant]
    for column in range(8):
        image = sum((matrix[7 - row] >> column & 1) << row for row in range(8))
        images += [value ^ image for value in images]
    return bytes(images)


def _affine(first: bytes | None) -> Plan:
    """Bytes mapped by the matrix in their quadword of the second source, after ``first``."""

    def plan(form: Form, a: memoryview, b: memoryview, out: memoryview) -> Step:
        constant = form.imm
        quadwords = [slice(i, i + 8) for i in range(0, len(out), 8)]

        def step() -> None:
            data = bytes(a) if first is None else bytes(a).translate(first)
            matrices = bytes(b)
            for part in quadwords:
                out[part] = data[part].translate(affine_map(matrices[part], constant))

        return step

    return plan


AFFINE = [
    planned("gf2p8affineqb", "b,b->b", _affine(None), Extent.WHOLE),
    planned("gf2p8affineinvqb", "b,b->b", _affine(INVERSE), Extent.WHOLE),
]
