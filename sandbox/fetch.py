"""How many instruction bytes KVM's emulator has fetched when it gives up: ``insn_size``.

The kernel's decoder prefetches up to 15 bytes or to the end of the page, and takes the rest only
when decoding itself runs out of bytes (``__do_insn_fetch_bytes`` and ``x86_decode_insn`` in
arch/x86/kvm/emulate.c). It gives up after the opcode where its tables hold nothing, so an
instruction it does not know may be reported cut off at the page end. The model is that of kernels
up to Linux 6.18, to which VEX is unknown.
"""

from __future__ import annotations

from sandbox.decode import MAX_LENGTH, DecodeError, decode

_LEGACY_PREFIXES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")
_REX = range(0x40, 0x50)
_VEX = (0xC4, 0xC5)
_UNKNOWN = frozenset(b"\x27\x37\x3f\x62\x9b\xf1")
"""One-byte opcodes without an entry."""
_ESCAPES = range(0xD8, 0xE0)
"""x87: given up after ModRM, but for fnstcw, fnstsw (``/7`` with memory) and fninit."""
_KNOWN_0F = frozenset(
    bytes.fromhex("00 01 05 06 08 09 0d 10 11 18 1f 20 21 22 23 28 29 2b 30 31 32 33 34 35 6f 7f")
    + bytes(range(0x40, 0x50))
    + bytes(range(0x80, 0xA4))
    + bytes.fromhex("a4 a5 a8 a9 aa ab ac ad ae af b0 b1 b2 b3 b4 b5 b6 b7 ba bb bc bd be bf")
    + bytes.fromhex("c0 c1 c3 c7 c8 c9 ca cb cc cd ce cf e7")
)
_KNOWN_0F38 = frozenset(b"\xf0\xf1")


def insn_fetch_size(data: bytes, page_remaining: int, bitness: int = 64) -> int:
    """``insn_size`` for the instruction at the start of ``data``, 0 to 15 bytes.

    ``data`` is what can be fetched from the instruction on, ``page_remaining`` how much of that
    lies in its first page (at least 1).
    """
    whole = min(MAX_LENGTH, len(data))
    if page_remaining >= whole or _needed(data, bitness) > page_remaining:
        return whole
    return page_remaining


def _needed(data: bytes, bitness: int) -> int:
    """How many bytes the kernel's decoder looks at before it succeeds or gives up."""
    at = 0
    while data[at : at + 1] and (
        data[at] in _LEGACY_PREFIXES or (bitness == 64 and data[at] in _REX)
    ):
        at += 1
    opcode = data[at : at + 3].ljust(3, b"\0")
    if opcode[0] in _VEX and (bitness == 64 or opcode[1] >= 0xC0):
        return at + 2  # taken for LES or LDS, which has a ModRM byte
    if opcode[0] == 0x0F:
        if opcode[1] == 0x38:
            return at + 3 if opcode[2] not in _KNOWN_0F38 else _length(data, bitness, at + 4)
        return at + 2 if opcode[1] not in _KNOWN_0F else _length(data, bitness, at + 3)
    if opcode[0] in _ESCAPES and not _is_known_escape(opcode[0], opcode[1]):
        return at + 2
    if opcode[0] == 0x63 and bitness != 64:
        return at + 2
    return at + 1 if opcode[0] in _UNKNOWN else _length(data, bitness, at + 2)


def _is_known_escape(opcode: int, modrm: int) -> bool:
    if modrm < 0xC0:
        return opcode in (0xD9, 0xDD) and modrm >> 3 & 7 == 7
    return (opcode, modrm) == (0xDB, 0xE3)


def _length(data: bytes, bitness: int, to_modrm: int) -> int:
    """Length of an instruction that the kernel knows; if it is no instruction, ModRM tells it."""
    try:
        return decode(data, bitness).length
    except DecodeError as error:
        return MAX_LENGTH if error.truncated else to_modrm
