"""Lowering: one guest instruction as a sequence of instructions that the fast path has itself.

A YMM register is an XMM register of the fast path and an *upper half*, 16 bytes in memory that
the guest does not know of. A *rule* says with an :class:`Emitter` what an instruction does to
both::

    def per_lane(e):                      # vpaddd ymm0, ymm1, ymm2
        t = e.scratch()
        e.emit("MOVUPS_XMM_XMMM128", t, e.upper(1))
        e.emit("PADDD_XMM_XMMM128", t, e.upper(2))
        e.emit("MOVUPS_XMMM128_XMM", e.upper(0), t)
        e.emit("MOVUPS_XMM_XMMM128", XMM0, XMM1)
        e.emit("PADDD_XMM_XMMM128", XMM0, XMM2)

Whatever an emitted instruction may fault at, it must do before the guest's state has changed: all
accesses to the guest's memory come first, and the last of several stores cannot fault. Scratch
registers are given back by themselves. Flags stay as they are, unless they are the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, TypeAlias

from iced_x86 import (
    Code,
    Encoder,
    Instruction,
    InstructionInfoFactory,
    MemoryOperand,
    MemorySizeExt,
    Mnemonic,
    OpKind,
    Register,
    RegisterExt,
)

from sandbox.decode import Insn, decode

UPPER_OFFSET: Final = 0
"""Upper halves of YMM0-15, 16 bytes each, in the state page."""
SAVED_OFFSET: Final = 0x100
"""Where scratch registers are saved, 16 bytes each: XMM0-15, then RAX-R15."""
COUNT_OFFSET: Final = 0x300
"""RAX while a run is counted."""
SPILL_OFFSET: Final = 0x310
"""256 bytes for a rule to pass values through memory."""

BEFORE: Final = -1
FIRST_GPR: Final = 16
"""The number of RAX among registers that are saved; below are XMM0-15."""
_LOAD, _STORE = "MOVUPS_XMM_XMMM128", "MOVUPS_XMMM128_XMM"
_LOAD_GPR, _STORE_GPR = "MOV_R64_RM64", "MOV_RM64_R64"
_RSP = FIRST_GPR + 4
_LOW_2G = 1 << 31

Rule: TypeAlias = Callable[["Emitter"], None]


@dataclass(frozen=True, slots=True)
class Lowering:
    """How a trapped instruction may be done without its handler. ``on_host``: the host's own CPU
    may do it, if it can."""

    rule: Rule | None
    on_host: bool = False


class NotLoweredError(Exception):
    """A rule does not serve this form of its instruction."""


@dataclass(frozen=True, slots=True)
class Immediate:
    """An immediate operand, to be told from registers, which iced-x86 numbers."""

    value: int


Operand: TypeAlias = int | Immediate | MemoryOperand
"""A register (an iced-x86 ``Register``), an immediate, memory."""


@dataclass(frozen=True, slots=True)
class Step:
    """An instruction of the sequence, and what it takes to stop before it."""

    instruction: Instruction
    index: int
    """Which guest instruction of the run it belongs to, :data:`BEFORE` if it comes before all."""
    first: bool
    """Whether it is the first that belongs to it: the guest's state is whole before it."""
    saved: tuple[int, ...]
    """Registers whose guest value stands in their save slot: XMM0-15, then RAX-R15."""
    lowered: bool


