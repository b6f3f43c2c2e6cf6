"""The local APIC as SDM Vol. 3 has it: registers, priorities, the timer, interrupts to itself."""

from __future__ import annotations

import pytest

from sandbox.platform.clock import ManualClock
from sandbox.platform.lapic import Lapic

ID, VERSION, TPR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, IRR, ESR, ICR, ICR_HIGH = 0x100, 0x200, 0x280, 0x300, 0x310
TIMER, LINT0, INITIAL, CURRENT, DIVIDE = 0x320, 0x350, 0x380, 0x390, 0x3E0
SELF = 1 << 18


@pytest.fixture
def apic() -> Lapic:
    return Lapic(ManualClock())


def clock(apic: Lapic) -> ManualClock:
    found = apic._clock
    assert isinstance(found, ManualClock)
    return found


def read(apic: Lapic, offset: int) -> int:
    return apic.read(offset, 4)


def write(apic: Lapic, offset: int, value: int) -> None:
    apic.write(offset, 4, value)


def bits(apic: Lapic, first: int) -> list[int]:
    """The vectors set in IRR or ISR."""
    return [v for v in range(256) if read(apic, first + v // 32 * 16) >> v % 32 & 1]


def test_identity_and_the_state_that_firmware_leaves(apic: Lapic) -> None:
    assert read(apic, ID) == 0
    assert read(apic, VERSION) == 0x50014, "version 14h, six local vectors"
    assert read(apic, SVR) == 0x1FF
    assert read(apic, LINT0) == 0x700
    assert apic.passes_pic


def test_only_the_defined_bits_of_whole_registers_are_written(apic: Lapic) -> None:
    write(apic, TPR, 0xFFFF_FFFF)
    assert read(apic, TPR) == 0xFF
    apic.write(TPR, 1, 0)
    apic.write(TPR + 4, 4, 0)
    assert read(apic, TPR) == 0xFF
    write(apic, VERSION, 0)
    assert read(apic, VERSION) == 0x50014
    write(apic, DFR, 0)
    assert read(apic, DFR) == 0x0FFF_FFFF
    assert apic.read(TPR, 1) == 0xFF
    assert apic.read(TPR + 1, 1) == 0
    assert apic.read(TPR + 4, 4) == 0


def test_the_highest_vector_is_served_until_its_end(apic: Lapic) -> None:
    for vector in (0x31, 0x80, 0x42):
        write(apic, ICR, SELF | vector)
    assert bits(apic, IRR) == [0x31, 0x42, 0x80]
    assert apic.pending()
    assert apic.acknowledge() == 0x80
    assert bits(apic, ISR) == [0x80]
    assert read(apic, PPR) == 0x80
    assert not apic.pending(), "0x42 is of a lower class"
    write(apic, ICR, SELF | 0x8F)
    assert not apic.pending(), "the same class waits too"
    write(apic, ICR, SELF | 0x90)
    assert apic.pending()
    assert apic.acknowledge() == 0x90
    write(apic, EOI, 0)
    write(apic, EOI, 0)
    assert bits(apic, ISR) == []
    assert [apic.acknowledge() for _ in range(3) if apic.pending()] == [0x8F]
    write(apic, EOI, 0)
    write(apic, EOI, 0)


def test_task_priority_holds_back_and_is_cr8(apic: Lapic) -> None:
    write(apic, TPR, 0x45)
    assert apic.cr8 == 4
    write(apic, ICR, SELF | 0x4F)
    assert not apic.pending()
    apic.cr8 = 4
    assert read(apic, TPR) == 0x45, "no change, so the low bits stay"
    apic.cr8 = 3
    assert read(apic, TPR) == 0x30
    assert apic.pending()


@pytest.mark.parametrize(
    ("high", "low", "arrives"),
    [
        (0, 0x51, True),
        (1 << 24, 0x51, False),
        (0xFF << 24, 0x51, True),
        (1 << 24, SELF | 0x51, True),
        (0, 2 << 18 | 0x51, True),
        (0, 3 << 18 | 0x51, False),
        (0, 0x151, True),
        (2 << 24, 0x851, True),
        (5 << 24, 0x851, False),
        (0, SELF | 0x451, False),
        (0, 3 << 18 | 0x4500, False),
        (0, 3 << 18 | 0x4608, False),
    ],
    ids=[
        "own id", "another id", "broadcast", "self", "all", "all but self", "lowest priority",
        "logical", "another logical", "NMI", "INIT to others", "SIPI to others",
    ],
)  # fmt: skip
def test_who_gets_an_ipi(apic: Lapic, high: int, low: int, arrives: bool) -> None:
    write(apic, LDR, 2 << 24)
    write(apic, ICR_HIGH, high)
    write(apic, ICR, low)
    assert bits(apic, IRR) == ([0x51] if arrives else [])
    assert not read(apic, ICR) & 1 << 12, "sent"


def test_logical_destinations_of_the_cluster_model(apic: Lapic) -> None:
    write(apic, DFR, 0)
    write(apic, LDR, 0x32 << 24)
    for high, arrives in ((0x32, True), (0x31, False), (0x42, False), (0xF2, True)):
        write(apic, ICR_HIGH, high << 24)
        write(apic, ICR, 0x851)
        assert apic.pending() is arrives, hex(high)
        if arrives:
            apic.acknowledge()
            write(apic, EOI, 0)


def test_illegal_vectors_are_an_error(apic: Lapic) -> None:
    write(apic, ICR, SELF | 0x0F)
    assert not apic.pending()
    assert read(apic, ESR) == 0
    write(apic, ESR, 0)
    assert read(apic, ESR) == 0x20
    write(apic, ESR, 0)
    assert read(apic, ESR) == 0


@pytest.mark.parametrize(
    ("code", "divisor"), [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)]
)
def test_timer_counts_down_by_its_divisor(apic: Lapic, code: int, divisor: int) -> None:
    write(apic, DIVIDE, code)
    write(apic, TIMER, 0x40)
    write(apic, INITIAL, 1000)
    clock(apic).time = 400 * divisor
    assert read(apic, CURRENT) == 600
    clock(apic).time = 1000 * divisor - 1
    apic.update()
    assert not apic.pending()
    clock(apic).time += 1
    apic.update()
    assert apic.acknowledge() == 0x40
    assert read(apic, CURRENT) == 0
    assert apic.deadline() is None
    clock(apic).time *= 3
    apic.update()
    assert bits(apic, IRR) == []


def test_periodic_timer_starts_again(apic: Lapic) -> None:
    write(apic, DIVIDE, 11)
    write(apic, TIMER, 0x2_0040)
    write(apic, INITIAL, 1000)
    assert apic.deadline() == 1000
    clock(apic).time = 3250
    apic.update()
    assert apic.acknowledge() == 0x40
    assert not bits(apic, IRR), "missed periods are one interrupt"
    assert (read(apic, CURRENT), apic.deadline()) == (750, 4000)
    write(apic, INITIAL, 0)
    assert apic.deadline() is None


def test_masked_timer_counts_in_silence(apic: Lapic) -> None:
    write(apic, DIVIDE, 11)
    write(apic, TIMER, 0x1_0040)
    write(apic, INITIAL, 1000)
    assert apic.deadline() is None
    assert read(apic, CURRENT) == 1000
    clock(apic).time = 1000
    apic.update()
    assert not apic.pending()


def test_a_new_divisor_applies_to_what_is_left(apic: Lapic) -> None:
    write(apic, DIVIDE, 11)
    write(apic, INITIAL, 1000)
    clock(apic).time = 400
    write(apic, DIVIDE, 0)
    assert read(apic, CURRENT) == 600
    clock(apic).time = 800
    assert read(apic, CURRENT) == 400


def test_disabled_by_software_it_masks_and_takes_nothing(apic: Lapic) -> None:
    write(apic, TIMER, 0x40)
    write(apic, SVR, 0xFF)
    assert read(apic, TIMER) == 0x1_0040
    assert not apic.passes_pic
    write(apic, LINT0, 0x700)
    assert read(apic, LINT0) == 0x1_0700, "masks stay set"
    write(apic, ICR, SELF | 0x51)
    assert bits(apic, IRR) == []
