"""The two 8259A interrupt controllers of a PC, the second one on line 2 of the first.

Source: Intel's data sheet of the 8259A (order number 231468).
"""

from __future__ import annotations

from typing import Final

MASTER_PORT: Final = 0x20
SLAVE_PORT: Final = 0xA0
PORT_COUNT: Final = 2
EDGE_LEVEL_PORT: Final = 0x4D0
CASCADE: Final = 2
SPURIOUS: Final = 7

_ICW1, _ICW1_LEVEL, _ICW1_SINGLE, _ICW1_ICW4 = 0x10, 8, 2, 1
_OCW3 = 8
_ICW4_AUTO_EOI, _ICW4_NESTED = 2, 0x10


class Pic:
    """One 8259A. Bit n of each register is line n."""

    def __init__(self, base: int) -> None:
        self.base = base
        """Vector of line 0."""
        self.lines = self.irr = self.isr = 0
        self.imr = 0xFF
        self.level = 0
        """Lines that are level-triggered (the PC's ELCR)."""
        self._step = 0
        """Which ICW is expected at the odd port; 0: none, it is IMR."""
        self._single = self._wants_icw4 = False
        self._auto_eoi = self._rotate = self._special_mask = self._nested = False
        self._read_isr = self._poll = False
        self._lowest = 7
        """The line with the lowest priority."""
        self.is_master = False

    # -- lines ----------------------------------------------------------------------------------

    def set_line(self, number: int, high: bool) -> None:
        bit = 1 << number
        if high and (self.level & bit or not self.lines & bit):
            self.irr |= bit
        elif not high and self.level & bit:
            self.irr &= ~bit
        self.lines = self.lines | bit if high else self.lines & ~bit

    def pulse(self, number: int) -> None:
        """A rising edge."""
        self.set_line(number, False)
        self.set_line(number, True)
        self.set_line(number, False)

    def _rank(self, number: int) -> int:
        """0 for the highest priority."""
        return (number - self._lowest - 1) & 7

    def _best(self, bits: int) -> int | None:
        """The line with the highest priority."""
        if not bits:
            return None
        numbers = [n for n in range(8) if bits >> n & 1]
        return min(numbers, key=self._rank)

    def requested(self) -> int | None:
        """The line whose interrupt goes out now."""
        found = self._best(self.irr & ~self.imr)
        if found is None:
            return None
        serving = self.isr
        if self._special_mask:
            serving &= ~self.imr
        if self._nested and self.is_master:
            serving &= ~(1 << CASCADE)
        current = self._best(serving)
        return found if current is None or self._rank(found) < self._rank(current) else None

    def acknowledge(self) -> int | None:
        """INTA: take the interrupt into service; None if there is none any more."""
        number = self.requested()
        if number is None:
            return None
        bit = 1 << number
        if not self.level & bit:
            self.irr &= ~bit
        if not self._auto_eoi:
            self.isr |= bit
        elif self._rotate:
            self._lowest = number
        return number

    # -- ports ----------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        if self._poll:
            self._poll = False
            number = self.acknowledge()
            return 0 if number is None else 0x80 | number
        if offset:
            return self.imr
        return self.isr if self._read_isr else self.irr

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if offset:
            self._write_odd(value)
        elif value & _ICW1:
            self._initialise(value)
        elif value & _OCW3:
            self._operate(value)
        else:
            self._end(value >> 5, value & 7)

    def _initialise(self, value: int) -> None:
        self.irr = self.lines & self.level
        self.isr = self.imr = 0
        self._lowest = 7
        self._auto_eoi = self._rotate = self._special_mask = self._nested = False
        self._read_isr = self._poll = False
        self._single, self._wants_icw4 = bool(value & _ICW1_SINGLE), bool(value & _ICW1_ICW4)
        self._step = 2

    def _write_odd(self, value: int) -> None:
        step, self._step = self._step, 0
        if step == 2:
            self.base = value & 0xF8
            self._step = 4 if self._wants_icw4 else 0
            if not self._single:
                self._step = 3
        elif step == 3:
            self._step = 4 if self._wants_icw4 else 0
        elif step == 4:
            self._auto_eoi = bool(value & _ICW4_AUTO_EOI)
            self._nested = bool(value & _ICW4_NESTED)
        else:
            self.imr = value

    def _operate(self, value: int) -> None:
        """OCW3."""
        if value & 4:
            self._poll = True
        if value & 2:
            self._read_isr = bool(value & 1)
        if value & 0x40:
            self._special_mask = bool(value & 0x20)

    def _end(self, command: int, number: int) -> None:
        """OCW2: end of interrupt, rotation of priorities."""
        specific, rotate, end = command & 2, command & 4, command & 1
        if not end:
            if specific and rotate:
                self._lowest = number
            elif not specific:
                self._rotate = bool(rotate)
            return
        served = number if specific else self._best(self.isr)
        if served is not None:
            self.isr &= ~(1 << served)
            if rotate:
                self._lowest = served


class PicPair:
    """Lines 0 to 15; vectors as a BIOS leaves them (08h and 70h), all lines masked."""

    def __init__(self) -> None:
        self.master, self.slave = Pic(0x08), Pic(0x70)
        self.master.is_master = True

    def set_line(self, number: int, high: bool) -> None:
        """The level of a device's request."""
        if number < 8:
            self.master.set_line(number, high)
        else:
            self.slave.set_line(number - 8, high)

    def pulse(self, number: int) -> None:
        """A rising edge of a device's request."""
        (self.master if number < 8 else self.slave).pulse(number & 7)

    def _cascade(self) -> None:
        self.master.set_line(CASCADE, False)
        self.master.irr &= ~(1 << CASCADE)
        if self.slave.requested() is not None:
            self.master.set_line(CASCADE, True)

    def pending(self) -> bool:
        """Whether INTR is high."""
        self._cascade()
        return self.master.requested() is not None

    def acknowledge(self) -> int:
        """The vector; the spurious one of line 7 or 15 if the request has gone."""
        self._cascade()
        number = self.master.acknowledge()
        if number is None:
            return self.master.base + SPURIOUS
        if number != CASCADE:
            return self.master.base + number
        number = self.slave.acknowledge()
        return self.slave.base + (SPURIOUS if number is None else number)


class EdgeLevel:
    """ELCR: which lines are level-triggered; 0, 1, 2, 8 and 13 never are."""

    _FIXED = (0x07, 0x21)

    def __init__(self, pair: PicPair) -> None:
        self._pics = (pair.master, pair.slave)

    def read(self, offset: int, size: int) -> int:
        return self._pics[offset].level

    def write(self, offset: int, size: int, value: int) -> None:
        self._pics[offset].level = value & 0xFF & ~self._FIXED[offset]
