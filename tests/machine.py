"""A machine with descriptor tables, a TSS and stacks laid out by hand, for system tests."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from sandbox.cpu import Cpu
from sandbox.descriptors import Gate, serialise_gate
from sandbox.events import deliver
from sandbox.registers import RSP, VM, DescriptorTable, Registers, Segment
from tests.doubles import DictBank, FlatMemory

GDT, IDT, TSS, STACK, USER_STACK = 0x10000, 0x10800, 0x11800, 0x13000, 0x13800
HANDLER = 0x15000
CODE0, DATA0, CODE3, DATA3, CODE0_16, CONFORMING0, ABSENT, TSS_SELECTOR = range(8, 72, 8)
CODE2, DATA1 = 72, 80
GDT32 = {
    CODE0: 0x00CF9A000000FFFF, DATA0: 0x00CF92000000FFFF, CODE3: 0x00CFFA000000FFFF,
    DATA3: 0x00CFF2000000FFFF, CODE0_16: 0x000F9A000000FFFF, CONFORMING0: 0x00CF9E000000FFFF,
    ABSENT: 0x00CF1A000000FFFF, TSS_SELECTOR: 0, CODE2: 0x00CFDA000000FFFF,
    DATA1: 0x00CFB2000000FFFF,
}  # fmt: skip
GDT64 = GDT32 | {
    CODE0: 0x00AF9A000000FFFF, CODE3: 0x00AFFA000000FFFF, CONFORMING0: 0x00AF9E000000FFFF,
    CODE0_16: 0x00CF9A000000FFFF, CODE2: 0x00AFDA000000FFFF,
}  # fmt: skip
ALWAYS = 2


class EventBank(DictBank):
    """A bank whose CPL is the RPL of CS (3 in virtual-8086 mode), as the processor has it."""

    @property
    def cpl(self) -> int:
        if self.read("rflags") & VM:
            return 3
        return self.segments["cs"].selector & 3 if self.read("cr0") & 1 else 0

    @cpl.setter
    def cpl(self, value: int) -> None:
        """Derived from CS."""


@dataclass
class Machine:
    cpu: Cpu
    bank: EventBank
    memory: FlatMemory
    wide: bool

    def gate(self, vector: int, **fields: int) -> None:
        gate = replace(Gate(CODE0, HANDLER, 14), **fields)
        size = 16 if self.wide else 8
        self.memory.write(IDT + vector * size, serialise_gate(gate, wide=self.wide))

    def frame(self, count: int, size: int) -> list[int]:
        data = self.memory.read(self.cpu.gpr[RSP], count * size)
        return [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]

    def deliver(self, vector: int, error_code: int | None = None, **options: int) -> None:
        deliver(self.cpu, self.memory, vector, error_code, **options)  # type: ignore[arg-type]


def machine(mode: int, cpl: int = 0, flags: int = ALWAYS) -> Machine:
    """A 16-, 32- or 64-bit machine at CPL 0 or 3, all vectors without a gate."""
    bank, memory = EventBank(), FlatMemory(0x10000, 0x6000)
    gpr, rip = (memoryview(bytearray(n)).cast("Q") for n in (128, 8))
    cpu = Cpu(Registers(gpr, rip, memoryview(bytearray(2048)), bank), memory)
    bank.write("cr0", 0x10 if mode == 16 else 0x11)
    bank.write("efer", 0x500 if mode == 64 else 0)
    bank.write_table("gdtr", DescriptorTable(GDT, 0xFF))
    bank.write_table("idtr", DescriptorTable(IDT, 0xFFF))
    if mode == 16:
        bank.write_table("idtr", DescriptorTable(0x10000, 0x3FF))
        bank.write_segment("cs", Segment(0x1400, 0x14000))
        bank.write_segment("ss", Segment(0x1300, 0x13000))
        gpr[RSP], cpu.registers.rip = 0xABCD0100, 0x55
    else:
        for selector, raw in (GDT64 if mode == 64 else GDT32).items():
            memory.write(GDT + selector, raw.to_bytes(8, "little"))
        long_mode = int(mode == 64)
        code = Segment(CODE3 | 3 if cpl else CODE0, 0, 0xFFFF_FFFF, 11, 1, cpl, 1, 0, long_mode)
        stack = Segment(DATA3 | 3 if cpl else DATA0, 0, 0xFFFF_FFFF, 3, 1, cpl, 1, db=1, g=1)
        bank.write_segment("cs", replace(code, db=1 - long_mode))
        bank.write_segment("ss", stack)
        bank.write_segment("tr", Segment(TSS_SELECTOR, TSS, 0x67, type=11, s=0))
        if mode == 32:
            memory.write(TSS + 4, struct.pack("<IH", STACK, DATA0))
        else:
            memory.write(TSS + 4, struct.pack("<Q", STACK + 5))
            memory.write(TSS + 36, struct.pack("<Q", STACK - 0x100))
        gpr[RSP], cpu.registers.rip = USER_STACK, 0x4000_0123
    bank.write("rflags", flags)
    return Machine(cpu, bank, memory, mode == 64)
