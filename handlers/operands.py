"""Operands of vector instructions, resolved once per instruction and vCPU.

The decoder says what the operands are (register class, memory size, encoding); this module turns
each into a :class:`Place`: bytes that can be viewed as lanes. A register is a place in the
register file itself; a memory operand is a place in a scratch buffer that is filled before the
operation or written out after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from iced_x86 import EncodingKind, MemorySizeInfo, OpCodeOperandKind, OpKind, RegisterExt

from sandbox.cpu import GP, NM, UD, Cpu, Fault, bind_address
from sandbox.decode import Insn
from sandbox.registers import VECTOR_BYTES, VM

Lanes: TypeAlias = npt.NDArray[Any]
Step: TypeAlias = Callable[[], Any]
"""A no-argument function that does one part of an action."""

_CR0_PE, _CR0_EM, _CR0_TS = 1, 4, 8
_CR4_OSFXSR, _CR4_OSXSAVE = 1 << 9, 1 << 18
_XCR0_SSE_AVX = 6

_REGISTER_OR_MEMORY = frozenset(
    value for name, value in vars(OpCodeOperandKind).items() if name.endswith("_OR_MEM")
)
_IMMEDIATES = frozenset((OpKind.IMMEDIATE8, OpKind.IMMEDIATE8_2ND))

_READS_ALL = frozenset(("insertps", "vinsertps"))
"""Forms that look at a whole register where they would load but a part from memory."""

ALIGNED_MOVES = frozenset(
    f"{v}mov{name}" for v in ("", "v") for name in "aps apd dqa ntps ntpd ntdq ntdqa".split()
)
UNALIGNED_LEGACY = frozenset(
    "movups movupd movdqu lddqu pcmpestri pcmpestrm pcmpistri pcmpistrm"
    " pcmpestri64 pcmpestrm64".split()
)
"""Legacy SSE instructions whose 16-byte memory operand may be misaligned (SDM Vol. 1, 14.9)."""


class Place:
    """``size`` bytes at ``raw[offset:]``: a register, or a scratch buffer for memory."""

    __slots__ = ("is_gpr", "is_memory", "offset", "raw", "size")

    def __init__(
        self,
        raw: memoryview,
        offset: int,
        size: int,
        *,
        is_gpr: bool = False,
        is_memory: bool = False,
    ) -> None:
        self.raw = raw
        self.offset = offset
        self.size = size
        """Bytes that the instruction form looks at."""
        self.is_gpr = is_gpr
        self.is_memory = is_memory

    def lanes(self, dtype: str, count: int | None = None) -> Lanes:
        """The bytes as a writable array of ``dtype``; the first ``count`` lanes, or all."""
        if count is None:
            count = self.size // np.dtype(dtype).itemsize
        return np.frombuffer(self.raw, dtype, count, self.offset)

    def bytes(self, size: int | None = None) -> memoryview:
        """The bytes as a writable view."""
        return self.raw[self.offset : self.offset + (self.size if size is None else size)]


def scratch(size: int = VECTOR_BYTES, used: int | None = None) -> Place:
    """A zeroed place of its own."""
    return Place(memoryview(bytearray(size)), 0, size if used is None else used)


class Form:
    """One instruction on one vCPU: its operands, immediate and encoding.

    ``places`` are the operands without the immediates, in Intel order.
    """

    def __init__(self, cpu: Cpu, insn: Insn) -> None:
        iced = insn.iced
        self.cpu = cpu
        self.insn = insn
        self.op_code = op_code = iced.op_code()
        self.legacy: bool = op_code.encoding == EncodingKind.LEGACY
        self.places: list[Place] = []
        self.memory: Place | None = None
        """The place of the memory operand, if there is one."""
        self.imm = 0
        """The immediate byte (not the register number in bits 7:4 of a ``/is4`` form)."""
        self.has_immediate = False
        self.memory_size: int = MemorySizeInfo(op_code.memory_size).size
        for i in range(iced.op_count):
            kind = iced.op_kind(i)
            if kind in _IMMEDIATES:
                self.imm, self.has_immediate = iced.immediate(i) & 0xFF, True
            elif kind == OpKind.REGISTER:
                declared = op_code.op_kind(i)
                narrow = declared in _REGISTER_OR_MEMORY and insn.mnemonic not in _READS_ALL
                limit = self.memory_size if narrow else 0
                self.places.append(self._register(iced.op_register(i), limit))
            elif kind == OpKind.MEMORY and not iced.is_vsib:
                self.memory = scratch(VECTOR_BYTES, self.memory_size)
                self.memory.is_memory = True
                self.places.append(self.memory)
            else:
                raise UnsupportedFormError
        self.vector_size = max((p.size for p in self.places if not p.is_gpr), default=0)

    @property
    def memory_is_destination(self) -> bool:
        return bool(self.places) and self.places[0] is self.memory

    def _register(self, register: Any, limit: int) -> Place:
        size = RegisterExt.size(register)
        number = RegisterExt.number(register)
        size = min(size, limit) if limit else size
        if RegisterExt.is_vector_register(register):
            return self.vector(number, size)
        if RegisterExt.is_gpr32(register) or RegisterExt.is_gpr64(register):
            return Place(self.cpu.gpr.cast("B"), 8 * number, size, is_gpr=True)
        raise UnsupportedFormError

    def vector(self, number: int, size: int) -> Place:
        """The low ``size`` bytes of vector register ``number``."""
        return Place(self.cpu.vec.raw, VECTOR_BYTES * number, size)

    def alignment(self) -> int:
        """What the memory operand's address must be a multiple of, else #GP(0)."""
        if self.insn.mnemonic in ALIGNED_MOVES:
            return self.memory_size
        if self.legacy and self.memory_size == 16 and self.insn.mnemonic not in UNALIGNED_LEGACY:
            return 16
        return 1

    def bind_address(self) -> Callable[[], int]:
        """A function that gives the memory operand's linear address, its alignment checked."""
        address = bind_address(self.cpu, self.insn)
        low = self.alignment() - 1
        if not low:
            return address

        def aligned() -> int:
            at = address()
            if at & low:
                raise Fault(GP, 0)
            return at

        return aligned

    def bind_load(self) -> Step:
        """A step that reads the memory operand into its place."""
        assert self.memory is not None
        read, address, size = self.cpu.read, self.bind_address(), self.memory.size
        into = self.memory.bytes()

        def load() -> None:
            into[:] = read(address(), size)

        return load

    def bind_guard(self) -> Step:
        """A step that raises #UD or #NM when vector instructions are not enabled."""
        return bind_sse_guard(self.cpu) if self.legacy else bind_avx_guard(self.cpu)


