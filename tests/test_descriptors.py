"""Descriptors against values written out by hand from SDM Vol. 3, figures 3-8, 5-8, 6-2 and 6-8."""

from __future__ import annotations

import pytest

from sandbox.cpu import GP, TS, Fault
from sandbox.descriptors import (
    Gate,
    descriptor_address,
    is_conforming,
    is_null,
    is_writable_data,
    load_descriptor,
    parse_gate,
    parse_segment,
    serialise_gate,
    serialise_segment,
    touch,
    within_limit,
)
from sandbox.registers import DescriptorTable, Segment
from tests.doubles import DictBank, FlatMemory


def q(value: int) -> bytes:
    return value.to_bytes(8, "little")


FLAT_CODE32 = Segment(8, 0, 0xFFFF_FFFF, type=0xA, s=1, dpl=0, present=1, db=1, g=1)
FLAT_CODE64 = Segment(8, 0, 0xFFFF_FFFF, type=0xB, s=1, dpl=3, present=1, l=1, g=1)
SMALL_DATA = Segment(8, 0x1234_5678, 0xBCDEF, type=2, s=1, dpl=1, present=1, avl=1)
SEGMENTS = [
    (0x00CF9A000000FFFF, FLAT_CODE32),
    (0x00AFFB000000FFFF, FLAT_CODE64),
    (0x121BB2345678CDEF, SMALL_DATA),
    (0, Segment(8, 0, 0, type=0, s=0, present=0)),
]


@pytest.mark.parametrize(("raw", "segment"), SEGMENTS)
def test_segment_descriptors_parse_and_serialise(raw: int, segment: Segment) -> None:
    assert parse_segment(q(raw), 8) == segment
    assert serialise_segment(segment) == q(raw)


def test_long_mode_tss_descriptor_has_a_64_bit_base() -> None:
    raw = q(0x9900_8B88_7766_0067) + q(0xFFFF_8000)
    tss = parse_segment(raw, 0x40)
    assert (tss.base, tss.limit, tss.type, tss.s) == (0xFFFF_8000_9988_7766, 0x67, 11, 0)
    assert serialise_segment(tss, wide=True) == raw


def test_a_limit_beyond_20_bits_without_granularity_is_refused() -> None:
    with pytest.raises(ValueError, match="granularity"):
        serialise_segment(Segment(limit=0x10_0000))


GATES = [
    (q(0x1234_8E00_0008_5678), Gate(8, 0x1234_5678, 14)),
    (q(0x1234_EF00_001B_5678), Gate(0x1B, 0x1234_5678, 15, dpl=3)),
    (q(0x0000_8600_0008_5678), Gate(8, 0x5678, 6)),
    (q(0x1234_EC05_0008_5678), Gate(8, 0x1234_5678, 12, dpl=3, count=5)),
    (q(0x1234_0E00_0008_5678), Gate(8, 0x1234_5678, 14, present=0)),
    (q(0x1234_8E02_0008_5678) + q(0xFFFF_8000), Gate(8, 0xFFFF_8000_1234_5678, 14, ist=2)),
]


@pytest.mark.parametrize(("raw", "gate"), GATES)
def test_gates_parse_and_serialise(raw: bytes, gate: Gate) -> None:
    assert parse_gate(raw) == gate
    assert serialise_gate(gate, wide=len(raw) == 16) == raw


def test_only_the_interrupt_gates_clear_if() -> None:
    assert [t for t in range(16) if Gate(8, 0, t).interrupt] == [6, 14]


def make_bank() -> tuple[DictBank, FlatMemory]:
    bank, memory = DictBank(), FlatMemory()
    bank.write_table("gdtr", DescriptorTable(0x10000, 0x1F))
    bank.write_segment("ldtr", Segment(0x10, 0x11000, 7, type=2, s=0))
    memory.write(0x10008, q(0x00CF9A000000FFFF))
    memory.write(0x11000, q(0x00CF92000000FFFF))
    return bank, memory


def test_selectors_find_their_table() -> None:
    bank, _ = make_bank()
    assert descriptor_address(bank, 0x0B) == 0x10008
    assert descriptor_address(bank, 0x18) == 0x10018
    assert descriptor_address(bank, 0x20) is None
    assert descriptor_address(bank, 0x10, 16) == 0x10010
    assert descriptor_address(bank, 0x18, 16) is None
    assert descriptor_address(bank, 0x04) == 0x11000
    assert descriptor_address(bank, 0x0C) is None


def test_a_null_ldt_holds_no_descriptor() -> None:
    bank, _ = make_bank()
    bank.write_segment("ldtr", Segment(0, 0x11000, 7, type=2, s=0))
    assert descriptor_address(bank, 0x04) is None


def test_a_selector_beyond_its_table_faults_with_its_index() -> None:
    bank, memory = make_bank()
    with pytest.raises(Fault) as caught:
        load_descriptor(bank, memory, 0x23)
    assert (caught.value.vector, caught.value.error_code) == (GP, 0x20)
    with pytest.raises(Fault) as caught:
        load_descriptor(bank, memory, 0x0F, vector=TS, ext=1)
    assert (caught.value.vector, caught.value.error_code) == (TS, 0x0D)


def test_null_selectors() -> None:
    assert [s for s in range(12) if is_null(s)] == [0, 1, 2, 3]


def test_kinds_of_segments() -> None:
    assert is_conforming(Segment(type=0xE)) and not is_conforming(Segment(type=0xA))
    assert not is_conforming(Segment(type=0xE, s=0))
    assert [t for t in range(16) if is_writable_data(Segment(type=t))] == [2, 3, 6, 7]


def test_limits_expand_up_and_down() -> None:
    up = Segment(limit=0xFFF)
    assert within_limit(up, 0xFFC, 4) and not within_limit(up, 0xFFD, 4)
    down16, down32 = Segment(limit=0xFFF, type=6), Segment(limit=0xFFF, type=6, db=1)
    assert not within_limit(down16, 0xFFF, 1) and within_limit(down16, 0x1000, 4)
    assert within_limit(down16, 0xFFFC, 4) and not within_limit(down16, 0xFFFD, 4)
    assert within_limit(down32, 0xFFFD, 4)


def test_touch_writes_the_accessed_bit_only_when_asked() -> None:
    bank, memory = make_bank()
    pending, code = touch(bank, memory, load_descriptor(bank, memory, 8))
    assert memory.read(0x10008, 8) == q(0x00CF9A000000FFFF)
    pending()
    assert memory.read(0x10008, 8) == q(0x00CF9B000000FFFF)
    assert code.type == 0xB


def test_touch_faults_before_it_writes_if_the_table_is_read_only() -> None:
    bank, memory = make_bank()
    memory.readonly = range(0x10000, 0x10020)
    with pytest.raises(Fault):
        touch(bank, memory, load_descriptor(bank, memory, 8))
    memory.readonly = range(0)
    memory.write(0x10008, q(0x00CF9B000000FFFF))
    memory.readonly = range(0x10000, 0x10020)
    touch(bank, memory, load_descriptor(bank, memory, 8))[0]()
