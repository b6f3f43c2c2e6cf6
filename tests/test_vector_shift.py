"""Shifts of vector lanes."""

from __future__ import annotations

import pytest

from handlers import shift
from tests.differential import sweep
from tests.vector_forms import execute, forms_of_handlers, handlers_of, small_cpu

HANDLERS = handlers_of(shift)


def test_all_forms_do_what_the_host_cpu_does() -> None:
    sweep(HANDLERS, forms=forms_of_handlers(HANDLERS), cases=3)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 255, 1 << 16, 1 << 32, (1 << 64) - 1])
def test_count_in_a_register_has_64_bits(count: int) -> None:
    cpu = small_cpu(v2=b"\x01\x80" * 16, v3=count.to_bytes(8, "little"))
    execute(HANDLERS, cpu, "c5ede1cb")  # vpsraw ymm1, ymm2, xmm3
    want = (-0x7FFF >> min(count, 15)) & 0xFFFF
    assert cpu.vec.read(1) == want.to_bytes(2, "little") * 16 + bytes(32)
    execute(HANDLERS, cpu, "c5edf1cb")  # vpsllw ymm1, ymm2, xmm3
    want = (0x8001 << min(count, 16)) & 0xFFFF
    assert cpu.vec.read(1) == want.to_bytes(2, "little") * 16 + bytes(32)


@pytest.mark.parametrize("imm", [0, 1, 31, 32, 33, 255])
def test_immediate_count(imm: int) -> None:
    cpu = small_cpu(v3=b"\x01\x00\x00\x80" * 8)
    execute(HANDLERS, cpu, f"c5f572d3{imm:02x}")  # vpsrld ymm1, ymm3, imm
    assert cpu.vec.read(1) == (0x80000001 >> imm).to_bytes(4, "little") * 8 + bytes(32)


def test_count_of_each_lane_is_unsigned() -> None:
    lanes = [0x80000000, 0x80000000, 0x80000000, 4]
    counts = [31, 32, 0xFFFFFFFF, 1]
    cpu = small_cpu(
        v2=b"".join(v.to_bytes(4, "little") for v in lanes),
        v3=b"".join(v.to_bytes(4, "little") for v in counts),
    )
    execute(HANDLERS, cpu, "c4e26946cb")  # vpsravd xmm1, xmm2, xmm3
    assert cpu.vec.read(1) == b"\xff" * 12 + b"\x02" + bytes(51)
