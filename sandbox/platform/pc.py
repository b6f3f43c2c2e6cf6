"""The small PC: the devices of a machine for bare-metal kernels, and its interrupt controllers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from sandbox.memory import Device
from sandbox.platform import testdev
from sandbox.platform.clock import Clock, RealClock
from sandbox.platform.fw_cfg import FW_CFG_COUNT, FW_CFG_PORT, FwCfg
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
from sandbox.platform.serial import SERIAL_COUNT, SERIAL_IRQ, SERIAL_PORT, Serial
from sandbox.vm import Vm

TIMER_IRQ = 0
DEBUG_PORT = 0xE9


@dataclass(frozen=True)
class PowerOff:
    """The guest switched the machine off: the exit status that it asks for."""

    status: int

    def __str__(self) -> str:
        return f"powered off, status {self.status}"


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


class _Floating:
    """A port that no device answers, on an ISA bus: ones, and what is written is lost."""

    def read(self, offset: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None: ...


class _DebugConsole:
    """Port E9h of Bochs and QEMU: bytes for the host's output; reads E9h, to be found."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out

    def read(self, offset: int, size: int) -> int:
        return DEBUG_PORT

    def write(self, offset: int, size: int, value: int) -> None:
        self._out.write(bytes((value & 0xFF,)))


def add_pc(vm: Vm, ram: int, out: BinaryIO, clock: Clock | None = None) -> InterruptControllers:
    """Give ``vm``, which has its vCPU, the devices of a PC with ``ram`` bytes of memory.

    ``out`` gets what the guest sends to the serial port. The run ends with :class:`PowerOff` when
    the guest asks for it.
    """
    vcpu = vm.vcpu
    assert vcpu is not None
    found = InterruptControllers(clock or RealClock())
    pics = found.pics
    changed = vm.attach_interrupts(found)

    def end(status: int) -> None:
        vcpu.finish(PowerOff(status))

    devices: tuple[tuple[int, int, Device], ...] = (
        (MASTER_PORT, PORT_COUNT, pics.master),
        (SLAVE_PORT, PORT_COUNT, pics.slave),
        (EDGE_LEVEL_PORT, 2, EdgeLevel(pics)),
        (PIT_PORT, PIT_COUNT, found.pit),
        (SPEAKER_PORT, 1, Speaker(found.pit, found.clock)),
        (SERIAL_PORT, SERIAL_COUNT, Serial(out, lambda high: pics.set_line(SERIAL_IRQ, high))),
        (DEBUG_PORT, 1, _DebugConsole(out)),
        (FW_CFG_PORT, FW_CFG_COUNT, FwCfg(ram)),
        (testdev.TEST_PORT, testdev.REGISTER_COUNT, testdev.Register()),
        (testdev.FLUSH_PORT, testdev.REGISTER_COUNT, testdev.Register()),
        (testdev.LINES_PORT, testdev.LINES_COUNT, testdev.Lines(pics.set_line)),
        (testdev.EXIT_PORT, testdev.EXIT_COUNT, testdev.DebugExit(end)),
        (testdev.SHUTDOWN_PORT, 1, testdev.ShutdownPort(end)),
    )
    for port, count, device in devices:
        vm.add_ports(port, count, _Watched(device, changed))
    vm.add_mmio(LAPIC_ADDRESS, LAPIC_SIZE, _Watched(found.lapic, changed))
    vm.add_mmio(testdev.IORAM_ADDRESS, testdev.IORAM_SIZE, testdev.IoRam())
    vm.float_ports(_Floating())
    return found
