"""Interrupt controllers and timers of the small PC, as one source of interrupts."""

from __future__ import annotations

from collections.abc import Callable

from sandbox.memory import Device
from sandbox.platform.clock import Clock
from sandbox.platform.lapic import LAPIC_ADDRESS, LAPIC_SIZE, Lapic
from sandbox.platform.pic import (
    EDGE_LEVEL_PORT,
    MASTER_PORT,
    PORT_COUNT,
    SLAVE_PORT,
    EdgeLevel,
    PicPair,
)
from sandbox.platform.pit import PIT_COUNT, PIT_PORT, SPEAKER_PORT, Pit, Speaker
from sandbox.vm import Vm

TIMER_IRQ = 0


class InterruptControllers:
    """PIC, PIT and local APIC: which interrupt the processor gets next.

    A :class:`~sandbox.external.InterruptSource`.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.pics = PicPair()
        self.pit = Pit(clock)
        self.lapic = Lapic(clock)

    @property
    def cr8(self) -> int:
        return self.lapic.cr8

    @cr8.setter
    def cr8(self, value: int) -> None:
        self.lapic.cr8 = value

    def pending(self) -> bool:
        if self.pit.elapsed():
            self.pics.pulse(TIMER_IRQ)
        self.lapic.update()
        return self.lapic.pending() or (self.lapic.passes_pic and self.pics.pending())

    def acknowledge(self) -> int:
        if self.lapic.passes_pic and self.pics.pending():
            return self.pics.acknowledge()
        return self.lapic.acknowledge()

    def deadline(self) -> int | None:
        timer = self.lapic.deadline()
        ticks = self.lapic.passes_pic and not self.pics.master.imr & 1 << TIMER_IRQ
        tick = self.pit.channels[0].next_edge() if ticks else None
        return min((at for at in (timer, tick) if at is not None), default=None)


class _Watched:
    """A device that may raise or let through an interrupt when it is written to."""

    def __init__(self, device: Device, written: Callable[[], None]) -> None:
        self.read = device.read
        self._write = device.write
        self._written = written

    def write(self, offset: int, size: int, value: int) -> None:
        self._write(offset, size, value)
        self._written()


def add_controllers(vm: Vm, clock: Clock) -> Callable[[int, bool], None]:
    """Give ``vm`` two 8259s, an 8254 and a local APIC; to be called with a line and its level."""
    found = InterruptControllers(clock)
    pics = found.pics
    changed = vm.attach_interrupts(found)
    devices: tuple[tuple[int, int, Device], ...] = (
        (MASTER_PORT, PORT_COUNT, pics.master),
        (SLAVE_PORT, PORT_COUNT, pics.slave),
        (EDGE_LEVEL_PORT, 2, EdgeLevel(pics)),
        (PIT_PORT, PIT_COUNT, found.pit),
        (SPEAKER_PORT, 1, Speaker(found.pit, clock)),
    )
    for port, count, device in devices:
        vm.add_ports(port, count, _Watched(device, changed))
    vm.add_mmio(LAPIC_ADDRESS, LAPIC_SIZE, _Watched(found.lapic, changed))

    def set_line(number: int, high: bool) -> None:
        pics.set_line(number, high)
        changed()

    return set_line
