"""The one narrow door between a handler and the machine.

A handler sees registers, memory and the decoded instruction through :class:`Cpu`, never the
engine. Addresses given to ``read`` and ``write`` are *linear*; :func:`bind_address` turns an
instruction's memory operand into one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from iced_x86 import Register

from sandbox.memory import MmioRead
from sandbox.registers import FS, GS, SS, Registers

if TYPE_CHECKING:
    from sandbox.decode import Insn

DE, DB, NMI, BP, OF_, BR, UD, NM, DF_, TS, NP, SS_, GP, PF_, MF, AC_, MC, XM = (
    0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19,
)  # fmt: skip
"""Exception vectors (SDM Vol. 3, table 6-1)."""

ERROR_CODE_VECTORS = frozenset({DF_, TS, NP, SS_, GP, PF_, AC_, 21})
"""Exceptions that push an error code (SDM Vol. 3, 6.13)."""


SHADOW = "interrupt_shadow"
"""Name of the service that holds the address of an instruction which external interrupts wait for,
set by what comes before it: STI, MOV to SS, POP SS (SDM Vol. 3, 6.8.3)."""


class Fault(Exception):
    """An architectural exception raised by an instruction: delivered at its own RIP.

    ``address`` is what goes into CR2, for #PF.
    """

    def __init__(
        self, vector: int, error_code: int | None = None, address: int | None = None
    ) -> None:
        if error_code is None and vector in ERROR_CODE_VECTORS:
            error_code = 0
        super().__init__(vector, error_code, address)
        self.vector = vector
        self.error_code = error_code
        self.address = address


class VirtualMemory(Protocol):
    """Guest memory through guest paging, with the permissions of the current privilege level.

    All raise :class:`Fault` (#PF, or #GP for a non-canonical address). Accesses may cross pages.
    """

    def read(self, address: int, size: int) -> bytes: ...
    def write(self, address: int, data: bytes) -> None:
        """Write all of ``data`` or, when it faults, nothing."""
        ...

    def fetch(self, address: int, size: int) -> bytes:
        """Read for execution."""
        ...

    def check_write(self, address: int, size: int) -> None:
        """Raise what a write there would raise."""
        ...


_ALL = slice(None)
_T = TypeVar("_T")


class Cpu:
    """One virtual CPU as a handler sees it."""

    def __init__(self, registers: Registers, memory: VirtualMemory) -> None:
        self.registers = registers
        self.memory = memory
        self.gpr = registers.gpr
        """RAX RCX RDX RBX RSP RBP RSI RDI R8..R15: ``cpu.gpr[RAX] = 1``."""
        self.vec = registers.vec
        self.opmask = registers.opmask
        self.read = memory.read
        self.write = memory.write
        self.fetch = memory.fetch
        self.check_write = memory.check_write
        self.services: dict[str, Any] = {}
        """State that a pack keeps per vCPU (the Linux pack its process), by pack name."""
        self._undo: list[Callable[[], None]] = []
        """How to undo what the transaction at hand wrote and is in no copy."""
        self._saved = tuple(memoryview(bytearray(len(image))) for image in registers.images)
        self._copies = tuple(zip(self._saved, registers.images, strict=True))
        self._logged_write = self._write_undoable
        self._plain_write = memory.write

    @property
    def rip(self) -> int:
        """Address of the instruction being emulated."""
        return self.registers.rip

    @property
    def rflags(self) -> int:
        return self.registers.bank.read("rflags")

    @rflags.setter
    def rflags(self, value: int) -> None:
        self._put("rflags", value)

    @property
    def mxcsr(self) -> int:
        return self.registers.bank.read("mxcsr")

    @mxcsr.setter
    def mxcsr(self, value: int) -> None:
        self._put("mxcsr", value)

    def _put(self, name: str, value: int) -> None:
        bank = self.registers.bank
        if self.write is self._logged_write:  # in a transaction
            self._undo.append(partial(bank.write, name, bank.read(name)))
        bank.write(name, value)

    @property
    def cpl(self) -> int:
        """Current privilege level, 0 to 3."""
        return self.registers.bank.cpl

    @property
    def bitness(self) -> int:
        """Size of the running code segment: 16, 32 or 64."""
        return self.registers.bank.bitness

    def read_int(self, address: int, size: int) -> int:
        """Read a little-endian unsigned integer of ``size`` bytes."""
        return int.from_bytes(self.read(address, size), "little")

    def write_int(self, address: int, value: int, size: int) -> None:
        """Write the low ``size`` bytes of ``value``, little-endian."""
        self.write(address, (value & ((1 << 8 * size) - 1)).to_bytes(size, "little"))

    def address(self, insn: Insn) -> int:
        """Linear address of the instruction's memory operand, now."""
        return bind_address(self, insn)()

    def transaction(self, action: Callable[[], _T]) -> Callable[[], _T]:
        """``action``, undone if it raises: what it wrote to GPRs, RIP, RFLAGS, MXCSR, vectors,
        opmasks and memory (RAM; what a device was told stays told)."""
        copies, logged, plain = self._copies[1:], self._logged_write, self._plain_write
        undo, (first, whole) = self._undo, self._copies[0]

        def run() -> _T:
            first[_ALL] = whole
            for saved, image in copies:
                saved[_ALL] = image
            self.write = logged
            try:
                verdict = action()
            except BaseException:
                self._rollback()
                raise
            self.write = plain
            if undo:
                undo.clear()
            return verdict

        return run

    def _rollback(self) -> None:
        self.write = self._plain_write
        for step in reversed(self._undo):
            step()
        self._undo.clear()
        for saved, image in self._copies:
            image[_ALL] = saved

    def _write_undoable(self, address: int, data: bytes) -> None:
        self.memory.check_write(address, len(data))
        with suppress(MmioRead):
            before = self.memory.read(address, len(data))
            self._undo.append(partial(self.memory.write, address, before))
        self.memory.write(address, data)


_GPR64 = {getattr(Register, n): i for i, n in enumerate(
    "RAX RCX RDX RBX RSP RBP RSI RDI R8 R9 R10 R11 R12 R13 R14 R15".split())}  # fmt: skip
_GPR32 = {getattr(Register, n): i for i, n in enumerate(
    "EAX ECX EDX EBX ESP EBP ESI EDI R8D R9D R10D R11D R12D R13D R14D R15D".split())}  # fmt: skip
_GPR16 = {getattr(Register, n): i for i, n in enumerate(
    "AX CX DX BX SP BP SI DI R8W R9W R10W R11W R12W R13W R14W R15W".split())}  # fmt: skip
_SEGMENT = {getattr(Register, n): i for i, n in enumerate("ES CS SS DS FS GS".split())}
_IP_RELATIVE = {Register.RIP: 64, Register.EIP: 32}
_MASK64 = 0xFFFF_FFFF_FFFF_FFFF


def is_canonical(address: int) -> bool:
    """Whether bits 63:47 of a linear address are all alike (4-level paging)."""
    return address < 1 << 47 or _MASK64 - (1 << 47) < address <= _MASK64


def bind_address(cpu: Cpu, insn: Insn, displacement: int = 0) -> Callable[[], int]:
    """Compile the memory operand of ``insn`` to a function that gives its linear address.

    ``displacement`` is added to the offset (for instructions that touch neighbours of their
    operand). Raises #SS(0) for a non-canonical address in the stack segment; other non-canonical
    addresses are the memory access's own #GP.
    """
    return _bind_segment(cpu, insn, bind_offset(cpu, insn, displacement))


def bind_offset(cpu: Cpu, insn: Insn, displacement: int = 0) -> Callable[[], int]:
    """As :func:`bind_address`, but the effective address: the offset within the segment."""
    iced = insn.iced
    base, index, scale = iced.memory_base, iced.memory_index, iced.memory_index_scale
    fixed = iced.memory_displacement + displacement
    if base in _IP_RELATIVE:
        width = _IP_RELATIVE[base]
    elif base in _GPR64 or index in _GPR64:
        width = 64
    elif base in _GPR32 or index in _GPR32:
        width = 32
    elif base in _GPR16 or index in _GPR16:
        width = 16
    else:
        width = {2: 16, 4: 32, 8: 64}.get(iced.memory_displ_size, insn.bitness)
        if iced.memory_displ_size in (0, 1):
            width = insn.bitness
    return _bind_offset(cpu, base, index, scale, fixed, (1 << width) - 1)


def _bind_offset(
    cpu: Cpu, base: int, index: int, scale: int, fixed: int, mask: int
) -> Callable[[], int]:
    gpr, registers = cpu.gpr, cpu.registers
    numbers = {**_GPR64, **_GPR32, **_GPR16}
    if base in _IP_RELATIVE:
        return lambda: (registers.rip + fixed) & mask
    b, i = numbers.get(base), numbers.get(index)
    if i is None:
        if b is None:
            fixed &= mask
            return lambda: fixed
        if fixed == 0 and mask == _MASK64:
            return lambda: gpr[b]
        return lambda: (gpr[b] + fixed) & mask
    wide = mask == _MASK64  # a narrower index register must be cut before it is scaled
    if b is None:
        if wide:
            return lambda: (gpr[i] * scale + fixed) & mask
        return lambda: ((gpr[i] & mask) * scale + fixed) & mask
    return lambda: (gpr[b] + gpr[i] * scale + fixed) & mask


def _bind_segment(cpu: Cpu, insn: Insn, offset: Callable[[], int]) -> Callable[[], int]:
    segment = _SEGMENT.get(insn.iced.memory_segment)
    if segment is None:  # VSIB and other forms without a segment of their own
        return offset
    segment_base = cpu.registers.bank.segment_base
    if insn.bitness == 64:
        if segment in (FS, GS):
            return lambda: (offset() + segment_base(segment)) & _MASK64
        if segment == SS:
            return lambda: _checked_stack(offset())
        return offset
    return lambda: (offset() + segment_base(segment)) & 0xFFFF_FFFF


def _checked_stack(address: int) -> int:
    if not is_canonical(address):
        raise Fault(SS_, 0)
    return address
