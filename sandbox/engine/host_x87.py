"""x87 instructions of the guest on the host's own unit, in a host run.

Of those that Unicorn has wrong, what every CPU does alike: no transcendental functions, and of
remainders those that take one step. The operands are loaded from the CPU state as 80-bit numbers,
which changes nothing about them; the result, the exception flags and the condition codes go back.

It takes a unit that is at rest: all exceptions masked and none pending, registers in use that are
read, and empty where one is pushed. If it is not, nothing has been done yet, and the handler has
it. So stack faults are its business too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Final

from iced_x86 import (
    Encoder,
    Instruction,
    MemoryOperand,
    MemorySizeExt,
    Mnemonic,
    Register,
    RegisterExt,
)

from sandbox.decode import MNEMONIC_NAMES
from sandbox.engine import host_code as hc
from sandbox.engine.host_operands import Flags, Memory, Operands
from sandbox.engine.unicorn_x87 import X87Layout, x87_layout
from sandbox.lowering import Emitter, Immediate

_EXCEPTIONS: Final = 0x3F
"""IE DE ZE OE UE PE, and their masks in the control word."""
_C1, _CONDITIONS, _ES, _ERROR_SUMMARY = 0x200, 0x4700, 0x80, 0x8080
_CONTROL_BITS, _CONTROL_FIXED = 0x1F3F, 0x40
_TOP_EXPONENT: Final = 0x7FFF
_HOST_CONTROL: Final = -32
"""Offset from RSP, in the red zone, of the host's control word."""

AX, AL, CX = int(Register.AX), int(Register.AL), int(Register.CX)
EAX, ECX, EDI, R10D = map(int, (Register.EAX, Register.ECX, Register.EDI, Register.R10D))
RCX, DI, R11D = int(Register.RCX), int(Register.DI), int(Register.R11D)
ST0, ST1 = int(Register.ST0), int(Register.ST1)


@dataclass(frozen=True, slots=True)
class X87:
    """How the host does an x87 instruction whose memory operand, if it has one, is at RSI."""

    check: bytes
    """Leaves NZ if it cannot be done; changes RAX, RDI, RCX; R10 becomes TOP."""
    code: bytes
    points: bool
    """Whether it leaves its address in FIP, and that of a memory operand in FDP."""


def x87_on_host(insn: Instruction) -> tuple[Operands, X87] | None:
    """How the host does an instruction; None if it cannot."""
    name = MNEMONIC_NAMES[insn.mnemonic]
    layout = x87_layout() if name in _MAKERS else None
    if layout is None:
        return None
    memory = _memory(insn)
    if insn.memory_size and (memory is None or name == "fst" or name == "fstp"):
        return None
    flags = Flags.SET if name in _COMPARISONS else Flags.KEPT
    return Operands((), (), memory, b"", False, flags), _made(name, _index(insn), layout)


def _memory(insn: Instruction) -> Memory | None:
    """None if there is none, or its address is not that of 64-bit code."""
    is_plain: Any = RegisterExt.is_gpr64
    registers = insn.memory_base, insn.memory_index
    size = MemorySizeExt.size(insn.memory_size)
    if not size or not all(r in (Register.NONE, Register.RIP) or is_plain(r) for r in registers):
        return None
    return Memory(size, 1, written=insn.mnemonic != Mnemonic.FLDCW)


def _index(insn: Instruction) -> int:
    """Which ST(i) is named besides ST(0); of instructions with a memory operand, its size."""
    if insn.memory_size:
        return MemorySizeExt.size(insn.memory_size)
    registers = [insn.op_register(n) for n in range(insn.op_count)]
    return max((r - Register.ST0 for r in registers), default=0)


def point(address: int, operand: Sequence[bytes]) -> Iterator[bytes]:
    """FIP becomes ``address``, and FDP what ``operand`` leaves in RSI, which is kept."""
    layout = x87_layout()
    assert layout is not None
    yield hc.set_rax(address)
    yield hc.store_state("rax", layout.instruction)
    if operand:
        yield b"\x48\x89\xf1"  # mov rcx, rsi
        yield from operand
        yield hc.store_state("rsi", layout.operand)
        yield b"\x48\x89\xce"  # mov rsi, rcx


