"""Devices for test kernels, as QEMU has them: pc-testdev, isa-debug-exit, and the shutdown port."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

TEST_PORT: Final = 0xE0
FLUSH_PORT: Final = 0xE4
REGISTER_COUNT: Final = 4
LINES_PORT: Final = 0x2000
LINES_COUNT: Final = 24
IORAM_ADDRESS: Final = 0xFF00_0000
IORAM_SIZE: Final = 0x1_0000
EXIT_PORT: Final = 0xF4
EXIT_COUNT: Final = 4
SHUTDOWN_PORT: Final = 0x8900
_SHUTDOWN: Final = b"Shutdown"


class Register:
    """Four ports that keep what is written to them, byte by byte."""

    def __init__(self) -> None:
        self._bytes = bytearray(REGISTER_COUNT)

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._bytes[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        data = value.to_bytes(size, "little")[: REGISTER_COUNT - offset]
        self._bytes[offset : offset + len(data)] = data


class IoRam:
    """Memory behind exits: each access to it is MMIO."""

    def __init__(self) -> None:
        self._bytes = bytearray(IORAM_SIZE)

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._bytes[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        data = value.to_bytes(size, "little")[: IORAM_SIZE - offset]
        self._bytes[offset : offset + len(data)] = data


class Lines:
    """One port per interrupt line: 1 raises it, 0 lowers it."""

    def __init__(self, set_line: Callable[[int, bool], None]) -> None:
        self._set_line = set_line

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset < 16:
            self._set_line(offset, bool(value))


class DebugExit:
    """A write of n ends the machine with status 2n + 1, cut to 8 bits as exit statuses are."""

    def __init__(self, end: Callable[[int], None]) -> None:
        self._end = end

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self._end((value << 1 | 1) & 0xFF)


class ShutdownPort:
    """The word "Shutdown", written letter by letter, ends the machine with status 0."""

    def __init__(self, end: Callable[[int], None]) -> None:
        self._end = end
        self._seen = 0

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        letter = value & 0xFF
        self._seen = self._seen + 1 if letter == _SHUTDOWN[self._seen] else 0
        if self._seen == len(_SHUTDOWN):
            self._seen = 0
            self._end(0)
