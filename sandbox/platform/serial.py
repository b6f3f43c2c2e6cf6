"""A serial port, 16550A: what the guest sends appears on the host, and nothing ever comes in.

Source: the data sheet of National's PC16550D, section 8. The line is infinitely fast: the
transmitter is always empty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO, Final

SERIAL_PORT: Final = 0x3F8
SERIAL_COUNT: Final = 8
SERIAL_IRQ: Final = 4

_DATA, _IER, _IIR, _LCR, _MCR, _LSR, _MSR, _SCR = range(8)
_LCR_DLAB = 0x80
_IER_DATA, _IER_EMPTY = 1, 2
_IIR_NONE, _IIR_EMPTY, _IIR_DATA, _IIR_FIFOS = 1, 2, 4, 0xC0
_FCR_ENABLE, _FCR_CLEAR_RECEIVER = 1, 2
_MCR_OUT2, _MCR_LOOP = 8, 0x10
_LSR_DATA, _LSR_EMPTY = 1, 0x60
_MSR_CONNECTED = 0xB0  # CTS, DSR, DCD


class Serial:
    """Eight ports. ``line`` is called with the level of the interrupt request."""

    def __init__(self, out: BinaryIO, line: Callable[[bool], None]) -> None:
        self._out = out
        self._line = line
        self._ier = self._lcr = self._mcr = self._scratch = self._fifos = 0
        self._level = False
        self._divisor = 12  # 9600 baud
        self._received: int | None = None
        """What came back in loopback mode."""
        self._emptied = False
        """Whether the interrupt "transmitter empty" is due."""

    def read(self, offset: int, size: int) -> int:
        if self._lcr & _LCR_DLAB and offset <= _IER:
            return self._divisor >> 8 * offset & 0xFF
        if offset == _DATA:
            value, self._received = self._received or 0, None
            self._update()
            return value
        if offset == _IIR:
            reason = self._reason()
            if reason == _IIR_EMPTY:
                self._emptied = False
                self._update()
            return reason | self._fifos
        if offset == _LSR:
            return _LSR_EMPTY | (0 if self._received is None else _LSR_DATA)
        if offset == _MSR:
            return self._modem()
        return {_IER: self._ier, _LCR: self._lcr, _MCR: self._mcr}.get(offset, self._scratch)

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if self._lcr & _LCR_DLAB and offset <= _IER:
            keep = 0xFF00 >> 8 * offset
            self._divisor = self._divisor & keep | value << 8 * offset
        elif offset == _DATA:
            self._send(value)
        elif offset == _IER:
            self._emptied |= bool(value & ~self._ier & _IER_EMPTY)
            self._ier = value & 0xF
        elif offset == _IIR:  # FCR when written
            self._fifos = _IIR_FIFOS if value & _FCR_ENABLE else 0
            if value & _FCR_CLEAR_RECEIVER:
                self._received = None
        elif offset == _LCR:
            self._lcr = value
        elif offset == _MCR:
            self._mcr = value & 0x1F
        elif offset == _SCR:
            self._scratch = value
        self._update()

    def _send(self, value: int) -> None:
        self._emptied = True
        if self._mcr & _MCR_LOOP:
            self._received = value
            return
        self._out.write(bytes((value,)))
        if value == 0x0A:
            self._out.flush()

    def _modem(self) -> int:
        """MSR; in loopback mode the outputs of MCR come back: RTS, DTR, OUT1, OUT2."""
        if not self._mcr & _MCR_LOOP:
            return _MSR_CONNECTED
        mcr = self._mcr
        return (mcr & 2) << 3 | (mcr & 1) << 5 | (mcr & 4) << 4 | (mcr & 8) << 4

    def _reason(self) -> int:
        if self._ier & _IER_DATA and self._received is not None:
            return _IIR_DATA
        if self._ier & _IER_EMPTY and self._emptied:
            return _IIR_EMPTY
        return _IIR_NONE

    def _update(self) -> None:
        wired = self._mcr & (_MCR_OUT2 | _MCR_LOOP) == _MCR_OUT2
        level = wired and self._reason() != _IIR_NONE
        if level != self._level:
            self._level = level
            self._line(level)