class UnsupportedFormError(Exception):
    """The form has operands that vector operations do not serve (MMX, string, VSIB ...)."""


def bind_sse_guard(cpu: Cpu) -> Step:
    """#UD if CR0.EM or not CR4.OSFXSR; #NM if CR0.TS (SDM Vol. 3, 13.1)."""
    read, controls = cpu.registers.bank.read, cpu.registers.controls

    def check() -> None:
        cr0 = read("cr0")
        if cr0 & _CR0_EM or not read("cr4") & _CR4_OSFXSR:
            raise Fault(UD)
        if cr0 & _CR0_TS:
            raise Fault(NM)

    if controls is None:
        return check

    def guard() -> None:
        if controls[0] & (_CR0_EM | _CR0_TS) or not controls[4] & _CR4_OSFXSR:
            check()

    return guard


def bind_avx_guard(cpu: Cpu) -> Step:
    """#UD in real and virtual-8086 mode or unless the OS enabled AVX; #NM if CR0.TS.

    SDM Vol. 2, 2.4 (exception conditions of VEX instructions).
    """
    registers, controls = cpu.registers, cpu.registers.controls
    read = registers.bank.read

    def check() -> None:
        cr0 = read("cr0")
        enabled = read("cr4") & _CR4_OSXSAVE and registers.xcr0 & _XCR0_SSE_AVX == _XCR0_SSE_AVX
        if not (cr0 & _CR0_PE and enabled) or (may_be_v86 and read("rflags") & VM):
            raise Fault(UD)
        if cr0 & _CR0_TS:
            raise Fault(NM)

    may_be_v86 = cpu.bitness == 16
    if controls is None or may_be_v86:
        return check

    def guard() -> None:
        if (
            controls[0] & (_CR0_PE | _CR0_TS) != _CR0_PE
            or not controls[4] & _CR4_OSXSAVE
            or registers.xcr0 & _XCR0_SSE_AVX != _XCR0_SSE_AVX
        ):
            check()

    return guard
