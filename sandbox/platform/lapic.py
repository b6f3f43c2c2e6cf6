"""The local APIC of the one processor, as a page of registers at FEE00000h.

Source: SDM Vol. 3, chapter "Advanced Programmable Interrupt Controller (APIC)". It starts as
firmware leaves it: enabled, and LINT0 passes the PIC's interrupts on. Left out: NMI and SMI, the
deadline mode of the timer, x2APIC, other processors (INIT and SIPI reach nobody).
"""

from __future__ import annotations

from typing import Final

from sandbox.platform.clock import Clock

LAPIC_ADDRESS: Final = 0xFEE0_0000
LAPIC_SIZE: Final = 0x1000

_ID, _VERSION, _TPR, _APR, _PPR, _EOI, _LDR, _DFR, _SVR = (
    0x20, 0x30, 0x80, 0x90, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0,
)  # fmt: skip
_ISR, _TMR, _IRR, _ESR, _ICR_LOW, _ICR_HIGH = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
_LVT_TIMER, _LVT_LINT0, _LVT_LINT1, _LVT_ERROR = 0x320, 0x350, 0x360, 0x370
_LVTS = (_LVT_TIMER, 0x330, 0x340, _LVT_LINT0, _LVT_LINT1, _LVT_ERROR)
_INITIAL, _CURRENT, _DIVIDE = 0x380, 0x390, 0x3E0

VERSION: Final = 0x14 | (len(_LVTS) - 1) << 16
_ENABLED, _MASKED, _PERIODIC = 1 << 8, 1 << 16, 1 << 17
_EXTERNAL = 7
_FIXED, _LOWEST = 0, 1
_WRITABLE: Final = {
    _ID: 0xFF00_0000, _TPR: 0xFF, _LDR: 0xFF00_0000, _DFR: 0xF000_0000, _SVR: 0x1FF,
    _ICR_HIGH: 0xFF00_0000, _LVT_TIMER: 0x3_00FF, 0x330: 0x1_07FF, 0x340: 0x1_07FF,
    _LVT_LINT0: 0x1_A7FF, _LVT_LINT1: 0x1_A7FF, _LVT_ERROR: 0x1_00FF, _DIVIDE: 0xB,
}  # fmt: skip
"""Bits that stay as they are written."""
_ILLEGAL_SENT = 1 << 5
_FIRST_LEGAL = 16


