"""Which instructions the host's own CPU can be asked to do, and what they work on.

Of the vector instructions, what is the same on every CPU: no approximations; and what spells its
operands out and has at most one in memory. Between them stand moves and simple arithmetic on
general registers, and jumps: they are done on the way.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache, lru_cache
from typing import Any, Final

from iced_x86 import (
    Code,
    Encoder,
    EncodingKind,
    FlowControl,
    Instruction,
    InstructionInfoFactory,
    MemorySizeExt,
    OpAccess,
    OpKind,
    Register,
    RegisterExt,
    RflagsBits,
)

from sandbox.decode import FEATURE_NAMES, FORM_NAMES, MNEMONIC_NAMES

_registers: Any = RegisterExt  # its functions take numbers too, as instructions give them
_FEATURES: Final = frozenset("avx avx2 fma f16c aes vaes pclmulqdq vpclmulqdq gfni".split())
"""What vector instructions may need, as Linux names it."""
_NOT: Final = (
    "vrcp", "vrsqrt", "vgather", "vpgather", "vmaskmov", "vpmaskmov", "vptest", "vtest", "vcomis",
    "vucomis", "vpcmpestr", "vpcmpistr", "vldmxcsr", "vstmxcsr",
)  # fmt: skip
"""Beginnings of mnemonics: approximations, several memory accesses, flags, hidden operands."""
_ALIGNED: Final = frozenset("vmovaps vmovapd vmovdqa vmovntps vmovntpd vmovntdq vmovntdqa".split())
_NO_MXCSR: Final = (
    "vp", "vmov", "vand", "vor", "vxor", "vshuf", "vblend", "vbroadcast", "vextract", "vinsert",
    "vunpck", "vlddqu", "vaes", "vzero", "vgf",
)  # fmt: skip
"""Beginnings of mnemonics whose operations neither depend on MXCSR nor change it."""
_READS: Final = frozenset(
    (OpAccess.READ, OpAccess.READ_WRITE, OpAccess.COND_READ, OpAccess.READ_COND_WRITE)
)
_WRITES: Final = frozenset((OpAccess.WRITE, OpAccess.READ_WRITE))
_ON_THE_WAY: Final = frozenset(
    "mov movzx movsx movsxd lea add sub and or xor cmp test not neg inc dec shl shr sar nop "
    "endbr64 bswap shlx shrx sarx rorx andn adc sbb".split()
)
_IDLE: Final = frozenset(("nop", "endbr64"))
_ARITHMETIC_FLAGS: Final = (
    RflagsBits.CF | RflagsBits.PF | RflagsBits.AF | RflagsBits.ZF | RflagsBits.SF | RflagsBits.OF
)
HOST_GENERAL: Final = ("r10", "r11", "rcx")
"""What stands for the general registers among the operands, in their order."""
_HOST_GENERAL: Final = {
    1: (Register.R10L, Register.R11L, Register.CL),
    2: (Register.R10W, Register.R11W, Register.CX),
    4: (Register.R10D, Register.R11D, Register.ECX),
    8: (Register.R10, Register.R11, Register.RCX),
}


@dataclass(frozen=True, slots=True)
class Vector:
    """A vector register among the operands."""

    number: int
    whole: bool
    """A YMM register, not an XMM register."""
    read: bool
    written: bool


@dataclass(frozen=True, slots=True)
class General:
    """A general register among the operands. Where less than 32 bits are written, it is read."""

    number: int
    read: bool
    written: bool


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory operand: how many bytes, and what they must be aligned to. 0 bytes: only its
    address matters."""

    size: int
    alignment: int
    written: bool


class Flags(Enum):
    """What an instruction does to the status flags."""

    KEPT = auto()
    USED = auto()
    """Some are read, or some are written and others kept."""
    SET = auto()
    """All are written, whatever they were."""


