"""Which vector instructions the host's own CPU can be asked to do, and what they work on.

Only what is the same on every CPU: no approximations; and only what spells its operands out, has
at most one in memory, and leaves the flags alone.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Final

from iced_x86 import (
    Encoder,
    EncodingKind,
    Instruction,
    InstructionInfoFactory,
    MemorySizeExt,
    OpAccess,
    OpKind,
    Register,
    RegisterExt,
)

from sandbox.decode import FEATURE_NAMES, MNEMONIC_NAMES

_FEATURES: Final = frozenset("avx avx2 fma f16c aes vaes pclmulqdq vpclmulqdq gfni".split())
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
_HOST_GPR: Final = {4: Register.R10D, 8: Register.R10}


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
    """A general register among the operands."""

    number: int
    read: bool
    written: bool


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory operand: how many bytes, and what they must be aligned to."""

    size: int
    alignment: int
    written: bool


@dataclass(frozen=True, slots=True)
class Operands:
    """What an instruction works on, and how it is written for the host."""

    vectors: tuple[Vector, ...]
    general: General | None
    memory: Memory | None
    code: bytes
    """The instruction with its memory operand at [rsi] and its general register R10."""
    uses_mxcsr: bool


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
    """Whether every CPU does the same at such an instruction."""
    name = MNEMONIC_NAMES[mnemonic]
    return encoding == EncodingKind.VEX and name.startswith("v") and not name.startswith(_NOT)


_INFO = InstructionInfoFactory()
_KNOWN: dict[bytes, Operands | None] = {}


def operands_of(insn: Instruction, raw: bytes) -> Operands | None:
    """What the instruction with the bytes ``raw`` works on; None if the host cannot do it."""
    if raw not in _KNOWN:
        _KNOWN[raw] = _analyse(insn) if is_exact(insn.mnemonic, insn.encoding) else None
    return _KNOWN[raw]


def _analyse(insn: Instruction) -> Operands | None:
    needed = {FEATURE_NAMES[feature].lower() for feature in insn.cpuid_features()}
    if not needed <= _FEATURES & host_features():
        return None
    info = _INFO.info(insn)
    host = insn.copy()
    vectors: list[Vector] = []
    general: General | None = None
    memory: Memory | None = None
    for at in range(insn.op_count):
        kind, access = insn.op_kind(at), info.op_access(at)
        reads, writes = access in _READS, access in _WRITES
        if kind == OpKind.MEMORY:
            if not _is_plain(insn):
                return None
            size = MemorySizeExt.size(insn.memory_size)
            alignment = size if MNEMONIC_NAMES[insn.mnemonic] in _ALIGNED else 1
            memory = Memory(size, alignment, writes)
            _put_memory(host)
        elif kind == OpKind.REGISTER:
            register = insn.op_register(at)
            number = RegisterExt.number(register)
            if RegisterExt.is_xmm(register) or RegisterExt.is_ymm(register):
                vectors.append(Vector(number, RegisterExt.is_ymm(register), reads, writes))
            elif general is None and RegisterExt.is_gpr(register):
                general = General(RegisterExt.number(register), reads, writes)
                size = RegisterExt.size(register)
                if size not in _HOST_GPR:
                    return None
                _put_register(host, at, _HOST_GPR[size])
            else:
                return None
        elif kind != OpKind.IMMEDIATE8:
            return None
    uses_mxcsr = not MNEMONIC_NAMES[insn.mnemonic].startswith(_NO_MXCSR)
    return Operands(tuple(vectors), general, memory, _encode(host), uses_mxcsr)


def _is_plain(insn: Instruction) -> bool:
    """Whether the address is that of 64-bit code, and one."""
    if insn.is_vsib or MemorySizeExt.size(insn.memory_size) == 0:
        return False
    registers = insn.memory_base, insn.memory_index
    return all(r in (Register.NONE, Register.RIP) or RegisterExt.is_gpr64(r) for r in registers)


def _put_memory(host: Instruction) -> None:
    host.memory_base, host.memory_index, host.memory_index_scale = Register.RSI, Register.NONE, 1
    host.memory_displacement = host.memory_displ_size = 0
    host.segment_prefix = Register.NONE


def _put_register(host: Instruction, at: int, register: int) -> None:
    setattr(host, f"op{at}_register", register)


def _encode(host: Instruction) -> bytes:
    encoder = Encoder(64)
    encoder.encode(host, 0)
    return encoder.take_buffer()