class _Assembler(Emitter):
    """Instructions over the x87 unit in the CPU state, R10 being TOP."""

    def __init__(self, layout: X87Layout) -> None:
        super().__init__(0)
        self.x87 = layout

    def code(self) -> bytes:
        encoder = Encoder(64)
        for step in self.steps:
            encoder.encode(step.instruction, 0)
        return encoder.take_buffer()

    def at(self, offset: int) -> MemoryOperand:
        """In the CPU state."""
        return MemoryOperand(Register.RDX, displ=offset, displ_size=1)

    def number(self, i: int) -> None:
        """EAX becomes the physical number of ST(i). Flags change."""
        self.emit("LEA_R32_M", EAX, MemoryOperand(Register.R10, displ=i, displ_size=1))
        self.emit("AND_RM32_IMM8", EAX, Immediate(7))

    def tag(self) -> MemoryOperand:
        """That of the register whose number RAX is."""
        return MemoryOperand(Register.RDX, Register.RAX, 1, self.x87.tags, 1)

    def register(self, i: int, offset: int = 0) -> MemoryOperand:
        """Bytes of ST(i), its place in RAX. Flags change."""
        self.number(i)
        self.emit("SHL_RM32_IMM8", EAX, Immediate(4))
        return self.same_register(offset)

    def same_register(self, offset: int) -> MemoryOperand:
        """Further bytes of the register whose place is in RAX."""
        return MemoryOperand(Register.RDX, Register.RAX, 1, self.x87.registers + offset, 1)

    def push(self, i: int) -> None:
        """Push ST(i) onto the host's stack."""
        self.emit("FLD_M80FP", self.register(i))

    def take(self, i: int) -> None:
        """Pop ST(i) from the host's stack, in use from now on."""
        self.number(i)
        self.emit("MOV_RM8_IMM8", self.tag(), Immediate(0))
        self.emit("SHL_RM32_IMM8", EAX, Immediate(4))
        self.emit("FSTP_M80FP", self.same_register(0))

    def pop(self) -> None:
        self.number(0)
        self.emit("MOV_RM8_IMM8", self.tag(), Immediate(1))
        self.turn(1)

    def turn(self, by: int) -> None:
        """Move TOP."""
        self.number(by)
        self.emit("MOV_RM32_R32", self.at(self.x87.top), EAX)

    def clear_status(self, bits: int) -> None:
        mask = Immediate(~bits & 0xFFFF)
        self.emit("AND_RM16_IMM16", self.at(self.x87.status), mask)

    def take_status(self, bits: int) -> None:
        """Add these bits of the host's status word, the others have been cleared."""
        self.emit("FNSTSW_AX", AX)
        self.emit("AND_EAX_IMM32", EAX, Immediate(bits))
        self.emit("OR_RM16_R16", self.at(self.x87.status), AX)

    def check(self, used: tuple[int, ...], *, pushes: bool) -> None:
        """NZ, and EDI other than 0, if the unit is not at rest, a register of ``used`` is empty,
        or there is no room to push."""
        x87 = self.x87
        self.emit("MOVZX_R32_RM16", EDI, self.at(x87.control))
        self.emit("NOT_RM32", EDI)
        self.emit("AND_RM32_IMM8", EDI, Immediate(_EXCEPTIONS))
        self.emit("MOVZX_R32_RM8", EAX, self.at(x87.status))
        self.emit("AND_EAX_IMM32", EAX, Immediate(_ES))
        self.emit("OR_R32_RM32", EDI, EAX)
        self.emit("MOV_R32_RM32", R10D, self.at(x87.top))
        for i in used:
            self.number(i)
            self.emit("MOVZX_R32_RM8", EAX, self.tag())
            self.emit("OR_R32_RM32", EDI, EAX)
        if pushes:
            self.number(7)
            self.emit("MOVZX_R32_RM8", EAX, self.tag())
            self.emit("XOR_RM32_IMM8", EAX, Immediate(1))
            self.emit("OR_R32_RM32", EDI, EAX)

    def check_normal(self, i: int) -> None:
        """The same unless ST(i) is a normal number. ECX becomes its exponent."""
        self.emit("MOVZX_R32_RM16", ECX, self.register(i, 8))
        self.emit("MOVZX_R32_RM8", EAX, self.same_register(7))
        self.emit("NOT_RM32", EAX)
        self.emit("AND_EAX_IMM32", EAX, Immediate(0x80))
        self.emit("OR_R32_RM32", EDI, EAX)  # the integer bit
        self.emit("AND_RM32_IMM32", ECX, Immediate(_TOP_EXPONENT))
        self.emit("LEA_R32_M", EAX, MemoryOperand(Register.RCX, displ=-1, displ_size=1))
        self.emit("CMP_EAX_IMM32", EAX, Immediate(_TOP_EXPONENT - 1))
        self.emit("SETAE_RM8", AL)
        self.emit("MOVZX_R32_RM8", EAX, AL)
        self.emit("OR_R32_RM32", EDI, EAX)

    def check_near(self) -> None:
        """The same unless the quotient of ST(0) and ST(1) has less than 64 bits, and both are
        normal."""
        self.check_normal(1)
        self.emit("MOV_R32_RM32", R11D, ECX)
        self.check_normal(0)
        self.emit("SUB_R32_RM32", ECX, R11D)
        self.emit("CMP_RM32_IMM8", ECX, Immediate(63))
        self.emit("SETGE_RM8", AL)
        self.emit("MOVZX_R32_RM8", EAX, AL)
        self.emit("OR_R32_RM32", EDI, EAX)


