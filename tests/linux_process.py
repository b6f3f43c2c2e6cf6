"""A Linux process without an engine: real page tables and memory, registers in plain buffers."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from handlers.linux import Files, Process, Root, emulate_syscall
from handlers.linux.memory import MemoryMap
from handlers.linux.process import seeded_bytes
from sandbox.cpu import Cpu
from sandbox.decode import decode
from sandbox.handler import Exit, Resume
from sandbox.memory import PhysicalMemory
from sandbox.paging import AddressSpace, FrameAllocator, PagedMemory, Walker
from sandbox.registers import RAX, Registers
from tests.doubles import DictBank

SYSCALL = decode(bytes.fromhex("0f05"), 64)
ARGUMENTS = (7, 6, 2, 10, 8, 9)
RIP = 0x40_1000
SCRATCH = 0x1000_0000
SCRATCH_SIZE = 0x4000
TABLES = 0x40_0000_0000
BAD = 0x7000_0000_0000
PRIVATE_ANONYMOUS = 0x22


class Machine:
    """Guest RAM, page tables and a ring 3 vCPU that uses them."""

    def __init__(self, ram: int = 64 << 20, tables: int = 1 << 20) -> None:
        self.physical = PhysicalMemory()
        self.physical.add_slot(0, ram)
        self.physical.add_slot(TABLES, tables)
        self.frames = FrameAllocator(self.physical, 0, ram)
        self.bank = DictBank(64, 3)
        self.memory = PagedMemory(Walker(self.bank, self.physical), self.physical)
        self.space = AddressSpace(
            self.physical, FrameAllocator(self.physical, TABLES, tables), self.memory.flush
        )
        self.bank.write("cr3", self.space.root)
        self.bank.write("rflags", 0x246)
        gpr = memoryview(bytearray(128)).cast("Q")
        rip = memoryview(bytearray(8)).cast("Q")
        registers = Registers(gpr, rip, memoryview(bytearray(2048)), self.bank)
        registers.rip = RIP
        self.cpu = Cpu(registers, self.memory)


@dataclass
class Clock:
    """A clock that only sleeping moves."""

    now: int = 1_700_000_000_123_456_789
    slept: list[float] = field(default_factory=list)

    def read(self, _clock: int) -> int:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += int(seconds * 1e9)


class Guest:
    """A process with scratch memory, whose system calls the test makes."""

    def __init__(
        self, files: Files | None = None, ram: int = 64 << 20, tables: int = 1 << 20
    ) -> None:
        self.machine = Machine(ram, tables)
        self.cpu = self.machine.cpu
        self.memory = MemoryMap(self.machine.space, self.machine.frames)
        self.memory.insert(SCRATCH, SCRATCH_SIZE, 3)
        self.memory.brk_start = self.memory.brk = 0x50_0000
        self.clock = Clock()
        self.process = Process(
            self.cpu,
            self.memory,
            files or Files(),
            random_bytes=seeded_bytes(1),
            clock=self.clock.read,
            sleep=self.clock.sleep,
        )
        self.cpu.services["linux"] = self.process
        self.repeats = 0

    def step(self, number: int, *arguments: int) -> Any:
        """Execute the instruction once: the verdict."""
        self.cpu.gpr[RAX] = number
        for register, value in zip(ARGUMENTS, arguments, strict=False):
            self.cpu.gpr[register] = value & 0xFFFF_FFFF_FFFF_FFFF
        return emulate_syscall(self.cpu, SYSCALL)

    def call(self, number: int, *arguments: int) -> int:
        """Make a system call, as often as it wants to be executed again; RAX as signed."""
        for _attempt in range(1000):
            verdict = self.step(number, *arguments)
            if verdict is None:
                value = self.cpu.gpr[RAX]
                return value - (value >> 63 << 64)
            assert verdict == Resume(RIP), verdict
            self.repeats += 1
        raise AssertionError("the call never ends")

    def leave(self, number: int, *arguments: int) -> Any:
        """Make a system call that ends the process: how it ended."""
        verdict = self.step(number, *arguments)
        assert isinstance(verdict, Exit), verdict
        return verdict.exit

    def put(self, data: bytes, address: int = SCRATCH) -> int:
        """Store bytes in scratch memory; where."""
        self.cpu.write(address, data)
        return address

    def path(self, text: str | bytes) -> int:
        """Store a path in the second half of scratch memory; where."""
        return self.put(os.fsencode(text) + b"\0", SCRATCH + SCRATCH_SIZE // 2)

    def get(self, size: int, address: int = SCRATCH) -> bytes:
        return self.cpu.read(address, size)

    def open(self, path: str | bytes, flags: int = 0, mode: int = 0o644) -> int:
        return self.call(2, self.path(path), flags, mode)


def guest_below(directory: Path, *, writable: bool = False) -> Guest:
    """A guest that may see ``directory``."""
    return Guest(Files(Root(directory, writable=writable)))
