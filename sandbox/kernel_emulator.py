"""Which instructions KVM's own emulator carries out when their operand lies in MMIO.

Source: the opcode tables of arch/x86/kvm/emulate.c up to Linux 6.18, and what /dev/kvm does with
them (tests/test_kvm_mmio.py). It knows the integer instructions, moves of whole SSE and MMX
registers, FNSTCW and FNSTSW; no VEX, no arithmetic of SSE and x87. What it does not know is an
emulation failure.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from iced_x86 import EncodingKind, MandatoryPrefix, OpCodeInfo, OpCodeTableKind

from sandbox.decode import FORM_NAMES

_ANY: Final = frozenset(range(-1, 8))
_NONE, _66, _F3 = MandatoryPrefix.NONE, MandatoryPrefix.P66, MandatoryPrefix.PF3
_PLAIN: Final = frozenset({_NONE})
_BOTH: Final = frozenset({_NONE, _66})

_NORMAL: Final = {
    **{opcode: _ANY for opcode in range(0x100) if not 0xD8 <= opcode <= 0xDF},
    **dict.fromkeys((0x27, 0x37, 0x3F, 0x62, 0x9B, 0xF1), frozenset()),
    **dict.fromkeys((0x8F, 0xC6, 0xC7), frozenset({0})),
    **dict.fromkeys((0xD9, 0xDD), frozenset({7})),
}  # fmt: skip
"""One-byte opcodes: for each, which /r of its group (-1: it is no group)."""
_ARPL: Final = 0x63
_0F: Final = {
    **dict.fromkeys((0x0D, 0x18, 0x1F, *range(0x40, 0x50), *range(0x90, 0xA0), 0xA3, 0xA4, 0xA5,
                     0xAB, 0xAC, 0xAD, 0xAF, *range(0xB0, 0xB8), 0xBB, *range(0xBC, 0xC2), 0xC3),
                    _ANY),
    0x00: frozenset({2, 3}), 0x01: frozenset({4, 6, 7}), 0xAE: frozenset({7}),
    0xBA: frozenset(range(4, 8)), 0xC7: frozenset({1}),
}  # fmt: skip
_0F_MOVES: Final = {
    **dict.fromkeys((0x10, 0x11, 0x28, 0x29, 0x2B), _BOTH),
    **dict.fromkeys((0x6F, 0x7F), frozenset({_NONE, _66, _F3})),
    0xE7: frozenset({_66}),
}
"""Moves of whole vector registers, by mandatory prefix."""
_0F38: Final = (0xF0, 0xF1)


@lru_cache(maxsize=1)
def mmio_forms() -> frozenset[int]:
    """The forms (iced-x86 ``Code``) that are emulated with a memory operand in MMIO."""
    return frozenset(code for code in FORM_NAMES if _is_known(OpCodeInfo(code)))  # type: ignore[arg-type]


def _is_known(info: OpCodeInfo) -> bool:
    if info.encoding != EncodingKind.LEGACY or info.op_code_len != 1:
        return False
    opcode, group = info.op_code, info.group_index
    prefix = _NONE if info.mandatory_prefix == MandatoryPrefix.PNP else info.mandatory_prefix
    if info.table == OpCodeTableKind.NORMAL:
        if opcode == _ARPL and info.mode32:
            return False
        return group in _NORMAL.get(opcode, ())
    if info.table == OpCodeTableKind.T0F:
        if opcode in _0F_MOVES:
            return prefix in _0F_MOVES[opcode]
        return prefix in (_BOTH if opcode == 0xAE else _PLAIN) and group in _0F.get(opcode, ())
    return info.table == OpCodeTableKind.T0F38 and opcode in _0F38 and prefix in _BOTH
