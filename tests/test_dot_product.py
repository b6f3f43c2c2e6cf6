"""Integer dot products against the host, and lane by lane against the manual's words."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from handlers import dot_product
from sandbox.encodings import encode, forms_of, kinds_of
from tests.differential import sweep
from tests.vector_forms import execute, forms_of_handlers, handlers_of, is_vector_form, small_cpu

HANDLERS = handlers_of(dot_product)
CORNERS = {1: (0, 1, 0x7F, 0x80, 0xFF), 2: (0, 1, 0x7FFF, 0x8000, 0xFFFF)}


def test_all_forms_do_what_the_host_cpu_does() -> None:
    sweep(HANDLERS, forms=forms_of_handlers(HANDLERS), cases=6)


def integers(data: bytes, size: int, *, signed: bool) -> Iterator[int]:
    for at in range(0, len(data), size):
        yield int.from_bytes(data[at : at + size], "little", signed=signed)


def expected(mnemonic: str, total: bytes, a: bytes, b: bytes) -> bytes:
    """What SDM Vol. 2 says of ``vpdp<b|w><sign><sign>d[s]``."""
    size = 1 if mnemonic[4] == "b" else 2
    signed_a, signed_b = mnemonic[5] == "s", mnemonic[6] == "s"
    signed = signed_a or signed_b
    low, high = (-(1 << 31), (1 << 31) - 1) if signed else (0, (1 << 32) - 1)
    result = b""
    for at in range(0, len(total), 4):
        part = slice(at, at + 4)
        factors = zip(
            integers(a[part], size, signed=signed_a),
            integers(b[part], size, signed=signed_b),
            strict=True,
        )
        value = int.from_bytes(total[part], "little", signed=signed) + sum(
            x * y for x, y in factors
        )
        if mnemonic.endswith("ds"):
            value = max(low, min(high, value))
        result += (value & 0xFFFFFFFF).to_bytes(4, "little")
    return result


def operands(source: random.Random, size: int) -> bytes:
    """Lanes of ``size`` bytes, half of them corners."""
    lanes = [
        source.choice(CORNERS[size]) if source.random() < 0.6 else source.randrange(1 << 8 * size)
        for _ in range(32 // size)
    ]
    return b"".join(lane.to_bytes(size, "little") for lane in lanes)


NAMES = [name for h in dot_product.DOT_PRODUCTS for name in h.mnemonics]


@pytest.mark.parametrize("mnemonic", NAMES)
def test_every_sum_is_the_manuals(mnemonic: str) -> None:
    source = random.Random(mnemonic)
    for code in forms_of(mnemonic):
        if not is_vector_form(code):
            continue
        width = 32 if kinds_of(code)[0].startswith("YMM") else 16
        raw = encode(code, (1, 2, 3))
        for _ in range(40):
            size = 1 if mnemonic[4] == "b" else 2
            total, a, b = operands(source, 2), operands(source, size), operands(source, size)
            cpu = small_cpu(v1=total, v2=a, v3=b)
            execute(HANDLERS, cpu, raw.hex())
            want = expected(mnemonic, total[:width], a[:width], b[:width])
            assert cpu.vec.read(1) == want + bytes(64 - width)


@pytest.mark.parametrize(("name", "shift"), [("vpmadd52luq", 0), ("vpmadd52huq", 52)])
def test_52_bit_products(name: str, shift: int) -> None:
    source = random.Random(shift)
    low = (1 << 52) - 1
    for code in forms_of(name):
        if not is_vector_form(code):
            continue
        count = 4 if kinds_of(code)[0].startswith("YMM") else 2
        for _ in range(40):
            rows = [[source.choice((0, low, 1 << 63, source.getrandbits(64))) for _ in range(4)]
                    for _ in range(3)]  # fmt: skip
            total, a, b = (b"".join(x.to_bytes(8, "little") for x in row) for row in rows)
            cpu = small_cpu(v1=total, v2=a, v3=b)
            execute(HANDLERS, cpu, encode(code, (1, 2, 3)).hex())
            got = list(integers(cpu.vec.read(1), 8, signed=False))
            want = [(t + (((x % 2**52) * (y % 2**52) >> shift) % 2**52)) % 2**64
                    for t, x, y in zip(*rows, strict=True)]  # fmt: skip
            assert got == want[:count] + [0] * (8 - count)
