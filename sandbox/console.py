"""The console of bare guests: bytes written to a port appear on the host's standard output."""

from __future__ import annotations

from typing import BinaryIO

SERIAL_PORT = 0x3F8
SERIAL_COUNT = 8
DEBUG_PORT = 0xE9
_LINE_STATUS, _TRANSMITTER_EMPTY = 5, 0x60


class Console:
    """A serial port (16550's data and line status registers) that is always ready to send."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out

    def read(self, offset: int, size: int) -> int:
        return _TRANSMITTER_EMPTY if offset == _LINE_STATUS else 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0:
            self._out.write(value.to_bytes(size, "little")[:1])
            self._out.flush()
