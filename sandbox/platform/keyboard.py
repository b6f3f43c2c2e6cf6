"""The keyboard controller of a PC (i8042) without a keyboard, and the other ports that reset it.

What is left of it for kernels: it is never busy, passes its self-test, and resets the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

DATA_PORT: Final = 0x60
COMMAND_PORT: Final = 0x64
CONTROL_A_PORT: Final = 0x92
RESET_PORT: Final = 0xCF9

_FULL, _SYSTEM, _COMMAND, _UNLOCKED = 1, 4, 8, 0x10
_A20, _NO_RESET = 2, 1
_READ_CONFIG, _WRITE_CONFIG, _TEST_MOUSE, _SELF_TEST, _TEST_KEYBOARD = 0x20, 0x60, 0xA9, 0xAA, 0xAB
_READ_OUTPUT, _WRITE_OUTPUT, _PULSE = 0xD0, 0xD1, 0xF0
_ANSWERS: Final = {_SELF_TEST: 0x55, _TEST_KEYBOARD: 0, _TEST_MOUSE: 0}
_PASSED = 0x34
"""Configuration: the self-test was passed, both devices are off."""


class KeyboardController:
    """``data`` and ``command`` are its ports; ``reset`` is called when the guest asks for it."""

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset
        self._config = _PASSED
        self._answer: int | None = None
        self._awaited = 0
        """The command whose parameter the next data byte is."""
        self._was_command = 0
        self.data = _Port(self._read_data, self._write_data)
        self.command = _Port(self._status, self._write_command)

    def _status(self) -> int:
        full = 0 if self._answer is None else _FULL
        return _UNLOCKED | _SYSTEM | self._was_command | full

    def _read_data(self) -> int:
        value, self._answer = self._answer or 0, None
        return value

    def _write_data(self, value: int) -> None:
        self._was_command = 0
        command, self._awaited = self._awaited, 0
        if command == _WRITE_CONFIG:
            self._config = value
        elif command == _WRITE_OUTPUT and not value & _NO_RESET:
            self._reset()

    def _write_command(self, value: int) -> None:
        self._was_command = _COMMAND
        if value in _ANSWERS:
            self._answer = _ANSWERS[value]
        elif value == _READ_CONFIG:
            self._answer = self._config
        elif value == _READ_OUTPUT:
            self._answer = _A20 | _NO_RESET
        elif value in (_WRITE_CONFIG, _WRITE_OUTPUT):
            self._awaited = value
        elif value >= _PULSE and not value & _NO_RESET:
            self._reset()


class _Port:
    def __init__(self, read: Callable[[], int], write: Callable[[int], None]) -> None:
        self._read, self._write = read, write

    def read(self, offset: int, size: int) -> int:
        return self._read()

    def write(self, offset: int, size: int, value: int) -> None:
        self._write(value & 0xFF)


def control_a(reset: Callable[[], None]) -> _Port:
    """Port 92h: bit 1 is A20, which stays open; bit 0 resets."""
    return _Port(lambda: _A20, lambda value: reset() if value & 1 else None)


def reset_control(reset: Callable[[], None]) -> _Port:
    """Port CF9h: bit 2 resets."""
    return _Port(lambda: 0, lambda value: reset() if value & 4 else None)
