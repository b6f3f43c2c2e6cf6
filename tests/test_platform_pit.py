"""The 8254: counting, reading back, the output in each mode, by a clock that the test sets."""

from __future__ import annotations

import pytest

from sandbox.platform.clock import ManualClock
from sandbox.platform.pit import PIT_HZ, Pit, Speaker

CONTROL = 3


class Machine:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.pit = Pit(self.clock)
        self.speaker = Speaker(self.pit, self.clock)

    def program(self, channel: int, mode: int, count: int) -> None:
        self.pit.write(CONTROL, 1, channel << 6 | 0x30 | mode << 1)
        self.pit.write(channel, 1, count & 0xFF)
        self.pit.write(channel, 1, count >> 8)

    def pass_ticks(self, ticks: int) -> None:
        """Until so many ticks of the counter are over since time 0."""
        self.clock.time = -(-ticks * 1_000_000_000 // PIT_HZ)

    def latched(self, channel: int) -> int:
        self.pit.write(CONTROL, 1, channel << 6)
        return self.pit.read(channel, 1) | self.pit.read(channel, 1) << 8


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.mark.parametrize(
    ("mode", "counts"),
    [
        (0, {0: 1000, 1: 999, 999: 1, 1000: 0, 1001: 0xFFFF}),
        (2, {0: 1000, 1: 999, 999: 1, 1000: 1000, 1001: 999}),
        (3, {0: 1000, 1: 998, 499: 2, 500: 1000, 501: 998}),
        (4, {0: 1000, 1000: 0}),
    ],
)
def test_counts_down(machine: Machine, mode: int, counts: dict[int, int]) -> None:
    machine.program(0, mode, 1000)
    for ticks, count in counts.items():
        machine.pass_ticks(ticks)
        assert machine.latched(0) == count, ticks


@pytest.mark.parametrize(
    ("mode", "low"),
    [(0, range(1000)), (2, (999, 1999)), (3, (*range(500, 1000), 1500, 1999)), (4, (1000,))],
)
def test_output(machine: Machine, mode: int, low: tuple[int, ...]) -> None:
    machine.program(0, mode, 1000)
    for ticks in (0, 1, 499, 500, 998, 999, 1000, 1001, 1499, 1500, 1999, 2000):
        machine.pass_ticks(ticks)
        assert machine.pit.channels[0].out == (ticks not in low), ticks


def test_a_count_of_0_is_65536(machine: Machine) -> None:
    machine.program(0, 2, 0)
    machine.pass_ticks(65535)
    assert machine.latched(0) == 1
    machine.pass_ticks(65536)
    assert machine.latched(0) == 0


def test_a_latched_count_stays_until_it_is_read(machine: Machine) -> None:
    machine.program(0, 2, 1000)
    machine.pass_ticks(10)
    machine.pit.write(CONTROL, 1, 0)
    machine.pass_ticks(500)
    assert machine.pit.read(0, 1) | machine.pit.read(0, 1) << 8 == 990
    assert machine.pit.read(0, 1) | machine.pit.read(0, 1) << 8 == 500


def test_low_and_high_byte_only(machine: Machine) -> None:
    machine.pit.write(CONTROL, 1, 0x14)
    machine.pit.write(0, 1, 200)
    assert machine.pit.read(0, 1) == 200
    machine.pit.write(CONTROL, 1, 0x24)
    machine.pit.write(0, 1, 3)
    assert machine.pit.read(0, 1) == 3
    machine.pass_ticks(1)
    assert machine.pit.read(0, 1) == 2


def test_read_back_of_status_and_count(machine: Machine) -> None:
    machine.program(0, 3, 1000)
    machine.pass_ticks(600)
    machine.pit.write(CONTROL, 1, 0xC2)
    assert machine.pit.read(0, 1) == 0x36, "output low, count loaded, both bytes, mode 3"
    assert machine.pit.read(0, 1) | machine.pit.read(0, 1) << 8 == 800
    machine.pit.write(CONTROL, 1, 0x30)
    machine.pit.write(CONTROL, 1, 0xE2)
    assert machine.pit.read(0, 1) == 0x70, "null count: none was loaded since"


def test_channel_0_ticks_once_per_period_however_late_it_is_asked(machine: Machine) -> None:
    machine.program(0, 2, 1000)
    assert not machine.pit.elapsed()
    machine.pass_ticks(999)
    assert not machine.pit.elapsed()
    machine.pass_ticks(1000)
    assert machine.pit.elapsed()
    assert not machine.pit.elapsed()
    machine.pass_ticks(5500)
    assert machine.pit.elapsed(), "periods that were missed are not made up for"
    assert not machine.pit.elapsed()
    edge = machine.pit.channels[0].next_edge()
    machine.pass_ticks(6000)
    assert edge == machine.clock.time
    machine.pit.elapsed()
    machine.program(0, 0, 10)
    assert not machine.pit.elapsed()
    machine.clock.time += 10**6
    assert machine.pit.elapsed()
    assert machine.pit.channels[0].next_edge() is None


def test_the_speaker_port_gates_and_shows_channel_2(machine: Machine) -> None:
    machine.speaker.write(0, 1, 1)
    machine.program(2, 0, 1000)
    assert not machine.speaker.read(0, 1) & 0x20
    assert machine.speaker.read(0, 1) & 3 == 1
    machine.pass_ticks(400)
    machine.speaker.write(0, 1, 0)
    machine.pass_ticks(5000)
    assert machine.latched(2) == 600, "no counting while the gate is low"
    machine.speaker.write(0, 1, 1)
    machine.pass_ticks(5599)
    assert not machine.speaker.read(0, 1) & 0x20
    machine.pass_ticks(5601)
    assert machine.speaker.read(0, 1) & 0x20


def test_the_refresh_bit_toggles(machine: Machine) -> None:
    seen = set()
    for _ in range(8):
        seen.add(machine.speaker.read(0, 1) & 0x10)
        machine.clock.time += 5000
    assert seen == {0, 0x10}
