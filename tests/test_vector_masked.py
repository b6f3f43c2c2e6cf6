"""Moves under a vector mask."""

from __future__ import annotations

from dataclasses import replace

import pytest

from handlers import masked
from sandbox.cpu import PF_, Fault
from tests.differential import sweep
from tests.vector_forms import DATA, execute, forms_of_handlers, handlers_of, small_cpu

HANDLERS = handlers_of(masked)


def test_all_forms_do_what_the_host_cpu_does() -> None:
    sweep(HANDLERS, forms=forms_of_handlers(HANDLERS), cases=3)


END = 0x14000
"""The first address that is not mapped."""


def test_load_does_not_touch_masked_out_elements() -> None:
    cpu = small_cpu(v2=b"\xff" * 8 + bytes(24))
    cpu.gpr[0] = END - 8
    cpu.write(END - 8, b"12345678")
    execute(HANDLERS, cpu, "c4e26d8c08")  # vpmaskmovd ymm1, ymm2, [rax]
    assert cpu.vec.read(1) == b"12345678" + bytes(56)
    cpu.vec.write(2, b"\xff" * 12 + bytes(20))
    with pytest.raises(Fault) as fault:
        execute(HANDLERS, cpu, "c4e26d8c08")
    assert (fault.value.vector, fault.value.address) == (PF_, END)
    assert cpu.vec.read(1) == b"12345678" + bytes(56)


def test_empty_mask_makes_any_address_harmless() -> None:
    cpu = small_cpu(v2=bytes(32), v1=b"\xff" * 32)
    cpu.gpr[0] = 0x8000_0000_0000_0000
    execute(HANDLERS, cpu, "c4e26d8e08")  # vpmaskmovd [rax], ymm2, ymm1
    execute(HANDLERS, cpu, "c4e26d8c08")  # vpmaskmovd ymm1, ymm2, [rax]
    assert cpu.vec.read(1) == bytes(64)


def test_store_that_faults_writes_nothing() -> None:
    cpu = small_cpu(v2=b"\xff\xff\xff\xff\0\0\0\0" * 4, v1=b"x" * 32)
    cpu.gpr[0] = END - 12
    with pytest.raises(Fault) as fault:
        execute(HANDLERS, cpu, "c4e26d8e08")  # vpmaskmovd [rax], ymm2, ymm1
    assert (fault.value.vector, fault.value.address) == (PF_, END + 4)
    assert cpu.read(END - 12, 12) == bytes(12)
    cpu.gpr[0] = DATA
    execute(HANDLERS, cpu, "c4e26d8e08")
    assert cpu.read(DATA, 32) == b"xxxx\0\0\0\0" * 4


def test_byte_mask_goes_to_rdi() -> None:
    cpu = small_cpu(v1=bytes(range(16)), v2=b"\x80\x7f" * 8)
    cpu.gpr[7] = DATA + 3
    execute(HANDLERS, cpu, "c5f9f7ca")  # vmaskmovdqu xmm1, xmm2
    assert cpu.read(DATA + 3, 16) == bytes(i * (i % 2 == 0) for i in range(16))


def test_byte_mask_in_32_bit_code_adds_the_overriding_segment() -> None:
    cpu = small_cpu(32, v1=bytes(range(16)), v2=b"\x80" * 16)
    bank = cpu.registers.bank
    bank.write_segment("es", replace(bank.read_segment("es"), base=0x100))
    cpu.gpr[7] = 0xDEAD_0000_0000_0000 | DATA - 0x100
    execute(HANDLERS, cpu, "26660ff7ca")  # maskmovdqu xmm1, xmm2 with ES:
    assert cpu.read(DATA, 16) == bytes(range(16))
    bank.write_segment("ds", replace(bank.read_segment("ds"), base=0x200))
    cpu.gpr[7] = DATA
    execute(HANDLERS, cpu, "660ff7ca")
    assert cpu.read(DATA + 0x200, 16) == bytes(range(16))
