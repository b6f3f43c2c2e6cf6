"""Instructions made from iced-x86 forms, not from text: all operands, no assembler.

``encode`` builds one encoding of a form, ``encodings`` a representative set (register aliasing,
high registers, memory operands, immediates, masks, broadcast, rounding), ``forms_of`` lists the
forms of a mnemonic. 64-bit mode.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, cycle
from typing import Any, cast

from iced_x86 import (
    Code,
    CodeSize,
    CpuidFeature,
    Encoder,
    EncodingKind,
    Instruction,
    OpCodeInfo,
    OpCodeOperandKind,
    OpKind,
    Register,
    RoundingControl,
)

from sandbox.decode import FEATURE_NAMES, FORM_NAMES, MNEMONIC_NAMES, DecodeError, Insn, decode
from sandbox.native import CODE, DATA


@dataclass(frozen=True, slots=True)
class Memory:
    """A memory operand: register numbers (``index`` is a vector number in VSIB forms).

    ``absolute`` is the address in forms that have nothing else (MOV AL, moffs8), and, if
    ``relative``, of a RIP-relative operand of an instruction that stands at ``native.CODE``.
    """

    base: int | None = 6
    index: int | None = None
    scale: int = 1
    displacement: int = 0
    absolute: int = DATA + 0x1000
    relative: bool = False
    width: int = 64
    """Address size: 64, or 32 (prefix 67)."""
    segment: int = Register.NONE
    """Segment override."""


SIMPLE = Memory()
MEMORIES = (
    SIMPLE,
    Memory(13, displacement=0x40),
    Memory(7, 12, 4, -0x1234),
    Memory(relative=True),
    Memory(7, 12, 2, 0x10, width=32),
    Memory(segment=Register.GS),
)


_VSIB_MEMORIES = (
    Memory(6, 4),
    Memory(13, 12, 2, 0x40),
    Memory(7, 7, 8, -0x1234),
    Memory(6, 5, 4, width=32),
    Memory(6, 4, segment=Register.GS),
)


@dataclass(frozen=True, slots=True)
class Evex:
    """What only EVEX has: mask register (0: none), zeroing, broadcast, rounding, SAE."""

    mask: int = 0
    zeroing: bool = False
    broadcast: bool = False
    rounding: int = RoundingControl.NONE
    sae: bool = False


PLAIN = Evex()

_NAMES = {value: name for name, value in vars(OpCodeOperandKind).items() if name[0] != "_"}


def _numbered(*names: str) -> list[int]:
    return [getattr(Register, name) for name in names]


_CLASSES: dict[str, list[int]] = {
    "R8": _numbered(*"AL CL DL BL SPL BPL SIL DIL".split(), *(f"R{n}L" for n in range(8, 16))),
    "R16": _numbered(*"AX CX DX BX SP BP SI DI".split(), *(f"R{n}W" for n in range(8, 16))),
    "R32": _numbered(*"EAX ECX EDX EBX ESP EBP ESI EDI".split(), *(f"R{n}D" for n in range(8, 16))),
    "R64": _numbered(*"RAX RCX RDX RBX RSP RBP RSI RDI".split(), *(f"R{n}" for n in range(8, 16))),
    "MM": _numbered(*(f"MM{n}" for n in range(8))),
    "XMM": _numbered(*(f"XMM{n}" for n in range(32))),
    "YMM": _numbered(*(f"YMM{n}" for n in range(32))),
    "ZMM": _numbered(*(f"ZMM{n}" for n in range(32))),
    "K": _numbered(*(f"K{n}" for n in range(8))),
    "STI": _numbered(*(f"ST{n}" for n in range(8))),
    "TMM": _numbered(*(f"TMM{n}" for n in range(8))),
    "BND": _numbered(*(f"BND{n}" for n in range(4))),
    "SEG": _numbered(*"ES CS SS DS FS GS".split()),
    "CR": _numbered(*(f"CR{n}" for n in range(16))),
    "DR": _numbered(*(f"DR{n}" for n in range(16))),
}
_CLASSES |= {"KP1": _CLASSES["K"], "XMMP3": _CLASSES["XMM"], "ZMMP3": _CLASSES["ZMM"]}
_FIXED = {n: getattr(Register, n) for n in "AL CL AX DX EAX RAX ST0 ES CS SS DS FS GS".split()}
_STRINGS = {
    "SEG_RSI": OpKind.MEMORY_SEG_RSI,
    "ES_RDI": OpKind.MEMORY_ESRDI,
    "SEG_RDI": OpKind.MEMORY_SEG_RDI,
}
_IMMEDIATES: dict[str, tuple[int, int]] = {
    "IMM8": (OpKind.IMMEDIATE8, 8),
    "IMM4_M2Z": (OpKind.IMMEDIATE8, 4),
    "IMM16": (OpKind.IMMEDIATE16, 16),
    "IMM32": (OpKind.IMMEDIATE32, 32),
    "IMM64": (OpKind.IMMEDIATE64, 64),
    "IMM32SEX64": (OpKind.IMMEDIATE32TO64, 32),
    "IMM8SEX16": (OpKind.IMMEDIATE8TO16, 8),
    "IMM8SEX32": (OpKind.IMMEDIATE8TO32, 8),
    "IMM8SEX64": (OpKind.IMMEDIATE8TO64, 8),
}


@lru_cache(maxsize=8192)
def info_of(code: int) -> OpCodeInfo:
    """iced-x86's facts about a form."""
    return OpCodeInfo(cast(Any, code))


