"""Which instructions the host's own CPU can be asked to do, and what they work on.

Of the vector instructions, what is the same on every CPU: no approximations; and what spells its
operands out and has at most one in memory. Between them stand moves and simple arithmetic on
general registers, and jumps: they are done on the way.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, replace
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
    Mnemonic,
    OpAccess,
    OpKind,
    Register,
    RegisterExt,
    RflagsBits,
)

from sandbox.decode import FEATURE_NAMES, FORM_NAMES, MNEMONIC_NAMES
from sandbox.engine import host_code as hc
from sandbox.registers import AF, CF, OF, PF, SF, ZF

_registers: Any = RegisterExt  # its functions take numbers too, as instructions give them
_FEATURES: Final = frozenset(
    "avx avx2 fma f16c aes vaes pclmulqdq vpclmulqdq gfni bmi1 bmi2 popcnt movbe ssse3 sse4_2 "
    "sha_ni".split()
)
"""What instructions may need, as Linux names it."""
STATUS_FLAGS: Final = CF | PF | AF | ZF | SF | OF
_NOT: Final = (
    "vrcp", "vrsqrt", "vgather", "vpgather", "vmaskmov", "vpmaskmov", "vpcmpestr", "vldmxcsr",
    "vstmxcsr",
)  # fmt: skip
"""Beginnings of mnemonics: approximations, several memory accesses, hidden operands."""
_LEGACY: Final = frozenset(
    "pshufb pcmpistri pcmpistrm sha1msg1 sha1msg2 sha1nexte sha1rnds4 sha256msg1 sha256msg2 "
    "sha256rnds2".split()
)
"""Instructions of SSE and SHA that the host may do: on integers. They keep upper halves."""
_UNALIGNED: Final = frozenset("pcmpistri pcmpistrm".split())
"""Those of them that take memory operands at any address."""
_HIDDEN_XMM0: Final = {
    "sha256rnds2": (True, False),
    "pcmpistrm": (False, True),
    "vpcmpistrm": (False, True),
}
"""What reads or writes XMM0 without naming it."""
_HIDDEN_ECX: Final = frozenset("pcmpistri vpcmpistri".split())
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
    "endbr64 bswap shlx shrx sarx rorx adc sbb tzcnt popcnt blsr blsi blsmsk pext pdep movbe push "
    "pop".split()
)
"""Allowed instructions that may stand between vector instructions. Not those whose undefined flags
Unicorn derives from the result."""
_DEFINED: Final = {
    **dict.fromkeys("shl shr sar".split(), CF | PF | ZF | SF | OF),
    **dict.fromkeys("blsr blsi blsmsk".split(), CF | ZF | SF | OF),
    "tzcnt": CF | ZF,
}
"""The status flags of those that leave others undefined: these are 0 then, as in Unicorn. (What
logical operations do to AF is undefined too, but all processors clear it.)"""
_INSTEAD_OF_HANDLERS: Final = frozenset("bzhi cmpxchg".split())
"""Instructions on general registers that the host may do although they are trapped."""
_IDLE: Final = frozenset(("nop", "endbr64"))
_ARITHMETIC_FLAGS: Final = (
    RflagsBits.CF | RflagsBits.PF | RflagsBits.AF | RflagsBits.ZF | RflagsBits.SF | RflagsBits.OF
)
_RCX, _HOST_RCX = 1, 2
"""The number of RCX, and its place among the following."""
HOST_GENERAL: Final = ("r10", "r11", "rcx", "rax")
"""What stands for the general registers among the operands, in their order; RAX for itself."""
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


class Kind(Enum):
    """What is special about an instruction."""

    PLAIN = auto()
    IDLE = auto()
    BRANCH = auto()
    """A conditional jump."""
    JUMP = auto()
    CALL = auto()
    RETURN = auto()
    PUSH = auto()
    POP = auto()
    ZERO_UPPERS = auto()
    ZERO_ALL = auto()


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
    kept: int = STATUS_FLAGS
    """Which of the host's flags become the guest's."""
    kind: Kind = Kind.PLAIN
    condition: int = 0
    """Of a conditional jump: the last four bits of its opcode."""

    @property
    def ends(self) -> bool:
        """Whether the host run ends with it."""
        return self.kind in (Kind.JUMP, Kind.CALL, Kind.RETURN)


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
_INSTEAD: dict[bytes, Operands | None] = {}
_ON_WAY: dict[bytes, Operands | None] = {}


def operands_instead(insn: Instruction, raw: bytes) -> Operands | None:
    """What a trapped instruction works on; None if the host cannot do it. ``raw``: its bytes."""
    if raw not in _INSTEAD:
        _INSTEAD[raw] = _analyse_trapped(insn)
    return _INSTEAD[raw]


def operands_on_the_way(insn: Instruction, raw: bytes) -> Operands | None:
    """What an allowed instruction works on; None if a host run ends there."""
    if raw not in _ON_WAY:
        _ON_WAY[raw] = _analyse_allowed(insn)
    return _ON_WAY[raw]


def _analyse_trapped(insn: Instruction) -> Operands | None:
    name = MNEMONIC_NAMES[insn.mnemonic]
    legacy = name in _INSTEAD_OF_HANDLERS or name in _LEGACY
    if not legacy and not is_exact(insn.mnemonic, insn.encoding):
        return None
    if name == "vzeroupper" or name == "vzeroall":
        kind = Kind.ZERO_UPPERS if name == "vzeroupper" else Kind.ZERO_ALL
        return _special(kind) if host_features() >= {"avx"} else None
    return _analyse(insn) if _has_features(insn) else None


def _analyse_allowed(insn: Instruction) -> Operands | None:
    name, near = MNEMONIC_NAMES[insn.mnemonic], insn.op0_kind == OpKind.NEAR_BRANCH64
    if name in _IDLE:
        return _special(Kind.IDLE)
    if insn.flow_control == FlowControl.CONDITIONAL_BRANCH and insn.is_jcc_short_or_near:
        return _special(Kind.BRANCH, Flags.USED, condition=insn.condition_code - 1)
    if insn.flow_control == FlowControl.UNCONDITIONAL_BRANCH and near:
        return _special(Kind.JUMP)
    if insn.flow_control == FlowControl.CALL and near:
        return _special(Kind.CALL, memory=Memory(8, 1, written=True))
    if insn.code == Code.RETNQ:
        return _special(Kind.RETURN, memory=Memory(8, 1, written=False))
    known = name in _ON_THE_WAY or name.startswith(("set", "cmov"))
    if not known or insn.has_lock_prefix or insn.flow_control != FlowControl.NEXT:
        return None
    if insn.is_stack_instruction:
        return _stack(insn)
    return _analyse(insn) if _has_features(insn) else None


def _special(
    kind: Kind, flags: Flags = Flags.KEPT, memory: Memory | None = None, condition: int = 0
) -> Operands:
    return Operands((), (), memory, b"", False, flags, STATUS_FLAGS, kind, condition)


def _stack(insn: Instruction) -> Operands | None:
    """PUSH and POP of a register of 64 bits."""
    if insn.code not in (Code.PUSH_R64, Code.POP_R64) or insn.op0_register == Register.RSP:
        return None
    pushes = insn.code == Code.PUSH_R64
    general = General(_registers.number(insn.op0_register), pushes, not pushes)
    memory, kind = Memory(8, 1, written=pushes), Kind.PUSH if pushes else Kind.POP
    code = hc.STORE_R10 if pushes else hc.LOAD_R10
    return Operands((), (general,), memory, code, False, Flags.KEPT, STATUS_FLAGS, kind)


def _has_features(insn: Instruction) -> bool:
    needed = {FEATURE_NAMES[feature].lower() for feature in insn.cpuid_features()}
    return {_LINUX_NAMES.get(name, name) for name in needed - _PLAIN} <= _FEATURES & host_features()


_LINUX_NAMES: Final = {"sha": "sha_ni"}


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
            elif not _is_general(register) or len(generals) == len(HOST_GENERAL) - 1:
                return None
            else:
                place = _add(generals, _general(register, access))
                setattr(host, f"op{at}_register", _HOST_GENERAL[_registers.size(register)][place])
        elif kind in _FAR_OPERANDS:
            return None
    code = _encode(host)
    if code is None:
        return None
    if insn.mnemonic == Mnemonic.CMPXCHG and not _add_accumulator(generals):
        return None
    name = MNEMONIC_NAMES[insn.mnemonic]
    if name in _HIDDEN_ECX:
        generals += [General(0, read=False, written=False)] * _HOST_RCX
        generals.append(General(_RCX, read=False, written=True))
    if name in _HIDDEN_XMM0:
        vectors.append(Vector(0, False, *_HIDDEN_XMM0[name]))
    if name in _LEGACY:
        vectors = [replace(vector, whole=True, read=True) for vector in vectors]
        if memory and name not in _UNALIGNED:
            memory = replace(memory, alignment=memory.size)
    uses_mxcsr = name.startswith("v") and not name.startswith(_NO_MXCSR)
    kept = _DEFINED.get(MNEMONIC_NAMES[insn.mnemonic], STATUS_FLAGS)
    return Operands(tuple(vectors), tuple(generals), memory, code, uses_mxcsr, _flags(insn), kept)


def _add_accumulator(generals: list[General]) -> bool:
    """Have RAX for itself as the last; False if it is an operand too."""
    if any(general.number == 0 for general in generals):
        return False
    while len(generals) < len(HOST_GENERAL) - 1:
        generals.append(General(0, read=False, written=False))
    generals.append(General(0, read=True, written=True))
    return True


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
    if not size:
        return None
    aligned = insn.has_lock_prefix or MNEMONIC_NAMES[insn.mnemonic] in _ALIGNED
    alignment = size if aligned else 1  # a host may not like locked accesses over two lines
    return Memory(size, alignment, access in _WRITES or access in _MAY_WRITE)


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
