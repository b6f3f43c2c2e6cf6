"""Forms of the pack amd: operands for them, and what they make of them."""

from __future__ import annotations

import random
from collections.abc import Iterator

from handlers.amd import PACK
from sandbox.encodings import encode, form
from tests.vector_forms import execute, small_cpu

HANDLERS = PACK.handlers


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
