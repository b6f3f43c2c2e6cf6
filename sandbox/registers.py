"""The register file: one owner for each piece of state, seen by handlers as plain Python.

The hot registers (general purpose, RIP, vector, opmask) are *views*: reading or writing them is a
memory access into the engine's own CPU state or, for what the engine lacks, into pages of ours.
All else goes by name through the engine's :class:`Bank`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy.typing as npt

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
ES, CS, SS, DS, FS, GS = range(6)

GPR_NAMES = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
SEGMENT_NAMES = ("es", "cs", "ss", "ds", "fs", "gs")

CF, PF, AF, ZF, SF, TF, IF, DF, OF = 1, 4, 0x10, 0x40, 0x80, 0x100, 0x200, 0x400, 0x800
IOPL, NT, RF, VM, AC = 0x3000, 0x4000, 0x10000, 0x20000, 0x40000

VECTOR_COUNT = 32
VECTOR_BYTES = 64


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment register with its descriptor cache, fields as in ``struct kvm_segment``."""

    selector: int = 0
    base: int = 0
    limit: int = 0xFFFF
    type: int = 3
    s: int = 1
    dpl: int = 0
    present: int = 1
    avl: int = 0
    l: int = 0  # noqa: E741 - the kernel's name
    db: int = 0
    g: int = 0


@dataclass(frozen=True, slots=True)
class DescriptorTable:
    """GDTR or IDTR: linear base and limit, as in ``struct kvm_dtable``."""

    base: int = 0
    limit: int = 0


class Bank(Protocol):
    """The registers that are not views, by lower-case architectural name.

    ``rflags mxcsr cr0 cr2 cr3 cr4 cr8 efer dr0..dr7 fs_base gs_base kernel_gs_base star lstar
    cstar fmask sysenter_cs sysenter_esp sysenter_eip fpcw fpsw fptag fip fdp fop`` are integers,
    ``st0..st7`` are 80-bit integers (stack-relative), ``mm0..mm7`` are 64-bit integers.
    """

    def read(self, name: str) -> int: ...
    def write(self, name: str, value: int) -> None: ...
    def read_segment(self, name: str) -> Segment: ...
    def write_segment(self, name: str, value: Segment) -> None: ...
    def read_table(self, name: str) -> DescriptorTable: ...
    def write_table(self, name: str, value: DescriptorTable) -> None: ...
    @property
    def cpl(self) -> int: ...
    @property
    def bitness(self) -> int: ...
    def segment_base(self, index: int) -> int: ...


def _nothing() -> None:
    """Nobody wants to know."""


@dataclass(frozen=True, slots=True)
class X87View:
    """The x87 unit in place: items of one each, and eight by physical number."""

    top: memoryview
    status: memoryview
    """Without TOP."""
    control: memoryview
    """To be read only."""
    instruction: memoryview
    """FIP."""
    empty: memoryview
    """1 if the register is empty, else 0."""
    significands: memoryview
    exponents: memoryview
    """With the sign."""


@runtime_checkable
class DirectBank(Protocol):
    """A bank that can give what reads or writes one register, faster than by its name each time."""

    def x87_view(self) -> X87View | None: ...
    def reader(self, name: str) -> Callable[[], int]: ...
    def writer(self, name: str) -> Callable[[int], None]: ...


def reader(bank: Bank, name: str) -> Callable[[], int]:
    """What reads a register of ``bank``."""
    return bank.reader(name) if isinstance(bank, DirectBank) else partial(bank.read, name)


def writer(bank: Bank, name: str) -> Callable[[int], None]:
    """What writes a register of ``bank``."""
    return bank.writer(name) if isinstance(bank, DirectBank) else partial(bank.write, name)