def signed(value: int, bits: int = 64) -> int:
    """``value`` as a signed number of so many bits: what iced-x86 takes as a displacement."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> bits - 1 else value


@cache
def code(name: str) -> int:
    """An iced-x86 ``Code`` by its name."""
    return int(getattr(Code, name))


def number(register: int) -> int:
    """Number of a vector register."""
    return RegisterExt.number(register)  # type: ignore[arg-type]


def xmm(n: int) -> int:
    """XMM register ``n``."""
    return int(Register.XMM0) + n


def is_vector(operand: Operand) -> bool:
    """Whether the operand is an XMM or YMM register."""
    return isinstance(operand, int) and bool(RegisterExt.is_vector_register(operand))  # type: ignore[arg-type]


class Emitter:
    """Collects the steps of a run of guest instructions. ``state``: address of the state page."""

    def __init__(self, state: int) -> None:
        self.steps: list[Step] = []
        self.insn = Instruction()
        """The guest instruction being lowered, decoded at its address."""
        self._state = state
        self._index = BEFORE
        self._first = False
        self._lowered = False
        self._saved: dict[int, None] = {}
        self._mentioned: set[int] = set()
        self._given: set[int] = set()
        self._pointer: tuple[int, int] | None = None
        """A scratch register and the address in it, for the instruction at hand."""
        self._info = InstructionInfoFactory()

    # -- the run ------------------------------------------------------------------------------

    def lower(self, insn: Instruction, rule: Rule) -> None:
        """Append ``insn`` as ``rule`` has it; raises :class:`NotLoweredError` if it cannot."""
        self._begin(insn, lowered=True)
        rule(self)

    def copy(self, insn: Instruction) -> None:
        """Append ``insn`` as it is, with a RIP-relative operand made absolute; raises too."""
        self._begin(insn, lowered=False)
        if insn.is_ip_rel_memory_operand:
            target = insn.ip_rel_memory_address
            insn = insn.copy()
            insn.memory_base, insn.memory_displacement, insn.memory_displ_size = self._far(target)
        self._append(insn)

    def count(self, counter: int) -> None:
        """Add one to the 8 bytes at ``counter``, with the flags as they are."""
        rax = int(Register.RAX)
        there = MemoryOperand(Register.RIP, displ=signed(counter), displ_size=8)
        self._index, self._first, self._lowered = BEFORE, True, True
        self.emit("MOV_RM64_R64", self._own(COUNT_OFFSET), rax)
        self.emit("MOV_R64_RM64", rax, there)
        self.emit("LEA_R64_M", rax, MemoryOperand(Register.RAX, displ=1, displ_size=1))
        self.emit("MOV_RM64_R64", there, rax)
        self.emit("MOV_R64_RM64", rax, self._own(COUNT_OFFSET))

    def finish(self) -> None:
        """Give back the scratch registers: what follows sees the guest's own."""
        self._index += 1
        self._first, self._lowered = True, False
        for register in tuple(self._saved):
            self._give_back(register)

    def mark(self) -> tuple[int, int, dict[int, None]]:
        """Where the run stands, for :meth:`back_to`."""
        return len(self.steps), self._index, dict(self._saved)

    def back_to(self, mark: tuple[int, int, dict[int, None]]) -> None:
        """Drop what was appended since."""
        length, self._index, self._saved = mark
        del self.steps[length:]

    def _begin(self, insn: Instruction, *, lowered: bool) -> None:
        self.insn = insn
        self._index += 1
        self._first, self._lowered = True, lowered
        self._mentioned = self._used_registers(insn, lowered=lowered)
        self._given.clear()
        self._pointer = None
        for register in tuple(self._saved):
            if register in self._mentioned:
                self._give_back(register)

    def _used_registers(self, insn: Instruction, *, lowered: bool) -> set[int]:
        """The registers of an instruction, as they are numbered when saved.

        Of a lowered one, the vector registers among the operands: its rule knows the others.
        """
        used = {item.register for item in self._info.info(insn).used_registers()}
        general = (RegisterExt.full_register(r) for r in used if RegisterExt.is_gpr(r))
        found = {FIRST_GPR + number(r) for r in general}  # R15B has a number of its own, 19
        if lowered and insn.mnemonic == Mnemonic.VZEROUPPER:
            return found
        return found | {number(r) for r in used if RegisterExt.is_vector_register(r)}

    # -- for rules ----------------------------------------------------------------------------

    @property
    def operands(self) -> list[Operand]:
        """The operands of the guest instruction, in Intel order."""
        insn = self.insn
        found: list[Operand] = []
        for at in range(insn.op_count):
            kind = insn.op_kind(at)
            if kind == OpKind.REGISTER:
                found.append(int(insn.op_register(at)))
            elif kind == OpKind.IMMEDIATE8:
                found.append(Immediate(insn.immediate8))
            elif kind == OpKind.MEMORY:
                found.append(self.memory())
            else:
                raise NotLoweredError
        return found

    def memory(self, offset: int = 0) -> MemoryOperand:
        """The guest's memory operand, ``offset`` bytes further on."""
        insn = self.insn
        if insn.is_ip_rel_memory_operand:
            base, target, size = self._far(insn.ip_rel_memory_address + offset)
            return MemoryOperand(base, displ=target, displ_size=size, seg=insn.segment_prefix)
        if offset and RegisterExt.is_gpr32(insn.memory_base):
            raise NotLoweredError  # would wrap at 4 GiB, an operand that begins below does not
        bits = insn.memory_displ_size * 8 if insn.memory_displ_size > 1 else 64
        return MemoryOperand(
            insn.memory_base,
            insn.memory_index,
            insn.memory_index_scale,
            signed(insn.memory_displacement + offset, bits),
            8 if insn.memory_base == Register.NONE else 1,
            False,
            insn.segment_prefix,
        )

    def upper(self, register: int) -> MemoryOperand:
        """The upper half of a YMM register."""
        return self._own(UPPER_OFFSET + 16 * number(register))

    @property
    def spill(self) -> MemoryOperand:
        """Memory of 256 bytes for what the rule likes."""
        return self._own(SPILL_OFFSET)

    def spill_at(self, offset: int) -> MemoryOperand:
        """The same, ``offset`` bytes further on."""
        return self._own(SPILL_OFFSET + offset)

    def spill_chosen(self, offset: int, index: int, scale: int) -> MemoryOperand:
        """The same, ``scale`` times a 64-bit register further on."""
        there = signed(self._state + SPILL_OFFSET + offset)
        return MemoryOperand(Register.NONE, index, scale, there, 8)  # type: ignore[arg-type]

    def scratch_gpr(self) -> int:
        """The number of a general register that the instruction does not use, as scratch."""
        return self._take(range(FIRST_GPR, FIRST_GPR + 16)) - FIRST_GPR

    def scratch(self) -> int:
        """An XMM register that the instruction does not use; its value does not matter."""
        return xmm(self._take(range(FIRST_GPR)))

    def emit(self, name: str, *operands: Operand) -> None:
        """Append an instruction: the name of an iced-x86 ``Code``, and its operands."""
        self._append(_create(code(name), operands))

    def load(self, register: int, source: Operand) -> None:
        """XMM register from another or from 16 bytes of memory."""
        if register != source:
            self.emit(_LOAD, register, source)

    def store(self, target: MemoryOperand, register: int) -> None:
        """An XMM register to 16 bytes of memory."""
        self.emit(_STORE, target, register)

    def zero_upper(self, register: int) -> None:
        """Clear the upper half of a YMM register."""
        at = UPPER_OFFSET + 16 * number(register)
        for offset in (at, at + 8):
            self.emit("MOV_RM64_IMM32", self._own(offset), Immediate(0))

    # -- inside -------------------------------------------------------------------------------

    def _own(self, offset: int) -> MemoryOperand:
        return MemoryOperand(Register.RIP, displ=signed(self._state + offset), displ_size=8)

    def _far(self, address: int) -> tuple[Any, int, int]:
        """Base register, displacement and its size for an absolute address: none if an
        instruction can have it as its displacement, else a scratch register that holds it."""
        if address < _LOW_2G:
            return Register.NONE, address, 8
        if self._pointer is None:
            base = int(Register.RAX) + self._take(range(FIRST_GPR, FIRST_GPR + 16)) - FIRST_GPR
            self._append(Instruction.create_reg_u64(Code.MOV_R64_IMM64, base, address))  # type: ignore[arg-type]
            self._pointer = base, address
        base, there = self._pointer
        return base, address - there, int(address != there)

    def _take(self, candidates: range) -> int:
        """A register, by its number when saved, that the instruction does not use; saved."""
        for n in (*self._saved, *reversed(candidates)):
            if n in candidates and n not in self._mentioned and n not in self._given and n != _RSP:
                break
        else:
            raise NotLoweredError
        self._given.add(n)
        if n not in self._saved:
            name, register = _saving(n, _STORE, _STORE_GPR)
            self.emit(name, self._own(SAVED_OFFSET + 16 * n), register)
            self._saved[n] = None
        return n

    def _append(self, insn: Instruction) -> None:
        saved = tuple(self._saved)
        self.steps.append(Step(insn, self._index, self._first, saved, self._lowered))
        self._first = False

    def _give_back(self, register: int) -> None:
        """Reload a scratch register. The guest's state is whole before and after."""
        first = self._first
        name, target = _saving(register, _LOAD, _LOAD_GPR)
        self.emit(name, target, self._own(SAVED_OFFSET + 16 * register))
        del self._saved[register]
        self._first = first


