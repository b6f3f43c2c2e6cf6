"""The keyboard controller without a keyboard, the ports that reset, and the clock."""

from __future__ import annotations

import calendar
from typing import Protocol

import pytest

from sandbox.platform.keyboard import KeyboardController, control_a, reset_control
from sandbox.platform.rtc import Rtc


class Port(Protocol):
    def read(self, offset: int, size: int) -> int: ...
    def write(self, offset: int, size: int, value: int) -> None: ...


@pytest.fixture
def resets() -> list[int]:
    return []


@pytest.fixture
def keyboard(resets: list[int]) -> KeyboardController:
    return KeyboardController(lambda: resets.append(1))


def test_it_is_never_busy_and_has_nothing_to_say(keyboard: KeyboardController) -> None:
    assert keyboard.command.read(0, 1) & 3 == 0
    assert keyboard.data.read(0, 1) == 0
    keyboard.data.write(0, 1, 0xFF)
    assert keyboard.command.read(0, 1) & 3 == 0, "no keyboard answers"


@pytest.mark.parametrize(
    ("command", "answer"), [(0xAA, 0x55), (0xAB, 0), (0xA9, 0), (0xD0, 3), (0x20, 0x34)]
)
def test_commands_with_an_answer(keyboard: KeyboardController, command: int, answer: int) -> None:
    keyboard.command.write(0, 1, command)
    assert keyboard.command.read(0, 1) & 9 == 9
    assert keyboard.data.read(0, 1) == answer
    assert keyboard.command.read(0, 1) & 1 == 0


def test_configuration_is_kept(keyboard: KeyboardController) -> None:
    keyboard.command.write(0, 1, 0x60)
    keyboard.data.write(0, 1, 0x61)
    keyboard.command.write(0, 1, 0x20)
    assert keyboard.data.read(0, 1) == 0x61


@pytest.mark.parametrize("value", [0xFE, 0xF0])
def test_a_pulse_of_line_0_resets(
    keyboard: KeyboardController, resets: list[int], value: int
) -> None:
    keyboard.command.write(0, 1, value | 1)
    assert not resets
    keyboard.command.write(0, 1, value)
    assert resets


def test_the_output_port_resets(keyboard: KeyboardController, resets: list[int]) -> None:
    for value, count in ((3, 0), (2, 1)):
        keyboard.command.write(0, 1, 0xD1)
        keyboard.data.write(0, 1, value)
        assert len(resets) == count


def test_other_ports_that_reset(resets: list[int]) -> None:
    ports: tuple[tuple[Port, int, int], ...] = (
        (control_a(lambda: resets.append(1)), 2, 3),
        (reset_control(lambda: resets.append(1)), 2, 6),
    )
    for number, (port, harmless, deadly) in enumerate(ports, 1):
        port.write(0, 1, harmless)
        port.write(0, 1, deadly)
        assert len(resets) == number
    assert ports[0][0].read(0, 1) == 2, "A20 is open"


def cmos(rtc: Rtc, index: int) -> int:
    rtc.write(0, 1, index | 0x80)
    return rtc.read(1, 1)


MOMENT = calendar.timegm((2024, 2, 29, 23, 58, 7))
"""A Thursday."""


@pytest.mark.parametrize(
    ("mode", "hours", "rest"),
    [
        (2, 0x23, (0x07, 0x58, 0x05, 0x29, 0x02, 0x24, 0x20)),
        (0, 0x91, (0x07, 0x58, 0x05, 0x29, 0x02, 0x24, 0x20)),
        (6, 23, (7, 58, 5, 29, 2, 24, 20)),
        (4, 0x8B, (7, 58, 5, 29, 2, 24, 20)),
    ],
    ids=["BCD", "BCD, 12 hours", "binary", "binary, 12 hours"],
)
def test_time(mode: int, hours: int, rest: tuple[int, ...]) -> None:
    rtc = Rtc(64 << 20, lambda: MOMENT)
    rtc.write(0, 1, 0x0B)
    rtc.write(1, 1, mode)
    assert cmos(rtc, 4) == hours
    assert tuple(cmos(rtc, n) for n in (0, 2, 6, 7, 8, 9, 0x32)) == rest
    assert cmos(rtc, 0x0A) & 0x80 == 0, "no update goes on"
    assert cmos(rtc, 0x0D) == 0x80


@pytest.mark.parametrize(
    ("ram", "extended", "above"), [(2, 1024, 0), (64, 63 << 10, 768), (1024, 63 << 10, 16128)]
)
def test_memory_sizes(ram: int, extended: int, above: int) -> None:
    rtc = Rtc(ram << 20)
    assert cmos(rtc, 0x15) | cmos(rtc, 0x16) << 8 == 639
    assert cmos(rtc, 0x30) | cmos(rtc, 0x31) << 8 == extended
    assert cmos(rtc, 0x34) | cmos(rtc, 0x35) << 8 == above


def test_other_bytes_are_memory() -> None:
    rtc = Rtc(2 << 20)
    rtc.write(0, 1, 0x40)
    rtc.write(1, 1, 0xA5)
    assert (cmos(rtc, 0x40), rtc.read(0, 1)) == (0xA5, 0xFF)