class Vectors:
    """ZMM0-31 as NumPy arrays of shape ``(32, lanes)``, all views of the same 2048 bytes."""

    def __init__(self, raw: memoryview) -> None:
        if len(raw) != VECTOR_COUNT * VECTOR_BYTES:
            raise ValueError(f"vector file has {len(raw)} bytes, not 2048")
        self.raw = raw
        """The bytes: register ``n`` stands at ``raw[64*n : 64*n + 64]``."""
        self._views: dict[str, npt.NDArray[Any]] = {}

    def move(self, raw: memoryview) -> None:
        """Be views of other bytes from now on."""
        self.raw = raw
        self._views.clear()

    def view(self, dtype: str) -> npt.NDArray[Any]:
        """All 32 registers as lanes of ``dtype`` (``u1 u2 u4 u8 i1.. f4 f8``)."""
        found = self._views.get(dtype)
        if found is None:
            import numpy as np  # a guest without vector code need not wait for it

            flat: npt.NDArray[Any] = np.frombuffer(self.raw, dtype=np.dtype(dtype))
            found = self._views[dtype] = flat.reshape(VECTOR_COUNT, -1)
        return found

    def lanes(self, register: int, dtype: str, size: int = VECTOR_BYTES) -> npt.NDArray[Any]:
        """The low ``size`` bytes of one register as lanes of ``dtype``: a writable view."""
        whole = self.view(dtype)
        return whole[register, : size // whole.itemsize]

    def read(self, register: int, size: int = VECTOR_BYTES) -> bytes:
        """The low ``size`` bytes of one register."""
        at = register * VECTOR_BYTES
        return bytes(self.raw[at : at + size])

    def write(self, register: int, data: bytes) -> None:
        """Set the low ``len(data)`` bytes of one register; the rest stays."""
        at = register * VECTOR_BYTES
        self.raw[at : at + len(data)] = data


class Registers:
    """Everything a vCPU holds. ``gpr`` and ``opmask`` are ``memoryview`` of 64-bit items."""

    def __init__(self, gpr: memoryview, rip: memoryview, vectors: memoryview, bank: Bank) -> None:
        self.gpr = gpr
        """RAX RCX RDX RBX RSP RBP RSI RDI R8..R15 (the encoding's order), item assignment."""
        self.rip_view = rip
        """One 64-bit item: RIP."""
        self.vec = Vectors(vectors)
        self.bank = bank
        self._own = (ctypes.c_uint64 * 8)()
        self.opmask = memoryview(self._own).cast("B").cast("Q")
        """k0-k7."""
        self.controls: memoryview | None = None
        """CR0 to CR4 as 64-bit items, if the engine can show them so: to be read only."""
        self.rflags_view = memoryview(bytearray(8)).cast("Q")
        """RFLAGS as one 64-bit item, to be read only; 0 if the engine cannot show it so."""
        self.mxcsr_view: memoryview | None = None
        """MXCSR as one 32-bit item, if the engine can show it so: to be read only."""
        self.images = tuple(v.cast("B") for v in (gpr, rip, vectors, self.opmask))
        """The state that a transaction saves and restores, as bytes: at least this much."""
        self._xcr0 = 1
        self.on_xcr0: Callable[[], None] = _nothing
        """Called after a write of XCR0."""
        self.pkru = 0

    @property
    def xcr0(self) -> int:
        return self._xcr0

    @xcr0.setter
    def xcr0(self, value: int) -> None:
        self._xcr0 = value
        self.on_xcr0()

    @property
    def rip(self) -> int:
        """Address of the next instruction; inside a handler, of the instruction itself."""
        return self.rip_view[0]

    @rip.setter
    def rip(self, value: int) -> None:
        self.rip_view[0] = value & 0xFFFF_FFFF_FFFF_FFFF

    @property
    def rflags(self) -> int:
        return self.bank.read("rflags")

    @rflags.setter
    def rflags(self, value: int) -> None:
        self.bank.write("rflags", value)

    @property
    def mxcsr(self) -> int:
        return self.bank.read("mxcsr")

    @mxcsr.setter
    def mxcsr(self, value: int) -> None:
        self.bank.write("mxcsr", value)