def spill_memory(e: Emitter) -> None:
    """A rule that does nothing but copy the memory operand to :attr:`Emitter.spill`."""
    size = MemorySizeExt.size(e.insn.memory_size)
    if size in _SMALL:
        t = int(Register.RAX) + e.scratch_gpr()
        name = _SMALL[size]
        e.emit(name, int(RegisterExt.full_register32(t)) if size < 8 else t, e.memory())  # type: ignore[arg-type]
        e.emit(_STORE_GPR, e.spill, t)
        return
    x = e.scratch()
    for offset in range(0, size, 16):
        e.load(x, e.memory(offset))
        e.store(e.spill_at(offset), x)


_SMALL: Final = {
    1: "MOVZX_R32_RM8",
    2: "MOVZX_R32_RM16",
    4: "MOV_R32_RM32",
    8: "MOV_R64_RM64",
}


def can_lower(insn: Instruction, rule: Rule, traps: Callable[[Insn], bool]) -> bool:
    """Whether ``rule`` has instructions for ``insn`` of which none is trapped."""
    somewhere = -_LOW_2G
    emitter, encoder = Emitter(somewhere), Encoder(64)
    try:
        emitter.lower(insn, rule)
        for step in emitter.steps:
            encoder.encode(step.instruction, somewhere & (1 << 64) - 1)
            if traps(decode(encoder.take_buffer(), 64)):
                return False
    except (NotLoweredError, ValueError):  # iced-x86: a displacement that cannot be encoded
        return False
    return True


