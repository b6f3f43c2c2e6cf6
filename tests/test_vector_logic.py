"""Bitwise logic on vectors."""

from __future__ import annotations

from handlers import logic
from tests.differential import sweep
from tests.vector_forms import execute, forms_of_handlers, handlers_of, small_cpu

HANDLERS = handlers_of(logic)


def test_all_forms_do_what_the_host_cpu_does() -> None:
    sweep(HANDLERS, forms=forms_of_handlers(HANDLERS), cases=3)


def test_and_not_inverts_the_first_source() -> None:
    cpu = small_cpu(v2=b"\x0f" * 32, v3=b"\x3c" * 32)
    execute(HANDLERS, cpu, "c5eddfcb")  # vpandn ymm1, ymm2, ymm3
    assert cpu.vec.read(1) == b"\x30" * 32 + bytes(32)
    execute(HANDLERS, cpu, "c5eddfd2")  # vpandn ymm2, ymm2, ymm2
    assert cpu.vec.read(2) == bytes(64)
