"""The small PC: the devices of a machine for bare-metal kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

from sandbox.memory import Device
from sandbox.platform import testdev
from sandbox.platform.clock import Clock, RealClock
from sandbox.platform.controllers import add_controllers
from sandbox.platform.fw_cfg import FW_CFG_COUNT, FW_CFG_PORT, FwCfg
from sandbox.platform.keyboard import (
    COMMAND_PORT,
    CONTROL_A_PORT,
    DATA_PORT,
    RESET_PORT,
    KeyboardController,
    control_a,
    reset_control,
)
from sandbox.platform.rtc import RTC_COUNT, RTC_PORT, Rtc
from sandbox.platform.serial import SERIAL_COUNT, SERIAL_IRQ, SERIAL_PORT, Serial
from sandbox.vm import Vm

DEBUG_PORT = 0xE9


@dataclass(frozen=True)
class PowerOff:
    """The guest switched the machine off, or reset it: the exit status that it asks for."""

    status: int
    was_reset: bool = False

    def __str__(self) -> str:
        return "reset by the guest" if self.was_reset else f"powered off, status {self.status}"


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


def add_pc(vm: Vm, ram: int, out: BinaryIO, clock: Clock | None = None) -> None:
    """Give ``vm``, which has its vCPU, the devices of a PC with ``ram`` bytes of memory.

    ``out`` gets what the guest sends to the serial port. The run ends with :class:`PowerOff` when
    the guest asks for it. The interrupt controllers are ours, unless the VM has the kernel's.
    """
    vcpu = vm.vcpu
    assert vcpu is not None
    set_line = vm.set_irq_line if vm.irqchip else add_controllers(vm, clock or RealClock())

    def end(status: int) -> None:
        vcpu.finish(PowerOff(status))

    def reset() -> None:
        vcpu.finish(PowerOff(0, was_reset=True))

    keyboard = KeyboardController(reset)
    devices: tuple[tuple[int, int, Device], ...] = (
        (SERIAL_PORT, SERIAL_COUNT, Serial(out, lambda high: set_line(SERIAL_IRQ, high))),
        (DEBUG_PORT, 1, _DebugConsole(out)),
        (DATA_PORT, 1, keyboard.data),
        (COMMAND_PORT, 1, keyboard.command),
        (CONTROL_A_PORT, 1, control_a(reset)),
        (RESET_PORT, 1, reset_control(reset)),
        (RTC_PORT, RTC_COUNT, Rtc(ram)),
        (FW_CFG_PORT, FW_CFG_COUNT, FwCfg(ram)),
        (testdev.TEST_PORT, testdev.REGISTER_COUNT, testdev.Register()),
        (testdev.FLUSH_PORT, testdev.REGISTER_COUNT, testdev.Register()),
        (testdev.LINES_PORT, testdev.LINES_COUNT, testdev.Lines(set_line)),
        (testdev.EXIT_PORT, testdev.EXIT_COUNT, testdev.DebugExit(end)),
        (testdev.SHUTDOWN_PORT, 1, testdev.ShutdownPort(end)),
    )
    for port, count, device in devices:
        vm.add_ports(port, count, device)
    vm.add_mmio(testdev.IORAM_ADDRESS, testdev.IORAM_SIZE, testdev.IoRam())
    vm.float_ports(_Floating())
