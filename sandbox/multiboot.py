"""Multiboot kernels: a PC that is about to run one.

Source: the Multiboot Specification, version 0.6.96 (multiboot 1), 3.2 machine state and 3.3 boot
information. :mod:`guests.multiboot` reads the images.
"""

from __future__ import annotations

import struct
from typing import BinaryIO, Final

from guests.multiboot import MultibootImage
from sandbox.boot import CODE_32, CR0_ET, CR0_PE, DATA, Machine, reset
from sandbox.errors import GuestImageError
from sandbox.memory import PAGE_MASK, PAGE_SIZE
from sandbox.platform.clock import Clock
from sandbox.platform.pc import PowerOff, add_pc
from sandbox.platform.serial import SERIAL_PORT
from sandbox.registers import RAX, RBX, DescriptorTable, Segment
from sandbox.vm import Vm

BOOT_MAGIC: Final = 0x2BAD_B002
"""In EAX when the kernel starts."""
DEFAULT_RAM: Final = 128 << 20
MIN_RAM: Final = 2 << 20
MAX_RAM: Final = 0xC000_0000
"""RAM ends where the holes for devices begin."""
LOW_END: Final = 0x9_FC00
"""End of conventional memory."""
HIGH: Final = 1 << 20
LOADER_NAME: Final = b"unicorn-fallback"

_INFO = struct.Struct("<11I")
_MMAP_ENTRY = struct.Struct("<IQQI")
_INFO_BYTES = 116
_MAP_AT, _LOADER_AT = 44, 64
_HAS_MEMORY, _HAS_COMMAND_LINE, _HAS_MODULES, _HAS_MAP, _HAS_NAME = 1, 4, 8, 0x40, 0x200
_AVAILABLE = 1
_BIOS_DATA, _BIOS_DATA_BYTES = 0x400, 0x100
_INFO_PLACES: Final = (0x9_0000, 0x1000)
"""Where the boot information goes, if the image leaves room there; else behind the image."""


def boot_multiboot(
    vm: Vm,
    image: MultibootImage,
    out: BinaryIO,
    command_line: str = "",
    *,
    ram: int = DEFAULT_RAM,
    clock: Clock | None = None,
) -> Machine:
    """A PC with ``ram`` bytes (a multiple of 4096) that is about to run ``image``: 32-bit
    protected mode, flat segments, paging and interrupts off, the boot information in EBX.

    ``out`` gets what the kernel sends to the serial port. ``command_line`` is all of it, the
    kernel's name included.
    """
    if ram % PAGE_SIZE or not MIN_RAM <= ram <= MAX_RAM:
        raise GuestImageError(
            f"{ram:#x} bytes of RAM: want a multiple of {PAGE_SIZE:#x}, "
            f"{MIN_RAM >> 20} MiB to {MAX_RAM >> 20} MiB"
        )
    if image.end > ram:
        raise GuestImageError(
            f"{image.name}: its segments end at {image.end:#x}, but there are {ram:#x} bytes of "
            "RAM; give it more (--memory)"
        )
    vm.add_memory(0, ram)
    vm.memory.load(_BIOS_DATA, _bios_data())
    for segment in image.segments:
        vm.memory.load(segment.address, segment.data)
    at, info = _boot_information(image, command_line.encode("utf-8", "surrogateescape"), ram)
    vm.memory.load(at, info)
    machine = Machine(vm, reset(vm), status_of=_status_of)
    add_pc(vm, ram, out, clock)
    _start(machine, image.entry, at)
    return machine


def _status_of(left: object) -> tuple[int, str] | None:
    if not isinstance(left, PowerOff):
        return None
    return left.status, "the guest reset the machine" if left.was_reset else ""


def _bios_data() -> bytes:
    """What kernels look up in the BIOS data area: COM1, the EBDA's segment, conventional memory."""
    area = bytearray(_BIOS_DATA_BYTES)
    struct.pack_into("<H", area, 0, SERIAL_PORT)
    struct.pack_into("<H", area, 0x0E, LOW_END >> 4)
    struct.pack_into("<H", area, 0x13, LOW_END >> 10)
    return bytes(area)


def _boot_information(image: MultibootImage, line: bytes, ram: int) -> tuple[int, bytes]:
    """The boot information, with what it points to behind it: address and bytes."""
    memory_map = b"".join(
        _MMAP_ENTRY.pack(_MMAP_ENTRY.size - 4, start, size, _AVAILABLE)
        for start, size in ((0, LOW_END), (HIGH, ram - HIGH))
    )
    texts = line + b"\0" + LOADER_NAME + b"\0"
    whole = _INFO_BYTES + len(memory_map) + len(texts)
    at = _place(image, whole, ram)
    map_at = at + _INFO_BYTES
    line_at = map_at + len(memory_map)
    flags = _HAS_MEMORY | _HAS_COMMAND_LINE | _HAS_MODULES | _HAS_MAP | _HAS_NAME
    info = bytearray(_INFO_BYTES)
    _INFO.pack_into(info, 0, flags, LOW_END >> 10, (ram - HIGH) >> 10, 0, line_at, 0, 0, 0, 0, 0, 0)
    struct.pack_into("<II", info, _MAP_AT, len(memory_map), map_at)
    struct.pack_into("<I", info, _LOADER_AT, line_at + len(line) + 1)
    return at, bytes(info) + memory_map + texts


def _place(image: MultibootImage, size: int, ram: int) -> int:
    """Where ``size`` bytes do not touch the image."""
    for at in (*_INFO_PLACES, image.end + PAGE_MASK & ~PAGE_MASK):
        free = all(
            at + size <= s.address or s.address + s.memory_size <= at for s in image.segments
        )
        if free and at + size <= (LOW_END if at < LOW_END else ram):
            return at
    raise GuestImageError(
        f"{image.name}: no room for {size} bytes of boot information beside the image"
    )


def _start(machine: Machine, entry: int, info: int) -> None:
    """The machine state of section 3.2. ESP, GDTR and IDTR are the kernel's to set."""
    registers = machine.vcpu.registers
    bank = machine.vm.engine.bank
    bank.leave_long_mode()
    bank.write("cr4", 0)
    bank.write("cr0", CR0_PE | CR0_ET)
    bank.write_segment("cs", CODE_32)
    for name in ("ss", "ds", "es", "fs", "gs"):
        bank.write_segment(name, DATA)
    bank.write_segment("tr", Segment(0, 0, 0xFFFF, type=11, s=0, present=1))
    bank.write_segment("ldtr", Segment(0, 0, 0xFFFF, type=2, s=0, present=1))
    bank.write_table("gdtr", DescriptorTable(0, 0))
    bank.write_table("idtr", DescriptorTable(0, 0))
    registers.gpr[RAX], registers.gpr[RBX] = BOOT_MAGIC, info
    registers.rip = entry