class Lapic:
    """The registers are 32 bits wide, 16 bytes apart. The timer counts nanoseconds, divided."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._registers = dict.fromkeys(_WRITABLE, 0) | dict.fromkeys(_LVTS, _MASKED)
        self._registers |= {_DFR: 0xFFFF_FFFF, _SVR: 0xFF | _ENABLED}
        self._registers |= {_LVT_LINT0: _EXTERNAL << 8, _LVT_LINT1: 4 << 8}
        self._icr = 0
        self._requested = self._serving = 0
        """IRR and ISR, bit n for vector n."""
        self._errors = self._new_errors = 0
        self._initial = 0
        self._started = 0
        self._due: int | None = None
        """When the timer fires next."""

    # -- interrupts -----------------------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        return bool(self._registers[_SVR] & _ENABLED)

    @property
    def passes_pic(self) -> bool:
        """Whether LINT0 hands the PIC's interrupts to the processor."""
        lint0 = self._registers[_LVT_LINT0]
        return not lint0 & _MASKED and lint0 >> 8 & 7 == _EXTERNAL

    @property
    def cr8(self) -> int:
        """The task priority as CR8 shows it."""
        return self._registers[_TPR] >> 4

    @cr8.setter
    def cr8(self, value: int) -> None:
        if value != self.cr8:
            self._registers[_TPR] = (value & 0xF) << 4

    @property
    def _priority(self) -> int:
        """PPR."""
        task, served = self._registers[_TPR], self._serving.bit_length() - 1
        return task if task >> 4 >= max(served, 0) >> 4 else served & 0xF0

    def request(self, vector: int) -> None:
        """An interrupt has arrived."""
        if self.enabled and vector >= _FIRST_LEGAL:
            self._requested |= 1 << vector

    def pending(self) -> bool:
        """Whether an interrupt is above the priority of what runs; call :meth:`update` before."""
        vector = self._requested.bit_length() - 1
        return self.enabled and vector >= 0 and vector >> 4 > self._priority >> 4

    def acknowledge(self) -> int:
        """Take the pending interrupt into service; its vector."""
        vector = self._requested.bit_length() - 1
        self._requested &= ~(1 << vector)
        self._serving |= 1 << vector
        return vector

    # -- the timer ------------------------------------------------------------------------------

    @property
    def _divisor(self) -> int:
        code = self._registers[_DIVIDE]
        return 1 << ((code & 3 | code >> 1 & 4) + 1 & 7)

    @property
    def _period(self) -> int:
        return self._initial * self._divisor

    def update(self) -> None:
        """Let the timer fire if its time has come."""
        if self._due is None or self._clock.now() < self._due:
            return
        entry = self._registers[_LVT_TIMER]
        if entry & _PERIODIC:
            self._due += ((self._clock.now() - self._due) // self._period + 1) * self._period
        else:
            self._due = None
        if not entry & _MASKED:
            self.request(entry & 0xFF)

    def deadline(self) -> int | None:
        """When the timer fires next, if that is an interrupt."""
        return None if self._registers[_LVT_TIMER] & _MASKED else self._due

    def _current(self) -> int:
        if self._due is None:
            return 0
        return -(-max(0, self._due - self._clock.now()) // self._divisor)

    def _start(self, count: int) -> None:
        self._initial = count
        self._due = self._clock.now() + self._period if count else None

    def _change_divisor(self, value: int) -> None:
        left = self._current()
        self._registers[_DIVIDE] = value & _WRITABLE[_DIVIDE]
        if self._due is not None:
            self._due = self._clock.now() + left * self._divisor

    # -- the page -------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """The register at ``offset``; the 12 bytes behind each read 0."""
        at, shift = offset & ~0xF, offset & 0xF
        return self._value(at) >> 8 * shift if shift < 4 else 0

    def _value(self, at: int) -> int:
        self.update()
        for first, bits in ((_ISR, self._serving), (_TMR, 0), (_IRR, self._requested)):
            if first <= at < first + 0x80:
                return bits >> 2 * (at - first) & 0xFFFF_FFFF
        special = {
            _VERSION: VERSION, _PPR: self._priority, _ESR: self._errors, _ICR_LOW: self._icr,
            _INITIAL: self._initial, _CURRENT: self._current(),
        }  # fmt: skip
        return special.get(at, self._registers.get(at, 0))

    def write(self, offset: int, size: int, value: int) -> None:
        """Only whole registers are written; what is read-only or not there stays."""
        if offset & 0xF or size < 4:
            return
        self.update()
        value &= 0xFFFF_FFFF
        if offset == _EOI:
            self._serving &= ~(1 << self._serving.bit_length() - 1) if self._serving else 0
        elif offset == _ESR:
            self._errors, self._new_errors = self._new_errors, 0
        elif offset == _ICR_LOW:
            self._icr = value & 0xC_CFFF
            self._send()
        elif offset == _INITIAL:
            self._start(value)
        elif offset == _DIVIDE:
            self._change_divisor(value)
        elif offset in _WRITABLE:
            self._store(offset, value)

    def _store(self, at: int, value: int) -> None:
        kept = value & _WRITABLE[at]
        if at == _DFR:
            kept |= 0x0FFF_FFFF
        elif at in _LVTS and not self.enabled:
            kept |= _MASKED
        self._registers[at] = kept
        if at == _SVR and not self.enabled:
            for lvt in _LVTS:
                self._registers[lvt] |= _MASKED

    # -- interrupts to processors ---------------------------------------------------------------

    def _send(self) -> None:
        """An IPI: only those that reach this processor, and only as interrupts, do anything."""
        mode, vector = self._icr >> 8 & 7, self._icr & 0xFF
        if mode not in (_FIXED, _LOWEST) or not self._reaches_us():
            return
        if vector < _FIRST_LEGAL:
            self._new_errors |= _ILLEGAL_SENT
        else:
            self.request(vector)

    def _reaches_us(self) -> bool:
        shorthand = self._icr >> 18 & 3
        if shorthand:
            return shorthand != 3  # all but this one
        target = self._registers[_ICR_HIGH] >> 24
        if not self._icr & 1 << 11:
            return target in (self._registers[_ID] >> 24, 0xFF)
        ours = self._registers[_LDR] >> 24
        if self._registers[_DFR] >> 28 == 0xF:  # flat model
            return bool(ours & target)
        return target >> 4 in (ours >> 4, 0xF) and bool(ours & target & 0xF)
