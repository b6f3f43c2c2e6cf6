"""Integer arithmetic on vector lanes."""

from __future__ import annotations

import numpy as np
import pytest

from handlers import arithmetic
from tests.differential import sweep
from tests.vector_forms import execute, forms_of_handlers, handlers_of, small_cpu

HANDLERS = handlers_of(arithmetic)


def test_all_forms_do_what_the_host_cpu_does() -> None:
    sweep(HANDLERS, forms=forms_of_handlers(HANDLERS), cases=3)


def words(*values: int) -> bytes:
    return b"".join((v & 0xFFFF).to_bytes(2, "little") for v in values)


@pytest.mark.parametrize(
    ("code", "a", "b", "want"),
    [
        # each: the two 16-byte sources and the result, from the manual's definition
        ("c5e9eccb", b"\x7f\x80" * 8, b"\x01\xff" * 8, b"\x7f\x80" * 8),  # vpaddsb
        ("c5e9dccb", b"\xff\x80" * 8, b"\x01\x7f" * 8, b"\xff\xff" * 8),  # vpaddusb
        ("c5e9d8cb", b"\x00\x80" * 8, b"\x01\x7f" * 8, b"\x00\x01" * 8),  # vpsubusb
        ("c5e9f5cb", words(*[-32768] * 8), words(*[-32768] * 8), b"\0\0\0\x80" * 4),  # vpmaddwd
        ("c4e26904cb", b"\xff" * 16, b"\x80" * 16, words(*[-32768] * 8)),  # vpmaddubsw
        ("c4e2690bcb", words(*[-32768] * 8), words(*[-32768] * 8), words(*[-32768] * 8)),
        ("c5e9e0cb", b"\x00\xff" * 8, b"\x01\xff" * 8, b"\x01\xff" * 8),  # vpavgb
        ("c5e9f6cb", bytes(range(16)), bytes(16), (28).to_bytes(8, "little")
         + (92).to_bytes(8, "little")),  # vpsadbw
        ("c4e26908cb", b"\x80\x7f" * 8, b"\xff\x00" * 8, b"\x80\x00" * 8),  # vpsignb
        ("c4e26901cb", words(1, 2, 3, 4, 5, 6, 7, 8), words(*[0x7FFF, 1] * 4),
         words(3, 7, 11, 15, *[-32768] * 4)),  # vphaddw
        ("c4e26903cb", words(1, 2, 3, 4, 5, 6, 7, 8), words(*[0x7FFF, 1] * 4),
         words(3, 7, 11, 15, *[0x7FFF] * 4)),  # vphaddsw
        ("c5e9f4cb", b"\xff" * 16, b"\xff" * 16, b"\x01\0\0\0\xfe\xff\xff\xff" * 2),  # vpmuludq
    ],
)  # fmt: skip
def test_edges_of_the_definition(code: str, a: bytes, b: bytes, want: bytes) -> None:
    cpu = small_cpu(v2=a, v3=b)
    execute(HANDLERS, cpu, code)
    assert cpu.vec.read(1) == want + bytes(48)


def test_phminposuw_takes_the_first_of_equal_minima() -> None:
    cpu = small_cpu(v3=words(9, 7, 3, 8, 3, 3, 9, 9))
    execute(HANDLERS, cpu, "c4e27941cb")  # vphminposuw xmm1, xmm3
    assert cpu.vec.read(1) == words(3, 2) + bytes(60)


@pytest.mark.parametrize("imm", range(64))
def test_mpsadbw_slides_four_bytes_in_each_block(imm: int) -> None:
    rng = np.random.default_rng(imm)
    a, b = rng.bytes(32), rng.bytes(32)
    cpu = small_cpu(v2=a, v3=b)
    execute(HANDLERS, cpu, f"c4e36d42cb{imm:02x}")  # vmpsadbw ymm1, ymm2, ymm3, imm
    want = []
    for block, control in ((0, imm & 7), (16, imm >> 3)):
        at_a, at_b = block + (control & 4), block + 4 * (control & 3)
        want += [sum(abs(a[at_a + i + j] - b[at_b + j]) for j in range(4)) for i in range(8)]
    assert cpu.vec.read(1) == words(*want) + bytes(32)
