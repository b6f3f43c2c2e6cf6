"""Vector moves and register zeroing."""

from __future__ import annotations

import pytest

from handlers import move
from sandbox.cpu import GP, Fault
from tests.differential import sweep
from tests.vector_forms import DATA, execute, forms_of_handlers, handlers_of, small_cpu

HANDLERS = handlers_of(move)


def test_all_forms_do_what_the_host_cpu_does() -> None:
    sweep(HANDLERS, forms=forms_of_handlers(HANDLERS), cases=3)


@pytest.mark.parametrize("code", ["c5fc2808", "c5fd6f08", "c5fc2908", "c5fde708", "c4e27d2a08"])
def test_aligned_moves_fault_before_anything_is_touched(code: str) -> None:
    cpu = small_cpu(v1=bytes(range(64)))
    cpu.gpr[0] = DATA + 16  # aligned for SSE, not for a YMM move
    with pytest.raises(Fault) as fault:
        execute(HANDLERS, cpu, code)
    assert (fault.value.vector, fault.value.error_code) == (GP, 0)
    assert cpu.vec.read(1) == bytes(range(64))
    assert cpu.read(DATA, 64) == bytes(64)


def test_scalar_load_zeroes_and_register_move_merges() -> None:
    cpu = small_cpu(v1=bytes(range(64)), v2=bytes(range(100, 116)))
    cpu.write(DATA, b"\x11\x22\x33\x44")
    execute(HANDLERS, cpu, "c5fa1018")  # vmovss xmm3, [rax]
    assert cpu.vec.read(3) == b"\x11\x22\x33\x44" + bytes(60)
    execute(HANDLERS, cpu, "c5f210da")  # vmovss xmm3, xmm1, xmm2
    assert cpu.vec.read(3) == bytes((100, 101, 102, 103, *range(4, 16))) + bytes(48)
    execute(HANDLERS, cpu, "f30f10ca")  # movss xmm1, xmm2
    assert cpu.vec.read(1) == bytes((100, 101, 102, 103, *range(4, 64)))


def test_vzeroupper_leaves_registers_8_to_15_alone_in_32_bit_mode() -> None:
    cpu = small_cpu(32)
    execute(HANDLERS, cpu, "c5f877")
    assert cpu.vec.read(7) == b"\xff" * 16 + bytes(48)
    assert cpu.vec.read(8) == b"\xff" * 64
    execute(HANDLERS, cpu, "c5fc77")
    assert cpu.vec.read(7) == bytes(64)
    assert cpu.vec.read(8) == b"\xff" * 64


def test_movsd_string_form_is_not_taken() -> None:
    with pytest.raises(LookupError):
        execute(HANDLERS, small_cpu(), "a5")