def _saving(saved: int, vector: str, general: str) -> tuple[str, int]:
    """The instruction that saves or reloads a register, and the register."""
    if saved < FIRST_GPR:
        return vector, xmm(saved)
    return general, int(Register.RAX) + saved - FIRST_GPR


_KINDS: dict[type, str] = {int: "r", Immediate: "i", MemoryOperand: "m"}


def _create(form: Any, operands: tuple[Operand, ...]) -> Instruction:
    kinds = "".join(_KINDS[type(operand)] for operand in operands)
    values: list[Any] = [o.value if isinstance(o, Immediate) else o for o in operands]
    makers: dict[str, Callable[..., Instruction]] = {
        "": Instruction.create,
        "r": Instruction.create_reg,
        "m": Instruction.create_mem,
        "rr": Instruction.create_reg_reg,
        "rm": Instruction.create_reg_mem,
        "mr": Instruction.create_mem_reg,
        "ri": Instruction.create_reg_u32,
        "mi": Instruction.create_mem_u32,
        "rrr": Instruction.create_reg_reg_reg,
        "rri": Instruction.create_reg_reg_u32,
        "rmi": Instruction.create_reg_mem_u32,
        "mri": Instruction.create_mem_reg_u32,
    }
    return makers[kinds](form, *values)
