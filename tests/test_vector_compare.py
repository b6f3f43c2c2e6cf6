"""Integer comparisons, bit tests and sign masks."""

from __future__ import annotations

import pytest

from handlers import compare
from sandbox.registers import CF, ZF
from tests.differential import sweep
from tests.vector_forms import execute, forms_of_handlers, handlers_of, small_cpu

HANDLERS = handlers_of(compare)


def test_all_forms_do_what_the_host_cpu_does() -> None:
    sweep(HANDLERS, forms=forms_of_handlers(HANDLERS), cases=3)


@pytest.mark.parametrize(
    ("a", "b", "flags"),
    [
        (b"\x0f" * 32, b"\xf0" * 32, ZF),
        (b"\xff" * 32, b"\xf0" * 32, CF),
        (bytes(32), bytes(32), ZF | CF),
        (b"\x0f" * 32, b"\xff" * 32, 0),
        (bytes(31) + b"\x80", b"\xff" * 32, 0),
    ],
)
def test_ptest_sets_zf_and_cf_and_clears_the_rest(a: bytes, b: bytes, flags: int) -> None:
    cpu = small_cpu(v1=a, v3=b)
    cpu.rflags = 0x8D7
    execute(HANDLERS, cpu, "c4e27d17cb")  # vptest ymm1, ymm3
    assert cpu.rflags == 2 | flags


def test_vtestps_looks_at_sign_bits_only() -> None:
    cpu = small_cpu(v1=b"\xff\xff\xff\x7f" * 8, v3=b"\xff" * 32)
    execute(HANDLERS, cpu, "c4e27d0ecb")  # vtestps ymm1, ymm3
    assert cpu.rflags & (ZF | CF) == ZF


def test_sign_masks_are_zero_extended() -> None:
    cpu = small_cpu(v3=b"\x80" + bytes(30) + b"\x80")
    cpu.gpr[1] = (1 << 64) - 1
    execute(HANDLERS, cpu, "c5fdd7cb")  # vpmovmskb ecx, ymm3
    assert cpu.gpr[1] == 0x80000001
    execute(HANDLERS, cpu, "c5fc50cb")  # vmovmskps ecx, ymm3
    assert cpu.gpr[1] == 0x80


def test_quadword_compare_is_signed() -> None:
    cpu = small_cpu(v2=b"\x01" + bytes(7) + b"\xff" * 8, v3=b"\xff" * 8 + b"\x01" + bytes(7))
    execute(HANDLERS, cpu, "c4e26937cb")  # vpcmpgtq xmm1, xmm2, xmm3
    assert cpu.vec.read(1) == b"\xff" * 8 + bytes(56)
