"""Guest physical memory: slots, ROM, devices, what lies between them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.errors import MemoryMapError
from sandbox.memory import MmioRead, PhysicalMemory, Slot


class Counter:
    """A device that counts up, one byte at a time."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(bytes((offset + n) & 0xFF for n in range(size)), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))


@pytest.fixture
def memory() -> PhysicalMemory:
    """RAM 1000..2fff, ROM 3000..3fff, a hole, RAM 5000..5fff."""
    memory = PhysicalMemory()
    memory.add_slot(0x5000, 0x1000)
    memory.add_slot(0x1000, 0x2000)
    memory.add_slot(0x3000, 0x1000, readonly=True)
    return memory


def test_slots_are_found_by_any_of_their_addresses(memory: PhysicalMemory) -> None:
    assert [slot.base for slot in memory.slots] == [0x1000, 0x3000, 0x5000]
    for address, base in (
        (0xFFF, None), (0x1000, 0x1000), (0x2FFF, 0x1000), (0x3000, 0x3000), (0x4000, None),
        (0x4FFF, None), (0x5000, 0x5000), (0x5FFF, 0x5000), (0x6000, None),
    ):  # fmt: skip
        slot = memory.find(address)
        assert (slot.base if slot else None) == base


def test_memory_starts_zeroed_and_keeps_what_is_written(memory: PhysicalMemory) -> None:
    assert memory.read(0x1000, 0x2000) == bytes(0x2000)
    memory.write(0x2FFA, b"across")
    assert memory.read(0x2FFA, 6) == b"across"
    assert memory.find(0x2FFA) is memory.slots[0]


def test_accesses_run_over_neighbouring_slots(memory: PhysicalMemory) -> None:
    memory.load(0x2FFE, b"abcd")
    assert memory.read(0x2FFE, 4) == b"abcd"
    assert memory.slots[0].host[0x1FFE:] == b"ab"
    assert memory.slots[1].host[:2] == b"cd"


def test_a_write_to_rom_is_mmio_and_a_loader_may_write_it(memory: PhysicalMemory) -> None:
    memory.write(0x2FFE, b"1234")
    assert memory.mmio_writes == [(0x3000, b"34")]
    assert memory.read(0x2FFE, 4) == b"12\0\0"
    memory.load(0x3000, b"ROM")
    assert memory.read(0x3000, 3) == b"ROM"


def test_a_read_of_nothing_asks_and_takes_the_answer(memory: PhysicalMemory) -> None:
    with pytest.raises(MmioRead) as asked:
        memory.read(0x3FFE, 4)
    assert (asked.value.address, asked.value.size) == (0x4000, 2)
    memory.mmio_replies[0x4000, 2] = b"yz"
    assert memory.read(0x3FFE, 4) == b"\0\0yz"


def test_a_write_to_nothing_is_queued_in_order(memory: PhysicalMemory) -> None:
    memory.write(0x4FFF, b"ab")
    memory.write(0x6000, b"c")
    assert memory.mmio_writes == [(0x4FFF, b"a"), (0x6000, b"c")]
    assert memory.mmio_used
    assert memory.read(0x5000, 1) == b"b"


def test_loading_into_nothing_is_an_error_that_names_the_address(memory: PhysicalMemory) -> None:
    with pytest.raises(MemoryMapError, match="nothing is mapped at 0x4000"):
        memory.load(0x3FFF, b"ab")


def test_devices_get_offsets_and_sizes(memory: PhysicalMemory) -> None:
    device = Counter()
    memory.add_device(0x4010, 0x20, device)
    assert memory.read(0x4018, 4) == b"\x08\x09\x0a\x0b"
    memory.write(0x4012, b"\x34\x12")
    assert device.writes == [(2, 2, 0x1234)]
    with pytest.raises(MmioRead):
        memory.read(0x400F, 1)
    with pytest.raises(MmioRead):
        memory.read(0x4030, 1)