@dataclass(frozen=True, slots=True)
class _Operation:
    """What is loaded, in this order; the instruction; where its results go, from the host's ST(0)
    on, by the number of the register before."""

    loads: tuple[int, ...]
    form: str
    stores: tuple[int, ...]
    pushes: bool = False
    is_remainder: bool = False
    """Whether it is only done where every CPU reduces all at once."""


_OPERATIONS: Final = {
    "fscale": _Operation((1, 0), "FSCALE", (0,)),
    "fprem": _Operation((1, 0), "FPREM", (0,), is_remainder=True),
    "fprem1": _Operation((1, 0), "FPREM1", (0,), is_remainder=True),
    "fxtract": _Operation((0,), "FXTRACT", (7, 0), pushes=True),
    **{
        name: _Operation((), name.upper(), (7,), pushes=True)
        for name in "fld1 fldz fldpi fldl2e fldl2t fldlg2 fldln2".split()
    },
}


def _operation(name: str) -> Callable[[_Assembler, _Assembler, int], None]:
    operation = _OPERATIONS[name]

    def make(check: _Assembler, e: _Assembler, _index: int) -> None:
        check.check(operation.loads, pushes=operation.pushes)
        if operation.is_remainder:
            check.check_near()
        conditions = _CONDITIONS if operation.is_remainder else _C1
        host_control = MemoryOperand(Register.RSP, displ=_HOST_CONTROL, displ_size=1)
        e.emit("FNSTCW_M2BYTE", host_control)
        e.emit("FLDCW_M2BYTE", e.at(e.x87.control))
        e.emit("FNCLEX")
        for i in operation.loads:
            e.push(i)
        e.emit(operation.form)
        e.clear_status(conditions)
        e.take_status(conditions | _EXCEPTIONS)
        for i in operation.stores:
            e.take(i)
        for _ in range(len(operation.loads) + operation.pushes - len(operation.stores)):
            e.emit("FSTP_STI", ST0)
        if operation.pushes:
            e.turn(7)
        e.emit("FLDCW_M2BYTE", host_control)

    return make


def _store(check: _Assembler, e: _Assembler, i: int, *, pops: bool) -> None:
    """FST ST(i) and FSTP ST(i): moves, whatever the number is."""
    check.check((0,), pushes=False)
    e.emit("MOV_R64_RM64", RCX, e.register(0))
    e.emit("MOVZX_R32_RM16", EDI, e.same_register(8))
    e.number(i)
    e.emit("MOV_RM8_IMM8", e.tag(), Immediate(0))
    e.emit("SHL_RM32_IMM8", EAX, Immediate(4))
    e.emit("MOV_RM64_R64", e.same_register(0), RCX)
    e.emit("MOV_RM16_R16", e.same_register(8), DI)
    e.clear_status(_C1)
    if pops:
        e.pop()


