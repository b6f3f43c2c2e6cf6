"""Shuffles, blends, broadcasts, inserts and extracts."""

from __future__ import annotations

import pytest

from handlers import shuffle
from tests.differential import sweep
from tests.vector_forms import DATA, execute, forms_of_handlers, handlers_of, small_cpu

HANDLERS = handlers_of(shuffle)


def test_all_forms_do_what_the_host_cpu_does() -> None:
    sweep(HANDLERS, forms=forms_of_handlers(HANDLERS), cases=3)


A, B = bytes(range(32)), bytes(range(64, 96))


def dwords(*numbers: int) -> bytes:
    """Lanes of four bytes of A (0 to 7) and B (8 to 15)."""
    return b"".join((A + B)[4 * n : 4 * n + 4] for n in numbers)


@pytest.mark.parametrize(
    ("code", "want"),
    [
        ("c5fd70cb1b", dwords(11, 10, 9, 8, 15, 14, 13, 12)),  # vpshufd ymm1, ymm3, 1Bh
        ("c5ecc6cb1b", dwords(3, 2, 9, 8, 7, 6, 13, 12)),  # vshufps ymm1, ymm2, ymm3
        ("c5ed62cb", dwords(0, 8, 1, 9, 4, 12, 5, 13)),  # vpunpckldq
        ("c5ed6dcb", dwords(2, 3, 10, 11, 6, 7, 14, 15)),  # vpunpckhqdq
        ("c4e36d0fcb04", dwords(9, 10, 11, 0, 13, 14, 15, 4)),  # vpalignr
        ("c4e36d02cb81", dwords(8, 1, 2, 3, 4, 5, 6, 15)),  # vpblendd
        ("c4e3fd00cb1b", dwords(14, 15, 12, 13, 10, 11, 8, 9)),  # vpermq
        ("c4e36d46cb13", dwords(12, 13, 14, 15, 4, 5, 6, 7)),  # vperm2i128
        ("c4e36d46cb82", dwords(8, 9, 10, 11) + bytes(16)),
        ("c4e36d38cb01", dwords(0, 1, 2, 3, 8, 9, 10, 11)),  # vinserti128
        ("c4e27d58cb", dwords(8, 8, 8, 8, 8, 8, 8, 8)),  # vpbroadcastd ymm1, xmm3
        ("c5f573db03", B[3:16] + bytes(3) + B[19:] + bytes(3)),  # vpsrldq ymm1, ymm3
    ],
)
def test_patterns_of_the_manual(code: str, want: bytes) -> None:
    cpu = small_cpu(v2=A, v3=B)
    execute(HANDLERS, cpu, code)
    assert cpu.vec.read(1) == want + bytes(32)


def test_destination_may_be_a_source() -> None:
    cpu = small_cpu(v2=A, v3=B)
    execute(HANDLERS, cpu, "c5ed60d3")  # vpunpcklbw ymm2, ymm2, ymm3
    mixed = [A[i // 2] if i % 2 == 0 else B[i // 2] for i in range(16)]
    assert cpu.vec.read(2, 16) == bytes(mixed)
    cpu = small_cpu(v3=bytes(reversed(range(16))) * 2)
    execute(HANDLERS, cpu, "c4e26500db")  # vpshufb ymm3, ymm3, ymm3
    assert cpu.vec.read(3, 32) == bytes(range(16)) * 2


def test_insertps_takes_any_lane_of_a_register_but_the_one_in_memory() -> None:
    cpu = small_cpu(v2=A, v3=B)
    execute(HANDLERS, cpu, "c4e36921cbd2")  # vinsertps xmm1, xmm2, xmm3, D2h: lane 3 to 1, zero 1
    assert cpu.vec.read(1) == dwords(0) + bytes(4) + dwords(2, 3) + bytes(48)
    execute(HANDLERS, cpu, "c4e36921cbd8")  # D8h: zero lane 3
    assert cpu.vec.read(1) == dwords(0, 11, 2) + bytes(52)
    cpu.write(DATA, b"\xaa\xbb\xcc\xdd")
    execute(HANDLERS, cpu, "c4e3692108d0")  # vinsertps xmm1, xmm2, [rax], D0h
    assert cpu.vec.read(1) == dwords(0) + b"\xaa\xbb\xcc\xdd" + dwords(2, 3) + bytes(48)


def test_extract_to_memory_writes_the_element_only() -> None:
    cpu = small_cpu(v1=A)
    execute(HANDLERS, cpu, "c4e379150805")  # vpextrw [rax], xmm1, 5
    assert cpu.read(DATA, 4) == A[10:12] + bytes(2)
    cpu.gpr[2] = (1 << 64) - 1
    execute(HANDLERS, cpu, "c4e37914ca0f")  # vpextrb edx, xmm1, 15
    assert cpu.gpr[2] == 15
