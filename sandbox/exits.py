"""Why ``Vcpu.run()`` came back: one class per KVM_EXIT_*, read from and written to ``kvm_run``.

An exit that wants an answer (an IO or MMIO read, an MSR access) has a field for it: set it, and
the next ``run()`` gives it to the guest (:meth:`Exit.complete`), as in the kernel.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field, fields
from typing import ClassVar, Self

from sandbox import abi
from sandbox.fetch import insn_fetch_size as insn_fetch_size

PAD = 0x90
"""What the kernel fills ``insn_bytes`` with after ``insn_size`` bytes: NOP, but no code."""
MAX_DATA = 16
"""Words in ``internal.data``."""


class RunPage:
    """The memory that a vCPU shares with its user: ``struct kvm_run``, then the IO data page.

    ``buffer`` is writable and at least ``RUN_MMAP_SIZE`` bytes: our own memory or the real
    kernel's mapping of a vCPU file. ``run`` and ``bytes`` are two views of it.
    """

    def __init__(self, buffer: mmap.mmap | bytearray | memoryview | None = None) -> None:
        buffer = mmap.mmap(-1, abi.RUN_MMAP_SIZE) if buffer is None else buffer
        self.run = abi.kvm_run.from_buffer(buffer)
        self.bytes = memoryview(buffer)


@dataclass(slots=True)
class Exit:
    """Base of all exits. ``member`` is the union member of ``kvm_run`` that holds the fields."""

    exit_reason: ClassVar[int] = -1
    name: ClassVar[str] = "KVM_EXIT"
    member: ClassVar[str] = ""

    def to_run(self, page: RunPage) -> None:
        """Fill ``kvm_run`` with this exit, as the kernel does before it returns to its user."""
        page.run.exit_reason = self.exit_reason
        target = getattr(page.run, self.member, None)
        for f in fields(self):
            setattr(target, f.name, getattr(self, f.name))

    @classmethod
    def from_run(cls, page: RunPage) -> Self:
        """The exit of this class that stands in ``kvm_run``."""
        source = getattr(page.run, cls.member, None)
        return cls(**{f.name: getattr(source, f.name) for f in fields(cls)})

    def complete(self, page: RunPage) -> None:
        """Write the user's answer to ``kvm_run``, where re-entry looks for it.

        ValueError if the answer does not fit what was asked.
        """

    def __str__(self) -> str:
        return self.name


@dataclass(slots=True)
class Unknown(Exit):
    """The hardware left the guest for a reason that KVM does not know."""

    exit_reason: ClassVar[int] = abi.KVM_EXIT_UNKNOWN
    name: ClassVar[str] = "KVM_EXIT_UNKNOWN"
    member: ClassVar[str] = "hw"
    hardware_exit_reason: int = 0

    def __str__(self) -> str:
        return f"{self.name}: hardware exit reason {self.hardware_exit_reason:#x}"


@dataclass(slots=True)
class GuestException(Exit):
    """An exception that the guest has no means to take: vector and error code."""

    exit_reason: ClassVar[int] = abi.KVM_EXIT_EXCEPTION
    name: ClassVar[str] = "KVM_EXIT_EXCEPTION"
    member: ClassVar[str] = "ex"
    exception: int = 0
    error_code: int = 0

    def __str__(self) -> str:
        return f"{self.name}: vector {self.exception}, error code {self.error_code:#x}"


@dataclass(slots=True)
class Hlt(Exit):
    """The guest executed HLT."""

    exit_reason: ClassVar[int] = abi.KVM_EXIT_HLT
    name: ClassVar[str] = "KVM_EXIT_HLT"


@dataclass(slots=True)
class Shutdown(Exit):
    """Triple fault."""

    exit_reason: ClassVar[int] = abi.KVM_EXIT_SHUTDOWN
    name: ClassVar[str] = "KVM_EXIT_SHUTDOWN"

    def __str__(self) -> str:
        return f"{self.name}: triple fault"


@dataclass(slots=True)
class Intr(Exit):
    """The user asked the vCPU to stop: a signal, a timeout, ``immediate_exit``."""

    exit_reason: ClassVar[int] = abi.KVM_EXIT_INTR
    name: ClassVar[str] = "KVM_EXIT_INTR"

    def __str__(self) -> str:
        return f"{self.name}: stopped from outside"


@dataclass(slots=True)
class Io(Exit):
    """IN, OUT, INS or OUTS: ``count`` items of ``size`` bytes at ``port``.

    ``data`` has ``size * count`` bytes. For ``KVM_EXIT_IO_IN`` it is the answer: set it.
    """

    exit_reason: ClassVar[int] = abi.KVM_EXIT_IO
    name: ClassVar[str] = "KVM_EXIT_IO"
    member: ClassVar[str] = "io"
    direction: int
    port: int
    size: int
    count: int = 1
    data: bytes = b""

    def __post_init__(self) -> None:
        self.data = self.data or bytes(self.size * self.count)

    @property
    def is_in(self) -> bool:
        """Whether the guest reads, so that ``data`` is for the user to set."""
        return self.direction == abi.KVM_EXIT_IO_IN

    @property
    def value(self) -> int:
        """``data`` as one little-endian number."""
        return int.from_bytes(self.data, "little")

    @value.setter
    def value(self, value: int) -> None:
        self.data = value.to_bytes(self.size * self.count, "little")

    def to_run(self, page: RunPage) -> None:
        page.run.exit_reason = self.exit_reason
        io = page.run.io
        io.direction, io.size, io.port, io.count = self.direction, self.size, self.port, self.count
        io.data_offset = abi.PIO_OFFSET
        self._write(page)

    @classmethod
    def from_run(cls, page: RunPage) -> Self:
        io = page.run.io
        data = bytes(page.bytes[io.data_offset : io.data_offset + io.size * io.count])
        return cls(io.direction, io.port, io.size, io.count, data)

    def complete(self, page: RunPage) -> None:
        if self.is_in:
            self._write(page)

    def _write(self, page: RunPage) -> None:
        size, offset = self.size * self.count, page.run.io.data_offset
        _check_length(f"IO port {self.port:#x}", self.data, size)
        page.bytes[offset : offset + size] = self.data

    def __str__(self) -> str:
        what = "in from" if self.is_in else "out to"
        times = f"{self.count} x " if self.count != 1 else ""
        data = "" if self.is_in else f": {self.data.hex(' ')}"
        return f"{self.name}: {what} port {self.port:#x}, {times}{_bytes(self.size)}{data}"


@dataclass(slots=True)
class Mmio(Exit):
    """An access to guest physical memory with nothing behind it, at most 8 bytes.

    ``data`` has ``len`` bytes. For a read it is the answer: set it.
    """

    exit_reason: ClassVar[int] = abi.KVM_EXIT_MMIO
    name: ClassVar[str] = "KVM_EXIT_MMIO"
    member: ClassVar[str] = "mmio"
    phys_addr: int
    len: int
    is_write: bool
    data: bytes = b""

    def __post_init__(self) -> None:
        self.data = self.data or bytes(self.len)

    @property
    def value(self) -> int:
        """``data`` as one little-endian number."""
        return int.from_bytes(self.data, "little")

    @value.setter
    def value(self, value: int) -> None:
        self.data = value.to_bytes(self.len, "little")

    def to_run(self, page: RunPage) -> None:
        page.run.exit_reason = self.exit_reason
        mmio = page.run.mmio
        mmio.phys_addr, mmio.len, mmio.is_write = self.phys_addr, self.len, self.is_write
        self._write(page)

    @classmethod
    def from_run(cls, page: RunPage) -> Self:
        mmio = page.run.mmio
        data = bytes(mmio.data)[: mmio.len]
        return cls(mmio.phys_addr, mmio.len, bool(mmio.is_write), data)

    def complete(self, page: RunPage) -> None:
        if not self.is_write:
            self._write(page)

    def _write(self, page: RunPage) -> None:
        _check_length(f"MMIO address {self.phys_addr:#x}", self.data, self.len)
        page.run.mmio.data[: self.len] = self.data

    def __str__(self) -> str:
        what = f"write of {_bytes(self.len)}" if self.is_write else f"read of {_bytes(self.len)}"
        data = f": {self.data.hex(' ')}" if self.is_write else ""
        return f"{self.name}: {what} at {self.phys_addr:#x}{data}"


@dataclass(slots=True)
class Debug(Exit):
    """A breakpoint or single step that the user asked for; ``exception`` is 1 (#DB) or 3 (#BP)."""

    exit_reason: ClassVar[int] = abi.KVM_EXIT_DEBUG
    name: ClassVar[str] = "KVM_EXIT_DEBUG"
    exception: int = 1
    pc: int = 0
    dr6: int = 0
    dr7: int = 0

    def to_run(self, page: RunPage) -> None:
        page.run.exit_reason = self.exit_reason
        arch = page.run.debug.arch
        arch.exception, arch.pc, arch.dr6, arch.dr7 = self.exception, self.pc, self.dr6, self.dr7

    @classmethod
    def from_run(cls, page: RunPage) -> Self:
        arch = page.run.debug.arch
        return cls(arch.exception, arch.pc, arch.dr6, arch.dr7)

    def __str__(self) -> str:
        return f"{self.name}: vector {self.exception} at {self.pc:#x}, dr6 {self.dr6:#x}"


@dataclass(slots=True)
class FailEntry(Exit):
    """The guest could not be entered at all."""

    exit_reason: ClassVar[int] = abi.KVM_EXIT_FAIL_ENTRY
    name: ClassVar[str] = "KVM_EXIT_FAIL_ENTRY"
    member: ClassVar[str] = "fail_entry"
    hardware_entry_failure_reason: int = 0
    cpu: int = 0

    def __str__(self) -> str:
        return f"{self.name}: reason {self.hardware_entry_failure_reason:#x} on CPU {self.cpu}"


@dataclass(slots=True)
class MemoryFault(Exit):
    """A guest physical range that cannot be accessed."""

    exit_reason: ClassVar[int] = abi.KVM_EXIT_MEMORY_FAULT
    name: ClassVar[str] = "KVM_EXIT_MEMORY_FAULT"
    member: ClassVar[str] = "memory_fault"
    flags: int = 0
    gpa: int = 0
    size: int = 0

    def __str__(self) -> str:
        return f"{self.name}: {_bytes(self.size)} at {self.gpa:#x}, flags {self.flags:#x}"


@dataclass(slots=True)
class _Msr(Exit):
    """``reason`` is a KVM_MSR_EXIT_REASON_*. A non-zero ``error`` gives the guest #GP."""

    member: ClassVar[str] = "msr"
    index: int
    data: int = 0
    error: int = 0
    reason: int = abi.KVM_MSR_EXIT_REASON_UNKNOWN

    def complete(self, page: RunPage) -> None:
        page.run.msr.error, page.run.msr.data = self.error, self.data


@dataclass(slots=True)
class X86Rdmsr(_Msr):
    """RDMSR of an MSR that is the user's: set ``data``, or ``error`` to 1."""

    exit_reason: ClassVar[int] = abi.KVM_EXIT_X86_RDMSR
    name: ClassVar[str] = "KVM_EXIT_X86_RDMSR"

    def __str__(self) -> str:
        return f"{self.name}: index {self.index:#x}"


@dataclass(slots=True)
class X86Wrmsr(_Msr):
    """WRMSR of an MSR that is the user's: take ``data``, or set ``error`` to 1."""

    exit_reason: ClassVar[int] = abi.KVM_EXIT_X86_WRMSR
    name: ClassVar[str] = "KVM_EXIT_X86_WRMSR"

    def __str__(self) -> str:
        return f"{self.name}: index {self.index:#x}, data {self.data:#x}"


@dataclass(slots=True)
class InternalError(Exit):
    """KVM gave up on the guest: KVM_INTERNAL_ERROR_* and raw words that explain it.

    ``ndata`` is kept as found, also where it is larger than the 16 words that exist.
    """

    exit_reason: ClassVar[int] = abi.KVM_EXIT_INTERNAL_ERROR
    name: ClassVar[str] = "KVM_EXIT_INTERNAL_ERROR"
    member: ClassVar[str] = "internal"
    suberror: int
    data: tuple[int, ...] = ()
    ndata: int = -1

    def __post_init__(self) -> None:
        self.data = self.data[:MAX_DATA]
        if self.ndata < 0:
            self.ndata = len(self.data)

    def to_run(self, page: RunPage) -> None:
        page.run.exit_reason = self.exit_reason
        internal = page.run.internal
        internal.suberror, internal.ndata = self.suberror, self.ndata
        internal.data[: len(self.data)] = self.data

    @classmethod
    def from_run(cls, page: RunPage) -> Self:
        internal = page.run.internal
        data = tuple(internal.data[: min(internal.ndata, MAX_DATA)])
        return cls(suberror=internal.suberror, data=data, ndata=internal.ndata)

    def __str__(self) -> str:
        return f"{self.name}: suberror {self.suberror}{_words(self.data)}"


@dataclass(slots=True)
class EmulationFailure(InternalError):
    """An instruction that the fast path does not run; RIP points at it.

    The words of ``data`` are kept raw, so that flags and words of later kernels survive; the
    properties read what the flags say is there. ``flags`` without
    ``KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES``: everything after it is debug data.
    """

    suberror: int = abi.KVM_INTERNAL_ERROR_EMULATION

    @classmethod
    def of(cls, insn_bytes: bytes | None, info: tuple[int, ...] = (0,) * 5) -> EmulationFailure:
        """What the kernel reports for an instruction of which it fetched ``insn_bytes``."""
        page = emulation_failure_page(insn_bytes, info)
        return cls(data=struct.unpack_from(f"<{len(page) // 8 - 1}Q", page, 8))

    @property
    def flags(self) -> int:
        """Which fields are valid; 0 where the kernel sent none (``ndata`` 0)."""
        return self.data[0] if self.data else 0

    @property
    def has_bytes(self) -> bool:
        """Whether ``insn_size`` and ``insn_bytes`` are valid."""
        flag = abi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        return len(self.data) >= 3 and bool(self.data[0] & flag)

    @property
    def insn_size(self) -> int:
        """How many bytes were *fetched*, up to the page end or 15: not the instruction's length.

        0 if the flag is clear.
        """
        return self.data[1] & 0xFF if self.has_bytes else 0

    @property
    def insn_bytes(self) -> bytes:
        """All 15 bytes, padding included; empty if the flag is clear."""
        if not self.has_bytes:
            return b""
        return struct.pack("<QQ", self.data[1], self.data[2])[1:]

    @property
    def bytes(self) -> bytes | None:
        """The valid bytes only, or None if the flag is clear."""
        return self.insn_bytes[: self.insn_size] if self.has_bytes else None

    @property
    def debug(self) -> tuple[int, ...]:
        """The words after the fields that we know: no ABI, for people only."""
        return self.data[3:] if self.has_bytes else self.data[1:]

    def __str__(self) -> str:
        code = self.bytes
        what = "no instruction bytes" if code is None else f"instruction bytes {code.hex(' ')}"
        return f"{self.name}: emulation failure, {what}{_words(self.debug)}"


@dataclass(slots=True)
class Other(Exit):
    """An exit reason that has no class here; ``data`` are the 256 bytes of the union."""

    reason: int
    data: bytes = field(repr=False)

    def to_run(self, page: RunPage) -> None:
        page.run.exit_reason = self.reason
        page.bytes[abi.UNION_OFFSET : abi.UNION_OFFSET + len(self.data)] = self.data

    @classmethod
    def from_run(cls, page: RunPage) -> Self:
        union = page.bytes[abi.UNION_OFFSET : abi.UNION_OFFSET + 256]
        return cls(page.run.exit_reason, bytes(union))

    def __str__(self) -> str:
        return f"exit reason {self.reason}, which this program does not know"


_CLASSES: dict[int, type[Exit]] = {
    cls.exit_reason: cls
    for cls in (
        Unknown, GuestException, Io, Debug, Hlt, Mmio, Shutdown, FailEntry, Intr, InternalError,
        X86Rdmsr, X86Wrmsr, MemoryFault,
    )
}  # fmt: skip


def read_exit(page: RunPage) -> Exit:
    """The exit that stands in ``kvm_run``; a reason without a class here is :class:`Other`."""
    run = page.run
    cls = _CLASSES.get(run.exit_reason, Other)
    if cls is InternalError and run.internal.suberror == abi.KVM_INTERNAL_ERROR_EMULATION:
        cls = EmulationFailure
    return cls.from_run(page)


_WITH_BYTES = struct.Struct("<IIQB15s5Q")
_WITHOUT_BYTES = struct.Struct("<IIQ5Q")


def emulation_failure_page(insn_bytes: bytes | None, info: tuple[int, ...] = (0,) * 5) -> bytes:
    """The bytes of an emulation failure from ``UNION_OFFSET`` of ``kvm_run`` on.

    72 bytes (``ndata`` 8) with ``insn_bytes``, the up to 15 bytes that were fetched; 56 bytes
    (``ndata`` 6) with None or nothing. ``info`` are five debug words: the vendor's exit reason,
    info1, info2, intr_info, error_code. As ``prepare_emulation_failure_exit`` in the kernel's
    x86.c fills it. A loop with prebuilt bytes needs two assignments per exit: these, and
    ``exit_reason``.
    """
    if not insn_bytes:
        return _WITHOUT_BYTES.pack(abi.KVM_INTERNAL_ERROR_EMULATION, 6, 0, *info)
    return _WITH_BYTES.pack(
        abi.KVM_INTERNAL_ERROR_EMULATION,
        8,
        abi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
        len(insn_bytes),
        insn_bytes.ljust(15, b"\x90"),
        *info,
    )


def _check_length(where: str, data: bytes, size: int) -> None:
    if len(data) != size:
        raise ValueError(f"{where}: the answer has {_bytes(len(data))}, the guest wants {size}")


def _bytes(count: int) -> str:
    return "1 byte" if count == 1 else f"{count} bytes"


def _words(data: tuple[int, ...]) -> str:
    return f", data {' '.join(f'{word:#x}' for word in data)}" if any(data) else ""
