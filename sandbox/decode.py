"""Bytes to :class:`Insn`. iced-x86 decides what an instruction is; capstone prints it for people.

Instructions are decoded at address 0 and cached by their bytes, so one :class:`Insn` serves every
place where the same bytes stand: branch targets and RIP-relative displacements in ``Insn.iced``
are therefore relative to the *start* of the instruction.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

from iced_x86 import (
    Code,
    CpuidFeature,
    Decoder,
    DecoderError,
    DecoderOptions,
    Instruction,
    OpKind,
)
from iced_x86 import Mnemonic as _Mnemonic

MAX_LENGTH = 15
"""The longest an x86 instruction may be (SDM Vol. 2, 2.3.11)."""


def _names(enum: Any) -> dict[int, str]:
    return {value: name for name, value in vars(enum).items() if isinstance(value, int)}


FORM_NAMES: dict[int, str] = _names(Code)
MNEMONIC_NAMES: dict[int, str] = {v: n.lower() for v, n in _names(_Mnemonic).items()}
FEATURE_NAMES: dict[int, str] = _names(CpuidFeature)
IMMEDIATE_BITS: dict[int, int] = {
    OpKind.IMMEDIATE8: 8,
    OpKind.IMMEDIATE8_2ND: 8,
    OpKind.IMMEDIATE16: 16,
    OpKind.IMMEDIATE32: 32,
    OpKind.IMMEDIATE64: 64,
    OpKind.IMMEDIATE8TO16: 16,
    OpKind.IMMEDIATE8TO32: 32,
    OpKind.IMMEDIATE8TO64: 64,
    OpKind.IMMEDIATE32TO64: 64,
}
"""Kinds of immediate operands, by iced-x86 ``OpKind``: their width after sign extension."""


class DecodeError(Exception):
    """The bytes are no instruction. ``truncated``: they may be the start of one."""

    def __init__(self, data: bytes, *, truncated: bool) -> None:
        super().__init__(f"{'truncated' if truncated else 'invalid'} instruction {data.hex(' ')}")
        self.data = data
        self.truncated = truncated


class Insn:
    """One decoded instruction, immutable and shared by all addresses that hold its bytes."""

    def __init__(self, raw: bytes, bitness: int, iced: Instruction) -> None:
        self.raw = raw
        self.length = len(raw)
        self.bitness = bitness
        self.iced = iced
        self.code: int = iced.code
        """iced-x86 ``Code``: the exact instruction form."""

    @classmethod
    def undefined(cls, data: bytes, bitness: int) -> Insn:
        """Bytes that are no instruction: ``code`` is ``Code.INVALID``, the length unknown."""
        return cls(data, bitness, Instruction())

    @property
    def mnemonic(self) -> str:
        """Lower-case mnemonic, such as ``vpaddd``."""
        return MNEMONIC_NAMES[self.iced.mnemonic]

    @property
    def form(self) -> str:
        """Name of the exact form, such as ``VEX_VPADDD_YMM_YMM_YMMM256``."""
        return FORM_NAMES[self.code]

    @cached_property
    def features(self) -> tuple[str, ...]:
        """CPUID features that the form needs, such as ``("AVX2",)``."""
        return tuple(FEATURE_NAMES[f] for f in self.iced.cpuid_features())

    def text(self, address: int = 0) -> str:
        """Disassembly for people, Intel syntax, as if the instruction stood at ``address``."""
        return _disassemble(self.raw, self.bitness, address) or str(self.iced)

    def __repr__(self) -> str:
        return f"<Insn {self.raw.hex()} {self.iced}>"


@lru_cache(maxsize=65536)
def decode(data: bytes, bitness: int) -> Insn:
    """Decode the first instruction of ``data`` (at most 15 bytes are looked at).

    Raises :class:`DecodeError` if the bytes are not, or not yet, an instruction.
    """
    decoder = Decoder(bitness, data[:MAX_LENGTH], DecoderOptions.NONE, ip=0)
    iced = decoder.decode()
    if iced.is_invalid:
        truncated = decoder.last_error == DecoderError.NO_MORE_BYTES and len(data) < MAX_LENGTH
        raise DecodeError(data, truncated=truncated)
    return Insn(bytes(data[: iced.len]), bitness, iced)


@lru_cache(maxsize=3)
def _capstone(bitness: int) -> Any:
    import capstone  # slow to import, and needed only where people read

    modes = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
    return capstone.Cs(capstone.CS_ARCH_X86, modes[bitness])


def _disassemble(raw: bytes, bitness: int, address: int) -> str:
    for _address, size, name, operands in _capstone(bitness).disasm_lite(raw, address, 1):
        if size == len(raw):
            return f"{name} {operands}".strip()
    return ""