def kinds_of(code: int) -> tuple[str, ...]:
    """Names of the form's operand kinds, such as ``("YMM_REG", "YMM_VVVV", "YMM_OR_MEM")``."""
    info = info_of(code)
    return tuple(_NAMES[info.op_kind(i)] for i in range(info.op_count))


def encode(
    code: int,
    registers: Sequence[int] = (1, 2, 3, 5),
    memory: Memory | None = None,
    immediate: int = 0,
    evex: Evex = PLAIN,
) -> bytes:
    """One encoding of a form. ValueError if it has none.

    ``registers`` are the numbers for the register operands, in Intel order; ``memory`` is used
    where a register or memory may stand (and for operands that are always memory). A second
    immediate is taken from the bits of ``immediate`` above the first.
    """
    insn: Any = Instruction()  # iced's stubs want enum members where it takes numbers
    insn.code = code
    insn.code_size = CodeSize.CODE64
    numbers = iter(registers)
    used_bits = 0
    for position, kind in enumerate(kinds_of(code)):
        family = kind.split("_")[0]
        if kind in _STRINGS:
            insn.set_op_kind(position, _STRINGS[kind])
        elif kind in _FIXED:
            _set_register(insn, position, _FIXED[kind])
        elif kind in _IMMEDIATES or kind == "IMM8_CONST_1":
            value = 1 if kind == "IMM8_CONST_1" else immediate >> used_bits
            _set_immediate(insn, position, kind, value, second=used_bits > 0)
            used_bits += _IMMEDIATES[kind][1] if kind in _IMMEDIATES else 8
        elif family in ("MEM", "SIBMEM") or ("OR_MEM" in kind and memory is not None):
            insn.set_op_kind(position, OpKind.MEMORY)
            _set_memory(insn, kind, memory or SIMPLE)
        elif family in _CLASSES:
            number = next(numbers)
            _set_register(insn, position, _CLASSES[family][number % len(_CLASSES[family])])
        else:
            raise ValueError(f"{FORM_NAMES[code]}: operand kind {kind} is not supported")
    _set_evex(insn, evex)
    encoder = Encoder(64)
    encoder.encode(insn, CODE)
    return bytes(encoder.take_buffer())


def _set_register(insn: Any, position: int, register: int) -> None:
    insn.set_op_kind(position, OpKind.REGISTER)
    insn.set_op_register(position, register)


