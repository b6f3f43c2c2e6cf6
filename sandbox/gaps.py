"""What the fast path is known to leave out next to a right value: the gaps, each with a name.

A gap is a side effect that Unicorn does not have at all, so that it touches whole families of
forms. A difference that gaps explain in full does not make a form wrong; which forms have which gap
is recorded beside the policy, and the policy's ``float_flags`` says what is done about most.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, Final

import numpy as np
from iced_x86 import InstructionInfoFactory, OpKind

from sandbox.cases import float_type, linear_address
from sandbox.conformance import Outcome
from sandbox.cpu import GP, PF_, UD, Fault
from sandbox.decode import Insn
from sandbox.native import Result, State

GAPS: Final = {
    "refused": "some encodings are invalid to Unicorn: they go to the handlers by themselves",
    "mxcsr": "the exception flags in MXCSR are not set",
    "nan": "of two NaN operands, the other one may give the payload of the result",
    "alignment": "a misaligned 16-byte memory operand does not raise #GP",
    "partial": "of a move that faults in its second page a part is done, of MMX that TOP is 0",
    "x87": "the exception flags and C1 in the x87 status word are not set",
    "x87-stack": "overflow and underflow of the x87 register stack are not noticed",
    "x87-nan": "loads and stores do not make signalling NaNs quiet",
    "mmx": "of the x87 register under an MMX register, bits 79:64 and the tag are not kept",
}
"""Name of a gap to what it is."""

_FLAGS = 0x3F
_X87_EXCEPTIONS = 0x82FF  # IE DE ZE OE UE PE SF ES, C1, B
_X87_CONDITIONS = 0x4500  # C0 C2 C3
_X87_SETS_CONDITIONS = ("fcom", "fucom", "fxam", "ftst", "fprem", "ficom", "fptan", "fsin", "fcos")
_IE, _SF = 1, 0x40
LOWERED: Final = frozenset(("mxcsr", "nan", "alignment"))
"""The gaps of lowered code: those of the instructions that it is made of."""
_ALIGNED = frozenset("vmovaps vmovapd vmovdqa vmovntps vmovntpd vmovntdq vmovntdqa".split())
_MOVES_IN_PARTS = ("movups", "movupd", "movdqu", "lddqu", "maskmovdqu")
_QUIET = {"f4": 1 << 22, "f8": 1 << 51}
_INFINITY = {"f4": 0xFF << 23, "f8": 0x7FF << 52}


def reconcile(
    insn: Insn, before: State, native: Result, subject: Outcome
) -> tuple[Outcome, list[str]]:
    """``subject`` as it would be without the gaps, and which of them it took."""
    whole = _whole_outcome(insn, before, native, subject)
    if whole:
        trap = native.fault
        fault = Fault(trap.vector, trap.error_code, trap.address) if trap else None
        return Outcome(native.state, fault), [whole]
    want, got, found = native.state, subject.state.copy(), []
    if got.mxcsr == before.mxcsr != want.mxcsr and not (got.mxcsr ^ want.mxcsr) & ~_FLAGS:
        got.mxcsr = want.mxcsr
        found.append("mxcsr")
    if got.vectors != want.vectors and _reconcile_nans(insn, want, got):
        found.append("nan")
    if "_MM" in insn.form:
        if _reconcile_mmx(want, got):
            found.append("mmx")
    elif got.fpsw != want.fpsw and not (got.fpsw ^ want.fpsw) & ~_x87_flags(insn):
        got.fpsw = want.fpsw
        found.append("x87")
    return (replace(subject, state=got), found) if found else (subject, found)


def _whole_outcome(insn: Insn, before: State, native: Result, subject: Outcome) -> str:
    """The gap that makes another outcome altogether, if one does."""
    want, got = native.fault, subject.fault
    vectors = want and want.vector, got and got.vector
    if vectors[1] == UD:
        return "refused"
    if vectors in ((GP, None), (GP, PF_)) and _is_misaligned(insn, before):
        return "alignment"
    if want and vectors[0] == vectors[1] and _is_in_parts(insn):
        return "partial"
    if insn.mnemonic == "emms" and subject.state.fptag == native.state.fptag:
        return "mmx"
    if insn.mnemonic[0] == "f" and want is None and got is None:
        raised = native.state.fpsw & ~before.fpsw
        if native.state.fpsw & _SF and _stack_may_fault(before, native.state):
            return "x87-stack"
        if raised & _IE and insn.mnemonic in ("fld", "fst", "fstp"):
            return "x87-nan"
    return ""


def _is_in_parts(insn: Insn) -> bool:
    """Whether Unicorn may have done a part, one that is harmless to do again, before a fault."""
    return "_MM" in insn.form or insn.form == "FSTP_M80FP" or insn.mnemonic in _MOVES_IN_PARTS


def _stack_may_fault(before: State, after: State) -> bool:
    """Whether the instruction raised a stack fault: SF is new (it is clear in all test states)."""
    return not before.fpsw & _SF and bool(after.fpsw & _SF)


def _x87_flags(insn: Insn) -> int:
    if insn.mnemonic.startswith(_X87_SETS_CONDITIONS):
        return _X87_EXCEPTIONS
    return _X87_EXCEPTIONS | _X87_CONDITIONS


def reconcile_lowered(
    insn: Insn, before: State, native: Result, subject: Outcome
) -> tuple[Outcome, list[str]]:
    """The same for lowered code, where all but these gaps would be differences."""
    outcome, found = reconcile(insn, before, native, subject)
    return (outcome, found) if LOWERED.issuperset(found) else (subject, [])


def _is_misaligned(insn: Insn, before: State) -> bool:
    needed = alignment(insn)
    used = InstructionInfoFactory().info(insn.iced).used_memory() if needed > 1 else ()
    addresses = (linear_address(insn, memory, before) for memory in used)
    return any(address is not None and address % needed for address in addresses)


def has_memory_operand(insn: Insn) -> bool:
    """Whether an operand is memory that ModRM names."""
    return any(insn.iced.op_kind(i) == OpKind.MEMORY for i in range(insn.iced.op_count))


@lru_cache(maxsize=4096)
def alignment(insn: Insn) -> int:
    """What the address of a memory operand must be a multiple of; 1 if it may be any.

    All legacy SSE forms of 16 bytes but the unaligned moves, and of VEX forms the aligned moves.
    """
    is_vex = insn.form.startswith("VEX_")
    if not has_memory_operand(insn) or (is_vex and insn.mnemonic not in _ALIGNED):
        return 1
    return 16 if "128" in insn.form else 32 if "256" in insn.form else 1


def _reconcile_nans(insn: Insn, want: State, got: State) -> bool:
    lane = float_type(insn)
    if lane is None or lane not in _QUIET:
        return False
    a: Any = np.frombuffer(want.vectors, lane.replace("f", "u"))
    b: Any = np.frombuffer(got.vectors, lane.replace("f", "u")).copy()
    quiet = _INFINITY[lane] | _QUIET[lane]
    both = (a & quiet == quiet) & (b & quiet == quiet) & (a != b)
    if not both.any():
        return False
    b[both] = a[both]
    got.vectors = b.tobytes()
    return True


def _reconcile_mmx(want: State, got: State) -> bool:
    """The upper parts, and what follows from them: tags, and TOP where a fault came."""
    low = (1 << 64) - 1
    if [v & low for v in want.st] != [v & low for v in got.st]:
        return False
    if (want.fpsw ^ got.fpsw) & ~0x3800:
        return False
    got.st, got.fptag, got.fpsw = want.st, want.fptag, want.fpsw
    return True
