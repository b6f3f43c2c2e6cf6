"""The 8254 timer of a PC: channel 0 drives interrupt line 0, channel 2 the speaker.

Source: Intel's data sheet of the 8254 (order number 231164). Binary counting only.
"""

from __future__ import annotations

from typing import Final

from sandbox.platform.clock import Clock

PIT_PORT: Final = 0x40
PIT_COUNT: Final = 4
SPEAKER_PORT: Final = 0x61
PIT_HZ: Final = 1_193_182
_SECOND = 1_000_000_000
_LOW_BYTE, _HIGH_BYTE, _BOTH = 1, 2, 3
_PERIODIC = (2, 3)
_STROBES_ON_GATE = (1, 5)
_REFRESH_NS = 15_085


def _nanoseconds(ticks: int) -> int:
    """Until ``ticks`` have passed for certain."""
    return -(-ticks * _SECOND // PIT_HZ)


class Channel:
    """One counter. ``start`` is when the count was loaded, None before the first."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.mode = 3
        self.start: int | None = None
        self.gate = True
        self._reload = 0x1_0000
        self._access = _BOTH
        self._low: int | None = None
        """The low byte of a count, while the high one is awaited."""
        self._second = False
        """Whether the high byte is to be read next."""
        self._latch: int | None = None
        self._status: int | None = None
        self._frozen = 0

    @property
    def _ticks(self) -> int:
        """Clock ticks since the count was loaded."""
        if self.start is None:
            return 0
        if not self.gate and self.mode not in _STROBES_ON_GATE:
            return self._frozen
        return (self._clock.now() - self.start) * PIT_HZ // _SECOND

    @property
    def count(self) -> int:
        """What the counter shows, 16 bits."""
        ticks, reload = self._ticks, self._reload
        if self.mode == 2:
            return (reload - ticks % reload) & 0xFFFF
        if self.mode == 3:
            return (reload - 2 * ticks % reload) & 0xFFFE
        return (reload - ticks) & 0xFFFF

    @property
    def out(self) -> bool:
        """The level of the output pin."""
        ticks, reload = self._ticks, self._reload
        if self.start is None:
            return self.mode != 0
        if self.mode == 0:
            return ticks >= reload
        if self.mode == 1:
            return ticks >= reload
        if self.mode == 2:
            return ticks % reload != reload - 1
        if self.mode == 3:
            return ticks % reload < (reload + 1) // 2
        return ticks != reload

    def edges(self) -> int:
        """How often the output has risen since the count was loaded."""
        if self.start is None or self.mode in _STROBES_ON_GATE:
            return 0
        if self.mode in _PERIODIC:
            return self._ticks // self._reload
        return int(self._ticks >= self._reload)

    def next_edge(self) -> int | None:
        """When the output rises next, by the clock."""
        if self.start is None or self.mode in _STROBES_ON_GATE or not self.gate:
            return None
        done = self.edges()
        if done and self.mode not in _PERIODIC:
            return None
        return self.start + _nanoseconds((done + 1) * self._reload)

    def set_gate(self, high: bool) -> None:
        """The gate stops the counter; its rising edge restarts it in modes 1, 2, 3 and 5."""
        if high == self.gate:
            return
        frozen = self._ticks
        self.gate = high
        if not high:
            self._frozen = frozen
        elif self.start is not None:
            passed = _nanoseconds(self._frozen) if self.mode in (0, 4) else 0
            self.start = self._clock.now() - passed

    def control(self, access: int, mode: int) -> None:
        """A control word."""
        if not access:
            self.latch()
            return
        self._access, self.mode = access, mode - 4 if mode > 5 else mode
        self.start = self._low = self._latch = self._status = None
        self._second = False

    def latch(self) -> None:
        if self._latch is None:
            self._latch = self.count

    def latch_status(self) -> None:
        if self._status is None:
            null = self.start is None
            self._status = self.out << 7 | null << 6 | self._access << 4 | self.mode << 1

    def read(self) -> int:
        if self._status is not None:
            value, self._status = self._status, None
            return value
        value = self.count if self._latch is None else self._latch
        high = self._access == _HIGH_BYTE or self._second
        self._second = self._access == _BOTH and not self._second
        if not self._second:
            self._latch = None
        return value >> 8 if high else value & 0xFF

    def write(self, value: int) -> None:
        if self._access == _BOTH and self._low is None:
            self._low = value
            if self.mode == 0:
                self.start = None  # the first byte stops it
            return
        low, self._low = self._low or 0, None
        whole = {_LOW_BYTE: value, _HIGH_BYTE: value << 8}.get(self._access, value << 8 | low)
        self._reload = whole or 0x1_0000
        self.start = self._clock.now()
        self._frozen = 0


class Pit:
    """Ports 40h to 43h. :meth:`elapsed` says whether channel 0 has ticked."""

    def __init__(self, clock: Clock) -> None:
        self.channels = tuple(Channel(clock) for _ in range(3))
        self._seen = 0

    def elapsed(self) -> bool:
        """Whether channel 0's output has risen since this was last asked."""
        edges = self.channels[0].edges()
        seen, self._seen = self._seen, edges
        return edges > seen

    def read(self, offset: int, size: int) -> int:
        return self.channels[offset].read() if offset < 3 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if offset < 3:
            self.channels[offset].write(value)
        elif value >> 6 < 3:
            self.channels[value >> 6].control(value >> 4 & 3, value >> 1 & 7)
        else:
            self._read_back(value)
        self._seen = min(self._seen, self.channels[0].edges())

    def _read_back(self, value: int) -> None:
        for number, channel in enumerate(self.channels):
            if value >> number & 2:
                if not value & 0x20:
                    channel.latch()
                if not value & 0x10:
                    channel.latch_status()


class Speaker:
    """Port 61h: bit 0 is channel 2's gate, bit 5 its output, bit 4 toggles with the refresh."""

    def __init__(self, pit: Pit, clock: Clock) -> None:
        self._channel = pit.channels[2]
        self._clock = clock
        self._bits = 0
        self._channel.set_gate(False)

    def read(self, offset: int, size: int) -> int:
        refresh = self._clock.now() // _REFRESH_NS & 1
        return self._bits | refresh << 4 | self._channel.out << 5

    def write(self, offset: int, size: int, value: int) -> None:
        self._bits = value & 3
        self._channel.set_gate(bool(value & 1))