def _set_immediate(insn: Any, at: int, kind: str, value: int, *, second: bool) -> None:
    op_kind, bits = _IMMEDIATES.get(kind, (OpKind.IMMEDIATE8, 8))
    insn.set_op_kind(at, OpKind.IMMEDIATE8_2ND if second else op_kind)
    value &= (1 << bits) - 1
    signed = value - (1 << bits) if value >> bits - 1 and "SEX" in kind else value
    if "SEX" in kind:
        insn.set_immediate_i64(at, signed)
    else:
        insn.set_immediate_u64(at, value)


def _set_memory(insn: Any, kind: str, memory: Memory) -> None:
    if kind == "MEM_OFFS":
        insn.memory_displ_size = 8
        insn.memory_displacement = memory.absolute
        return
    addresses = _CLASSES[f"R{memory.width}"]
    insn.segment_prefix = memory.segment
    if memory.relative:
        insn.memory_base = Register.RIP
        insn.memory_displ_size = 8
        insn.memory_displacement = memory.absolute
        return
    if memory.base is not None:
        insn.memory_base = addresses[memory.base]
    index = memory.index
    if kind.startswith("MEM_VSIB"):
        index = 4 if index is None else index
        insn.memory_index = _CLASSES[kind[-1] + "MM"][index]
    elif index is not None:
        insn.memory_index = addresses[index]
    insn.memory_index_scale = memory.scale
    insn.memory_displ_size = 1 if memory.displacement else 0
    insn.memory_displacement = memory.displacement & (1 << 64) - 1


def _set_evex(insn: Any, evex: Evex) -> None:
    if evex.mask:
        insn.op_mask = _CLASSES["K"][evex.mask]
    insn.zeroing_masking = evex.zeroing
    insn.is_broadcast = evex.broadcast
    insn.rounding_control = evex.rounding
    insn.suppress_all_exceptions = evex.sae


@lru_cache(maxsize=8192)
def features_of(code: int) -> frozenset[str]:
    """CPUID features that the form needs, by name."""
    return frozenset(FEATURE_NAMES[f] for f in _features(code))


def mnemonic_of(code: int) -> str:
    """Lower-case mnemonic of the form."""
    return MNEMONIC_NAMES[info_of(code).mnemonic]


def forms_with(*features: str) -> list[int]:
    """The forms that need no CPUID features but these."""
    wanted = set(features)
    return [code for code in all_forms() if features_of(code) <= wanted]


@lru_cache(maxsize=1)
def all_forms() -> tuple[int, ...]:
    """All forms that exist in 64-bit mode and need no decoder option, in iced's order."""
    return tuple(
        code
        for code in sorted(c for c in FORM_NAMES if isinstance(c, int))
        if info_of(code).mode64
        and info_of(code).is_instruction
        and info_of(code).decoder_option == 0
        and info_of(code).encoding != EncodingKind.MVEX
        and CpuidFeature.KNC not in _features(code)
    )


def _features(code: int) -> list[int]:
    insn: Any = Instruction()
    insn.code = code
    return list(insn.cpuid_features())


def forms_of(*mnemonics: str) -> list[int]:
    """The forms (iced ``Code``) of these mnemonics in 64-bit mode."""
    wanted = set(mnemonics)
    found = [c for c in all_forms() if mnemonic_of(c) in wanted]
    missing = wanted - {mnemonic_of(c) for c in found}
    if missing:
        raise ValueError(f"no 64-bit form of {', '.join(sorted(missing))}")
    return found


REGISTERS = (
    (1, 2, 3, 5),
    (1, 1, 2, 3),
    (1, 2, 1, 3),
    (1, 2, 2, 3),
    (1, 1, 1, 1),
    (9, 10, 11, 13),
    (8, 3, 15, 0),
)
"""Distinct, every way of aliasing, high registers."""
EVEX_REGISTERS = ((17, 26, 31, 20), (30, 7, 30, 16))
IMMEDIATES = (0, 0xFF, 0x1B, 0x80, 0xE4, 0x01, 0x7F, 0x4E, 0x03, 0x36, 0x10, 0x08, 0x55, 0xC9)


