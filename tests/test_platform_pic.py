"""The pair of 8259A: initialisation, priorities, ends of interrupts, the cascade."""

from __future__ import annotations

import pytest

from sandbox.platform.pic import EdgeLevel, PicPair


def pair(mask: int = 0) -> PicPair:
    """Both set up as PC kernels do: vectors 20h and 28h, ``mask`` for 16 lines."""
    pics = PicPair()
    for pic, base, cascade in ((pics.master, 0x20, 4), (pics.slave, 0x28, 2)):
        pic.write(0, 1, 0x11)
        for value in (base, cascade, 1):
            pic.write(1, 1, value)
    pics.master.write(1, 1, mask & 0xFF)
    pics.slave.write(1, 1, mask >> 8)
    return pics


def take(pics: PicPair) -> int:
    assert pics.pending()
    return pics.acknowledge()


def test_as_a_bios_leaves_them() -> None:
    pics = PicPair()
    assert (pics.master.read(1, 1), pics.slave.read(1, 1)) == (0xFF, 0xFF)
    pics.pulse(0)
    assert not pics.pending()
    pics.master.write(1, 1, 0xFE)
    assert take(pics) == 8


@pytest.mark.parametrize("line", [0, 1, 7, 8, 15])
def test_each_line_has_its_vector(line: int) -> None:
    pics = pair()
    pics.pulse(line)
    assert take(pics) == 0x20 + line
    assert not pics.pending()


def test_a_masked_request_waits() -> None:
    pics = pair(0xFFFF)
    pics.pulse(5)
    assert not pics.pending()
    assert pics.master.read(0, 1) == 0x20, "IRR is what the even port shows"
    pics.master.write(1, 1, 0xDF)
    assert take(pics) == 0x25


def test_lower_numbers_go_first_and_hold_the_others_back() -> None:
    pics = pair()
    for line in (6, 3, 4):
        pics.pulse(line)
    assert take(pics) == 0x23
    assert not pics.pending(), "3 is in service"
    pics.pulse(1)
    assert take(pics) == 0x21, "1 is more urgent than 3"
    pics.master.write(0, 1, 0x0B)
    assert pics.master.read(0, 1) == 0x0A
    pics.master.write(0, 1, 0x20)
    assert pics.master.read(0, 1) == 0x08, "the end of interrupt was that of line 1"
    pics.master.write(0, 1, 0x63)
    assert take(pics) == 0x24


def test_the_second_controller_stands_at_line_2() -> None:
    pics = pair()
    pics.pulse(3)
    pics.pulse(10)
    assert take(pics) == 0x2A, "line 10 counts as line 2"
    pics.slave.write(0, 1, 0x0B)
    assert pics.slave.read(0, 1) == 4
    assert not pics.pending()
    pics.slave.write(0, 1, 0x20)
    assert not pics.pending(), "line 2 of the first is still in service"
    pics.master.write(0, 1, 0x20)
    assert take(pics) == 0x23


def test_a_line_is_taken_by_its_edge_once() -> None:
    pics = pair()
    pics.set_line(4, True)
    assert take(pics) == 0x24
    pics.master.write(0, 1, 0x20)
    assert not pics.pending()
    pics.set_line(4, True)
    assert not pics.pending()
    pics.set_line(4, False)
    pics.set_line(4, True)
    assert take(pics) == 0x24


def test_a_level_triggered_line_comes_again_until_it_is_lowered() -> None:
    pics = pair()
    levels = EdgeLevel(pics)
    levels.write(0, 1, 0xFF)
    levels.write(1, 1, 0x0C)
    assert (levels.read(0, 1), levels.read(1, 1)) == (0xF8, 0x0C)
    pics.set_line(5, True)
    assert take(pics) == 0x25
    pics.master.write(0, 1, 0x20)
    assert take(pics) == 0x25
    pics.master.write(0, 1, 0x20)
    pics.set_line(5, False)
    assert not pics.pending()


def test_a_request_that_has_gone_is_line_7() -> None:
    pics = pair()
    assert pics.acknowledge() == 0x27
    pics.master.write(0, 1, 0x0B)
    assert pics.master.read(0, 1) == 0


def test_automatic_end_of_interrupt() -> None:
    pics = pair()
    pics.master.write(0, 1, 0x11)
    for value in (0x40, 4, 3):
        pics.master.write(1, 1, value)
    pics.pulse(1)
    pics.pulse(6)
    assert [take(pics), take(pics)] == [0x41, 0x46]


def test_rotation_gives_the_served_line_the_lowest_priority() -> None:
    pics = pair()
    pics.pulse(3)
    assert take(pics) == 0x23
    pics.master.write(0, 1, 0xA0)
    pics.pulse(3)
    pics.pulse(6)
    assert take(pics) == 0x26
    pics.master.write(0, 1, 0x20)
    pics.master.write(0, 1, 0xC7)
    pics.pulse(0)
    assert take(pics) == 0x20, "set priority: 7 is the lowest again"


def test_special_mask_lets_others_by() -> None:
    pics = pair()
    pics.pulse(1)
    take(pics)
    pics.master.write(0, 1, 0x68)
    pics.master.write(1, 1, 0x02)
    pics.pulse(6)
    assert take(pics) == 0x26


def test_poll_acknowledges() -> None:
    pics = pair()
    pics.pulse(4)
    pics.master.write(0, 1, 0x0C)
    assert pics.master.read(0, 1) == 0x84
    pics.master.write(0, 1, 0x0C)
    assert pics.master.read(0, 1) == 0