def _compare(check: _Assembler, e: _Assembler, i: int, *, form: str, pops: bool) -> None:
    """The FCOMI family: the host's flags are the guest's then. C1 stays."""
    check.check((0, i), pushes=False)
    e.emit("FNCLEX")
    e.push(i)
    e.push(0)
    e.emit(form, ST0, ST1)
    e.emit("FSTP_STI", ST0)
    e.emit("LAHF")
    e.emit("MOV_R32_RM32", ECX, EAX)
    e.take_status(_EXCEPTIONS)
    if pops:
        e.pop()
    e.emit("MOV_R32_RM32", EAX, ECX)
    e.emit("SAHF")  # OF is 0 since AND


def _truncate(check: _Assembler, e: _Assembler, size: int) -> None:
    """FISTTP."""
    check.check((0,), pushes=False)
    e.emit("FNCLEX")
    e.push(0)
    e.emit(f"FISTTP_M{8 * size}INT", MemoryOperand(Register.RSI))
    e.clear_status(_C1)
    e.take_status(_C1 | _EXCEPTIONS)
    e.pop()


def _load_control(check: _Assembler, e: _Assembler, _size: int) -> None:
    """FLDCW, if that masks all exceptions too."""
    check.check((), pushes=False)
    check.emit("MOVZX_R32_RM16", ECX, MemoryOperand(Register.RSI))
    check.emit("MOV_R32_RM32", EAX, ECX)
    check.emit("NOT_RM32", EAX)
    check.emit("AND_EAX_IMM32", EAX, Immediate(_EXCEPTIONS))
    check.emit("OR_R32_RM32", EDI, EAX)
    x87 = e.x87
    e.emit("AND_RM32_IMM32", ECX, Immediate(_CONTROL_BITS))
    e.emit("OR_RM32_IMM8", ECX, Immediate(_CONTROL_FIXED))
    e.emit("MOV_RM16_R16", e.at(x87.control), CX)
    e.clear_status(_ERROR_SUMMARY)
    e.emit("MOV_R32_RM32", EAX, ECX)
    e.emit("SHR_RM32_IMM8", EAX, Immediate(10))
    e.emit("AND_RM32_IMM8", EAX, Immediate(3))
    e.emit("MOV_RM8_R8", e.at(x87.rounding), AL)
    e.emit("SHR_RM32_IMM8", ECX, Immediate(8))
    e.emit("AND_RM32_IMM8", ECX, Immediate(3))
    e.emit("SHL_RM32_IMM8", ECX, Immediate(3))
    e.emit("MOV_R32_IMM32", EAX, Immediate(int.from_bytes(x87.precisions, "little")))
    e.emit("SHR_RM32_CL", EAX, int(Register.CL))
    e.emit("MOV_RM8_R8", e.at(x87.precision), AL)


_COMPARISONS: Final = {
    "fcomi": partial(_compare, form="FCOMIP_ST0_STI", pops=False),
    "fcomip": partial(_compare, form="FCOMIP_ST0_STI", pops=True),
    "fucomi": partial(_compare, form="FUCOMIP_ST0_STI", pops=False),
    "fucomip": partial(_compare, form="FUCOMIP_ST0_STI", pops=True),
}
_MAKERS: Final[dict[str, Callable[[_Assembler, _Assembler, int], None]]] = {
    **_COMPARISONS,
    **{name: _operation(name) for name in _OPERATIONS},
    "fst": partial(_store, pops=False),
    "fstp": partial(_store, pops=True),
    "fisttp": _truncate,
    "fldcw": _load_control,
}


@cache
def _made(name: str, index: int, layout: X87Layout) -> X87:
    check, code = _Assembler(layout), _Assembler(layout)
    _MAKERS[name](check, code, index)
    return X87(check.code(), code.code(), name != "fldcw")