def encodings(code: int, immediates: Iterable[int] = IMMEDIATES) -> Iterator[Insn]:
    """A representative set of encodings of one form, without duplicates, deterministic.

    Immediates are dealt out in turn over the variants, and each is used at least once.
    """
    kinds = kinds_of(code)
    widths = [_IMMEDIATES[k][1] for k in kinds if k in _IMMEDIATES]
    values = list(immediates) if widths else [0]
    if len(widths) == 2:
        values = [a | b << widths[0] for a, b in zip(values, values[::-1], strict=True)]
    deal = cycle(values)
    seen: set[bytes] = set()
    rest = ((REGISTERS[0], None, PLAIN) for _ in values)
    for count, (registers, memory, evex) in enumerate(chain(_variants(code, kinds), rest)):
        try:
            raw = encode(code, registers, memory, next(deal), evex)
        except ValueError:
            if count:  # a variant that this form does not have, such as R8 with AH
                continue
            raise
        if raw in seen:
            continue
        seen.add(raw)
        with suppress(DecodeError):  # combinations that are #UD, such as a gather onto its mask
            insn = decode(raw, 64)
            if insn.code == code:
                yield insn


def _variants(
    code: int, kinds: Sequence[str]
) -> Iterator[tuple[Sequence[int], Memory | None, Evex]]:
    info = info_of(code)
    is_evex = info.encoding == EncodingKind.EVEX
    has_register = not any(k.startswith(("MEM", "SIBMEM")) for k in kinds)
    has_memory = not has_register or any("OR_MEM" in k for k in kinds)
    masks = list(_masks(info)) if is_evex else [PLAIN]
    if has_register:
        for registers in (*REGISTERS, *(EVEX_REGISTERS if is_evex else ())):
            yield registers, None, masks[0]
        for evex in chain(masks[1:], _roundings(info)):
            yield REGISTERS[0], None, evex
            yield REGISTERS[2], None, evex
    if has_memory:
        for memory in _memories(kinds):
            yield REGISTERS[0], memory, masks[0]
        for memory in _memories(kinds)[:3]:
            yield REGISTERS[1], memory, masks[-1]
        for evex in masks[1:]:
            yield REGISTERS[0], SIMPLE, evex
        if info.can_broadcast:
            for mask in masks:
                evex = Evex(mask.mask, mask.zeroing, broadcast=True)
                yield REGISTERS[0], SIMPLE, evex


def _memories(kinds: Sequence[str]) -> tuple[Memory, ...]:
    if any(k.startswith("MEM_VSIB") for k in kinds):
        return _VSIB_MEMORIES
    return MEMORIES


def _masks(info: OpCodeInfo) -> Iterator[Evex]:
    if not info.require_op_mask_register:
        yield PLAIN
    if info.can_use_op_mask_register:
        yield Evex(mask=1)
        yield Evex(mask=7)
        if info.can_use_zeroing_masking:
            yield Evex(mask=2, zeroing=True)


def _roundings(info: OpCodeInfo) -> Iterator[Evex]:
    if info.can_use_rounding_control:
        for rounding in (
            RoundingControl.ROUND_TO_NEAREST,
            RoundingControl.ROUND_DOWN,
            RoundingControl.ROUND_UP,
            RoundingControl.ROUND_TOWARD_ZERO,
        ):
            yield Evex(rounding=rounding)
    elif info.can_suppress_all_exceptions:
        yield Evex(sae=True)


def form(name: str) -> int:
    """The form of an iced ``Code`` name. ValueError if there is none."""
    found = getattr(Code, name, None)
    if found is None:
        raise ValueError(f"no instruction form is called {name}")
    return int(found)
