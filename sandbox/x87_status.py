"""Who looks at the x87 status word for its exception flags, which the fast path does not set.

The condition codes C0, C2 and C3 are right there, and so is C1 after FXAM. Code that compares by
``fcom``, ``fnstsw ax`` and ``sahf`` or ``test ah, 45h`` reads nothing else, and must neither be
slowed down nor told about. So what is done with AX is looked up in the code that follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from iced_x86 import OpKind, Register

from sandbox.decode import DecodeError, Insn, decode

FNSTSW_AX: Final = b"\xdf\xe0"
_FXAM: Final = b"\xd9\xe5"
C1: Final = 0x200
NOT_TRACKED: Final = 0x80FF | C1
"""Bits of the status word: IE DE ZE OE UE PE, SF, ES, B and C1."""
_LOOKAHEAD: Final = 24
_SHIFTS: Final = {Register.AH: 8, Register.AX: 0, Register.EAX: 0, Register.RAX: 0}


def reads_conditions_only(before: bytes, after: bytes, bitness: int) -> bool:
    """Whether code reads but condition codes from the AX that FNSTSW has stored.

    ``before`` and ``after`` are the bytes around that FNSTSW. SAHF takes no more of AH than C0, C2
    and C3; TEST and AND show by their immediate what they take. x87 instructions in between, such
    as one that pops the stack, do not touch AX.
    """
    untracked = NOT_TRACKED & ~C1 if before.endswith(_FXAM) else NOT_TRACKED
    for insn in _decoded(after, bitness):
        if insn.mnemonic == "sahf":
            return True
        if insn.mnemonic in ("test", "and"):
            shift = _SHIFTS.get(insn.iced.op0_register)
            has_mask = insn.iced.op1_kind not in (OpKind.REGISTER, OpKind.MEMORY)
            if shift is None or not has_mask:
                return False
            return not insn.iced.immediate(1) << shift & untracked
        if insn.mnemonic[0] != "f" or insn.raw[:2] == FNSTSW_AX:
            return False
    return False


def _decoded(code: bytes, bitness: int) -> Iterator[Insn]:
    """The instructions of ``code`` as far as it goes, at most three."""
    for _ in range(3):
        try:
            insn = decode(code, bitness)
        except DecodeError:
            return
        yield insn
        code = code[insn.length :]


def all_read_conditions_only(pages: Iterable[bytes], bitness: int) -> bool:
    """Whether that holds for every FNSTSW AX in pages of code.

    What only looks like one counts too, and so does what cannot be seen to its end.
    """
    for page in pages:
        at = page.find(FNSTSW_AX)
        while at >= 0:
            end = at + len(FNSTSW_AX)
            if not reads_conditions_only(page[:at][-2:], page[end : end + _LOOKAHEAD], bitness):
                return False
            at = page.find(FNSTSW_AX, end)
    return True