@dataclass(frozen=True, slots=True)
class Operands:
    """What an instruction works on, and how it is written for the host."""

    vectors: tuple[Vector, ...]
    generals: tuple[General, ...]
    """Each once, no more than there are in :data:`HOST_GENERAL`."""
    memory: Memory | None
    code: bytes
    """The instruction with its memory operand at [rsi] and general registers of the host's."""
    uses_mxcsr: bool
    flags: Flags
    condition: int = 0
    """Of a conditional jump: the last four bits of its opcode, plus 16."""
    is_jump: bool = False
    """Whether the host run ends here, and goes on at the target."""


@lru_cache(maxsize=1)
def host_features() -> frozenset[str]:
    """What the host's CPU has, as Linux names it; empty where it cannot be asked."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return frozenset()
    try:
        with open("/proc/cpuinfo") as lines:
            flags = next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        return frozenset()
    return frozenset(flags.partition(":")[2].split())


@cache
def is_exact(mnemonic: int, encoding: int) -> bool:
    """Whether every CPU does the same at such a vector instruction."""
    name = MNEMONIC_NAMES[mnemonic]
    return encoding == EncodingKind.VEX and name.startswith("v") and not name.startswith(_NOT)


_INFO = InstructionInfoFactory()
_VECTORS: dict[bytes, Operands | None] = {}
_OTHERS: dict[bytes, Operands | None] = {}


def vector_operands(insn: Instruction, raw: bytes) -> Operands | None:
    """What a vector instruction works on; None if the host cannot do it. ``raw``: its bytes."""
    if raw not in _VECTORS:
        _VECTORS[raw] = _analyse_vector(insn)
    return _VECTORS[raw]


def operands_on_the_way(insn: Instruction, raw: bytes) -> Operands | None:
    """What an instruction between vector instructions works on; None if a host run ends there."""
    if raw not in _OTHERS:
        _OTHERS[raw] = _analyse_other(insn)
    return _OTHERS[raw]


def _analyse_vector(insn: Instruction) -> Operands | None:
    if not is_exact(insn.mnemonic, insn.encoding):
        return None
    needed = {FEATURE_NAMES[feature].lower() for feature in insn.cpuid_features()}
    return _analyse(insn) if needed <= _FEATURES & host_features() else None


def _analyse_other(insn: Instruction) -> Operands | None:
    name = MNEMONIC_NAMES[insn.mnemonic]
    if name in _IDLE:
        return Operands((), (), None, b"", False, Flags.KEPT)
    if insn.flow_control == FlowControl.CONDITIONAL_BRANCH and insn.is_jcc_short_or_near:
        return Operands((), (), None, b"", False, Flags.USED, insn.condition_code - 1 | 16)
    if (
        insn.flow_control == FlowControl.UNCONDITIONAL_BRANCH
        and insn.op0_kind == OpKind.NEAR_BRANCH64
    ):
        return Operands((), (), None, b"", False, Flags.KEPT, is_jump=True)
    known = name in _ON_THE_WAY or name.startswith(("set", "cmov"))
    if not known or insn.has_lock_prefix or insn.flow_control != FlowControl.NEXT:
        return None
    needed = {FEATURE_NAMES[feature].lower() for feature in insn.cpuid_features()}
    return _analyse(insn) if needed - host_features() <= _PLAIN else None


_PLAIN: Final = frozenset(("x64", "cmov", *(f"intel{n}86" for n in "80 1 2 3 4".split())))


def _analyse(insn: Instruction) -> Operands | None:
    info, host = _INFO.info(insn), insn.copy()
    vectors: list[Vector] = []
    generals: list[General] = []
    memory: Memory | None = None
    for at in range(insn.op_count):
        kind, access = insn.op_kind(at), info.op_access(at)
        if kind == OpKind.MEMORY:
            memory = _memory(insn, access)
            if memory is None:
                return None
            _put_memory(host)
        elif kind == OpKind.REGISTER:
            register = insn.op_register(at)
            if _registers.is_xmm(register) or _registers.is_ymm(register):
                vectors.append(_vector(register, access))
            elif not _is_general(register):
                return None
            else:
                place = _add(generals, _general(register, access))
                setattr(host, f"op{at}_register", _HOST_GENERAL[_registers.size(register)][place])
        elif kind in _FAR_OPERANDS:
            return None
    code = _encode(host)
    if code is None:
        return None
    uses_mxcsr = bool(vectors) and not MNEMONIC_NAMES[insn.mnemonic].startswith(_NO_MXCSR)
    return Operands(tuple(vectors), tuple(generals), memory, code, uses_mxcsr, _flags(insn))


def _add(generals: list[General], one: General) -> int:
    """Add a register, or what else is done with one that is there; its place."""
    for at, other in enumerate(generals):
        if other.number == one.number:
            generals[at] = General(one.number, one.read or other.read, one.written or other.written)
            return at
    generals.append(one)
    return len(generals) - 1


_FAR_OPERANDS: Final = frozenset(
    (OpKind.NEAR_BRANCH16, OpKind.NEAR_BRANCH32, OpKind.NEAR_BRANCH64, OpKind.FAR_BRANCH16)
)


def _vector(register: int, access: int) -> Vector:
    whole = _registers.is_ymm(register)
    number = _registers.number(register)
    return Vector(number, whole, access in _READS, access in _WRITES)


def _is_general(register: int) -> bool:
    return _registers.is_gpr(register) and register not in _HIGH_BYTES


_HIGH_BYTES: Final = frozenset((Register.AH, Register.BH, Register.CH, Register.DH))


def _general(register: int, access: int) -> General:
    number = _registers.number(_registers.full_register(register))
    written = access in _WRITES or access in _MAY_WRITE
    partly = written and (_registers.size(register) < 4 or access in _MAY_WRITE)
    return General(number, access in _READS or partly or not written, written)


_MAY_WRITE: Final = frozenset((OpAccess.COND_WRITE, OpAccess.READ_COND_WRITE))


def _memory(insn: Instruction, access: int) -> Memory | None:
    """None if the address is not that of 64-bit code, or there are several."""
    registers = insn.memory_base, insn.memory_index
    plain = all(r in (Register.NONE, Register.RIP) or _registers.is_gpr64(r) for r in registers)
    if not plain or insn.is_vsib:
        return None
    if access == OpAccess.NO_MEM_ACCESS:
        return Memory(0, 1, written=False)
    size = MemorySizeExt.size(insn.memory_size)
    if not size or access in _MAY_WRITE or access == OpAccess.READ_WRITE:
        return None
    alignment = size if MNEMONIC_NAMES[insn.mnemonic] in _ALIGNED else 1
    return Memory(size, alignment, access in _WRITES)


def _flags(insn: Instruction) -> Flags:
    if not insn.rflags_read and not insn.rflags_modified:
        return Flags.KEPT
    whole = not insn.rflags_read and insn.rflags_modified == _ARITHMETIC_FLAGS
    return Flags.SET if whole else Flags.USED


def _put_memory(host: Instruction) -> None:
    host.memory_base, host.memory_index, host.memory_index_scale = Register.RSI, Register.NONE, 1
    host.memory_displacement = host.memory_displ_size = 0
    host.segment_prefix = Register.NONE


_ACCUMULATOR: Final = re.compile("([A-Z]+)_(AL|AX|EAX|RAX)_IMM(8|16|32)")
"""Forms for the accumulator alone; there is another for every register."""


def _encode(host: Instruction) -> bytes | None:
    encoder = Encoder(64)
    short = _ACCUMULATOR.fullmatch(FORM_NAMES[host.code])
    if short:
        size = {"AL": 8, "AX": 16, "EAX": 32, "RAX": 64}[short[2]]
        host.code = getattr(Code, f"{short[1]}_RM{size}_IMM{short[3]}")
    try:
        encoder.encode(host, 0)
    except ValueError:  # an operand that has to be the one it is
        return None
    return encoder.take_buffer()
