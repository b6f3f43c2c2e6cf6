"""Stand-ins for the engine and the paged memory, so that handlers can be tested alone."""

from __future__ import annotations

from sandbox.cpu import PF_, Cpu, Fault
from sandbox.registers import SEGMENT_NAMES, DescriptorTable, Registers, Segment


class DictBank:
    """A :class:`sandbox.registers.Bank` over dictionaries."""

    def __init__(self, bitness: int = 64, cpl: int = 0) -> None:
        self.values: dict[str, int] = {"rflags": 2, "mxcsr": 0x1F80, "cr0": 0x80000013}
        self.values |= {"cr4": 0x40600, "efer": 0xD00, "fpcw": 0x37F, "fptag": 0xFFFF}
        self.segments = {n: Segment() for n in (*SEGMENT_NAMES, "tr", "ldtr")}
        self.tables = {n: DescriptorTable() for n in ("gdtr", "idtr")}
        self.cpl = cpl
        self.bitness = bitness

    def read(self, name: str) -> int:
        return self.values.get(name, 0)

    def write(self, name: str, value: int) -> None:
        self.values[name] = value

    def read_segment(self, name: str) -> Segment:
        return self.segments[name]

    def write_segment(self, name: str, value: Segment) -> None:
        self.segments[name] = value

    def read_table(self, name: str) -> DescriptorTable:
        return self.tables[name]

    def write_table(self, name: str, value: DescriptorTable) -> None:
        self.tables[name] = value

    def segment_base(self, index: int) -> int:
        return self.segments[SEGMENT_NAMES[index]].base


class FlatMemory:
    """Memory at ``base``, readable and writable but for ``readonly``; all else is a #PF."""

    def __init__(self, base: int = 0x10000, size: int = 0x4000) -> None:
        self.base = base
        self.data = bytearray(size)
        self.readonly: range = range(0)

    def _at(self, address: int, size: int, error_code: int) -> int:
        at = address - self.base
        if at < 0 or at + size > len(self.data):
            missing = address if at < 0 else max(address, self.base + len(self.data))
            raise Fault(PF_, error_code, missing)
        return at

    def read(self, address: int, size: int) -> bytes:
        at = self._at(address, size, 0)
        return bytes(self.data[at : at + size])

    def fetch(self, address: int, size: int) -> bytes:
        at = self._at(address, size, 0x10)
        return bytes(self.data[at : at + size])

    def check_write(self, address: int, size: int) -> None:
        self._at(address, size, 2)
        if address < self.readonly.stop and address + size > self.readonly.start:
            raise Fault(PF_, 3, max(address, self.readonly.start))

    def write(self, address: int, data: bytes) -> None:
        self.check_write(address, len(data))
        at = address - self.base
        self.data[at : at + len(data)] = data


def make_cpu(bitness: int = 64, cpl: int = 0, memory: FlatMemory | None = None) -> Cpu:
    """A vCPU over plain buffers, RIP at 0x10000, all registers zero."""
    gpr = memoryview(bytearray(128)).cast("Q")
    rip = memoryview(bytearray(8)).cast("Q")
    vectors = memoryview(bytearray(2048))
    registers = Registers(gpr, rip, vectors, DictBank(bitness, cpl))
    registers.rip = 0x10000
    return Cpu(registers, memory or FlatMemory())
