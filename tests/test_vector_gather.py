"""Gathers, also those that fault half-way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from handlers import gather
from sandbox.cpu import PF_, Fault
from tests.differential import sweep
from tests.vector_forms import DATA, execute, forms_of_handlers, handlers_of, small_cpu

HANDLERS = handlers_of(gather)


def test_all_forms_do_what_the_host_cpu_does() -> None:
    sweep(HANDLERS, forms=forms_of_handlers(HANDLERS), cases=3)


END = 0x14000
"""The first address that is not mapped."""


def indices(*values: int) -> bytes:
    return np.array(values, "i4").tobytes()


def test_fault_half_way_keeps_what_is_done_and_can_be_continued() -> None:
    cpu = small_cpu(v1=bytes(32), v2=b"\xff" * 32, v3=indices(0, 4, -4, 8, END - DATA, 12, 16, 20))
    cpu.write(DATA - 4, bytes(range(28)))
    with pytest.raises(Fault) as fault:
        execute(HANDLERS, cpu, "c4e26d900c18")  # vpgatherdd ymm1, [rax + ymm3], ymm2
    assert (fault.value.vector, fault.value.address) == (PF_, END)
    assert cpu.vec.read(1, 16) == bytes((4, 5, 6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 12, 13, 14, 15))
    assert cpu.vec.read(2, 32) == bytes(16) + b"\xff" * 16
    cpu.vec.lanes(3, "i4")[4] = 0  # the guest's page fault handler made it possible
    execute(HANDLERS, cpu, "c4e26d900c18")
    assert cpu.vec.read(1)[16:] == bytes((4, 5, 6, 7, *range(16, 28))) + bytes(32)
    assert cpu.vec.read(2) == bytes(64)


def test_masked_out_elements_are_kept_and_not_read() -> None:
    mask = bytes(4) + b"\0\0\0\x80" + bytes(24)
    cpu = small_cpu(v1=b"k" * 32, v2=mask, v3=indices(END, 0, END, END, END, END, END, END))
    cpu.write(DATA, b"read")
    execute(HANDLERS, cpu, "c4e26d900c18")
    assert cpu.vec.read(1) == b"kkkkread" + b"k" * 24 + bytes(32)


def test_quadword_indices_of_dwords_fill_half_the_destination() -> None:
    cpu = small_cpu(v1=b"k" * 32, v2=b"\xff" * 32, v3=bytes(32))
    cpu.write(DATA, b"read")
    execute(HANDLERS, cpu, "c4e269910c18")  # vpgatherqd xmm1, [rax + xmm3], xmm2
    assert cpu.vec.read(1) == b"readread" + bytes(56)
    assert cpu.vec.read(2) == bytes(64)


def test_32_bit_addresses_wrap() -> None:
    cpu = small_cpu(v1=bytes(32), v2=b"\xff" * 32, v3=indices(*[0x7FFFFFFF - 2] * 8))
    cpu.gpr[0] = 0x80000000 + DATA + 3 - 0x100000000 & 0xFFFFFFFF
    cpu.write(DATA, b"read")
    execute(HANDLERS, cpu, "67c4e26d900c18")  # vpgatherdd ymm1, [eax + ymm3], ymm2
    assert cpu.vec.read(1) == b"read" * 8 + bytes(32)


def test_32_bit_code_adds_the_segment_base() -> None:
    cpu = small_cpu(32, v1=bytes(32), v2=b"\xff" * 32, v3=indices(*range(0, 32, 4)))
    bank = cpu.registers.bank
    bank.write_segment("ds", replace(bank.read_segment("ds"), base=0xFFFF_F000))
    cpu.gpr[0] = DATA + 0x1000
    cpu.write(DATA, bytes(range(32)))
    execute(HANDLERS, cpu, "c4e26d900418")  # vpgatherdd ymm0, [eax + ymm3], ymm2
    assert cpu.vec.read(0) == bytes(range(32)) + bytes(32)
