"""The clock and the CMOS memory of a PC (MC146818): the host's UTC, and how much RAM there is.

It raises no interrupts. Source: Motorola's data sheet; the memory sizes are where BIOSes put them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

RTC_PORT: Final = 0x70
RTC_COUNT: Final = 2

_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR, _CENTURY = 0, 2, 4, 6, 7, 8, 9, 0x32
_STATUS_A, _STATUS_B, _STATUS_C, _STATUS_D = 10, 11, 12, 13
_BINARY, _24_HOURS = 4, 2
_PM = 0x80
_VALID = 0x80
_BYTES = 128


class Rtc:
    """An index port and a data port. ``now`` gives seconds since 1970, UTC."""

    def __init__(self, ram: int, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._index = 0
        self._memory = bytearray(_BYTES)
        self._memory[_STATUS_A], self._memory[_STATUS_B] = 0x26, _24_HOURS
        below_64m = min((ram >> 10) - 1024, 0xFC00)
        above_16m = max(0, ram - (16 << 20)) >> 16
        for at, value in ((0x15, 639), (0x17, below_64m), (0x30, below_64m), (0x34, above_16m)):
            self._memory[at : at + 2] = value.to_bytes(2, "little")

    def read(self, offset: int, size: int) -> int:
        if not offset:
            return 0xFF
        if self._index in (_STATUS_C, _STATUS_D):
            return _VALID if self._index == _STATUS_D else 0
        value = self._time().get(self._index)
        return self._memory[self._index] if value is None else value

    def write(self, offset: int, size: int, value: int) -> None:
        """The time cannot be set; bit 7 of the index (NMI) means nothing here."""
        if not offset:
            self._index = value & (_BYTES - 1)
        elif self._index == _STATUS_A:
            self._memory[_STATUS_A] = value & 0x7F
        elif self._index not in (_STATUS_C, _STATUS_D):
            self._memory[self._index] = value & 0xFF

    def _time(self) -> dict[int, int]:
        """The time registers, in the format that status B asks for."""
        t = time.gmtime(self._now())
        mode = self._memory[_STATUS_B]
        encode = int if mode & _BINARY else _decimal
        hours = encode(t.tm_hour)
        if not mode & _24_HOURS:
            hours = encode(t.tm_hour % 12 or 12) | (_PM if t.tm_hour >= 12 else 0)
        return {
            _SECONDS: encode(min(t.tm_sec, 59)),
            _MINUTES: encode(t.tm_min),
            _HOURS: hours,
            _WEEKDAY: encode((t.tm_wday + 1) % 7 + 1),
            _DAY: encode(t.tm_mday),
            _MONTH: encode(t.tm_mon),
            _YEAR: encode(t.tm_year % 100),
            _CENTURY: encode(t.tm_year // 100),
        }


def _decimal(value: int) -> int:
    """Two digits in BCD."""
    return value // 10 << 4 | value % 10
