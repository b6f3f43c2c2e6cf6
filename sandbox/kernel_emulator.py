"""Which instructions KVM's own emulator carries out when their operand lies in MMIO.

What it does not know is an emulation failure. Source: the preset ``kvm-emulator``, and what
/dev/kvm does with such operands (tests/test_kvm_mmio.py).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from iced_x86 import OpCodeInfo

from sandbox.decode import FORM_NAMES, MNEMONIC_NAMES
from sandbox.policy import Policy

PRESET: Final = "kvm-emulator"
NO_MMIO: Final = frozenset(
    "fxsave fxsave64 fxrstor fxrstor64 sgdt sidt lgdt lidt sldt str tzcnt lzcnt".split()
)
"""Mnemonics that the emulator knows, but whose memory operand it takes for RAM (FXSAVE and the
table registers), reads though it is only written (SLDT, STR), or computes with as BSF and BSR
(TZCNT, LZCNT)."""


@lru_cache(maxsize=1)
def mmio_forms() -> frozenset[int]:
    """The forms (iced-x86 ``Code``) that are emulated with a memory operand in MMIO."""
    allowed = Policy.load(PRESET).allowed
    return frozenset(
        code for code in FORM_NAMES if allowed[code] and _mnemonic(code) not in NO_MMIO
    )


def _mnemonic(code: int) -> str:
    return MNEMONIC_NAMES[OpCodeInfo(code).mnemonic]  # type: ignore[arg-type]