def test_a_device_that_answers_too_much_is_cut_to_size() -> None:
    class Wide(Counter):
        def read(self, offset: int, size: int) -> int:
            return -1

    memory = PhysicalMemory()
    memory.add_device(0, 8, Wide())
    assert memory.read(0, 2) == b"\xff\xff"


def test_a_removed_slot_is_gone_and_its_place_free(memory: PhysicalMemory) -> None:
    told: list[tuple[str, int]] = []
    memory.on_slot.append(lambda slot: told.append(("+", slot.base)))
    memory.on_unslot.append(lambda slot: told.append(("-", slot.base)))
    memory.write(0x5000, b"old")
    memory.remove_slot(0x5000)
    assert memory.find(0x5000) is None
    with pytest.raises(MemoryMapError, match="no memory slot starts at 0x5000"):
        memory.remove_slot(0x5000)
    memory.add_slot(0x5000, 0x2000)
    assert memory.read(0x5000, 3) == bytes(3)
    assert told == [("-", 0x5000), ("+", 0x5000)]


def test_a_huge_slot_costs_nothing_until_it_is_touched() -> None:
    memory = PhysicalMemory()
    memory.add_slot(0, 1 << 40)
    memory.write((1 << 40) - 4, b"last")
    assert memory.read((1 << 40) - 4, 4) == b"last"


def test_the_top_of_the_physical_space_can_be_used() -> None:
    memory = PhysicalMemory()
    memory.add_slot((1 << 40) - 0x1000, 0x1000)
    memory.write((1 << 40) - 4, b"last")
    assert memory.read((1 << 40) - 4, 4) == b"last"


@pytest.mark.parametrize(
    ("base", "size"),
    [
        (0x1000, 0x1000),
        (0x0, 0x1001),
        (0x0, 0x2000),
        (0x2000, 0x2000),
        (0x4800, 0x1000),
        (0x4000, 0),
    ],
)
def test_a_refused_slot_changes_nothing(memory: PhysicalMemory, base: int, size: int) -> None:
    before = list(memory.slots)
    with pytest.raises(MemoryMapError):
        memory.add_slot(base, size)
    assert memory.slots == before


def test_device_ranges_must_not_overlap_anything(memory: PhysicalMemory) -> None:
    memory.add_device(0x4100, 0x100, Counter())
    for base, size in ((0x4000, 0x101), (0x41FF, 1), (0x2FFF, 1), (0x4F00, 0x101), (0x4000, 0)):
        with pytest.raises(MemoryMapError):
            memory.add_device(base, size, Counter())
    memory.add_device(0x4200, 1, Counter())


def test_a_write_to_a_code_page_is_told(memory: PhysicalMemory) -> None:
    told: list[tuple[int, int]] = []
    memory.on_code_write = lambda address, size: told.append((address, size))
    memory.write(0x1000, b"x")
    memory.code_pages[2] = {2}
    memory.write(0x1FFF, b"x")
    memory.write(0x1FFF, b"xy")
    memory.load(0x2800, b"xyz")
    memory.write(0x3000, b"x")
    assert told == [(0x1FFF, 2), (0x2800, 3)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0xFF0, 0x6010), st.binary(min_size=1, max_size=0x1100))))
def test_memory_behaves_like_a_bytearray(writes: list[tuple[int, bytes]]) -> None:
    memory, flat = PhysicalMemory(), bytearray(0x8000)
    slots: list[Slot] = [memory.add_slot(base, 0x1000) for base in (0x1000, 0x2000, 0x4000)]
    inside = {address for slot in slots for address in range(slot.base, slot.end)}
    for address, data in writes:
        memory.write(address, data)
        for n, byte in enumerate(data):
            if address + n in inside:
                flat[address + n] = byte
    for slot in slots:
        assert memory.read(slot.base, slot.size) == flat[slot.base : slot.end]
    queued = sum(len(data) for _address, data in memory.mmio_writes)
    outside = sum(a + n not in inside for a, data in writes for n in range(len(data)))
    assert queued == outside
