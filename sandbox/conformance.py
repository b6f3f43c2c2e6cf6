"""Compare what emulates instructions with the host CPU, instruction by instruction.

A :class:`Subject` runs one instruction on a :class:`~sandbox.native.State`, as
:class:`~sandbox.native.NativeCpu` does; :func:`difference` says in what the two outcomes differ;
:func:`check` does it for many states of one instruction, :func:`sweep` for all encodings of forms.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol, TypeAlias

import numpy as np
from iced_x86 import InstructionInfoFactory, OpKind, Register, RegisterExt, RegisterInfo, RflagsBits

from sandbox.cases import Cases, linear_address, uses_x87
from sandbox.cpu import DB, PF_, Fault
from sandbox.decode import FORM_NAMES, Insn
from sandbox.encodings import encodings
from sandbox.native import REGION, NativeCpu, Result, State, missing_features
from sandbox.registers import AF, CF, DF, GPR_NAMES, OF, PF, RCX, SF, ZF

STATUS = CF | PF | AF | ZF | SF | OF
FLAG_NAMES = {CF: "CF", PF: "PF", AF: "AF", ZF: "ZF", SF: "SF", DF: "DF", OF: "OF"}
_ICED_FLAGS = {
    RflagsBits.CF: CF,
    RflagsBits.PF: PF,
    RflagsBits.AF: AF,
    RflagsBits.ZF: ZF,
    RflagsBits.SF: SF,
    RflagsBits.OF: OF,
}
_TRANSCENDENTAL = frozenset("f2xm1 fyl2x fyl2xp1 fpatan fptan fsin fcos fsincos".split())
"""Instructions whose last bit, and C1 (which way it was rounded), are the processor's own."""
_C1 = 0x200
_DENORMAL = 2
"""The denormal exception in the x87 words."""
_ERROR_BITS = 0x13
"""Of #PF: present, write, fetch; the user bit depends on where one runs, and whether the host's
kernel has something at an address in its half is its own affair."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a subject made of an instruction: a state, and a fault if there was one."""

    state: State
    fault: Fault | None = None


Reconcile: TypeAlias = Callable[["Insn", State, Result, Outcome], tuple[Outcome, list[str]]]
"""From (insn, state before, native, outcome) to the outcome without known gaps, and their names."""


class Subject(Protocol):
    """Something that emulates instructions."""

    def accepts(self, insn: Insn) -> bool:
        """Whether it emulates this instruction at all."""
        ...

    def run(self, insn: Insn, state: State) -> Outcome:
        """Emulate ``insn``, which stands at ``native.CODE``, on a copy of ``state``."""
        ...


_NOT_COMPARABLE = {
    re.compile(pattern): reason
    for pattern, reason in {
        "MOVSXD_R16_RM16": "CPUs differ in how much memory they read",
        "FSTPNCE_STI": "an undocumented alias, on its own with empty registers",
        "RESERVEDNOP_.*": "CPUs differ in whether the form is a NOP",
        "FX?(N?SAVE|N?STENV|RSTOR|LDENV).*|XSAVE.*": "the image holds what the host's CPU has",
        "(RDTSC|RDTSCP|RDRAND|RDSEED|RDPID|CPUID|XGETBV|RDPMC|RDPRU|SMSW|SGDT|SIDT|SLDT|STR|RDFSBASE|RDGSBASE)(_.*|)":
            "the answer is the host's own",
        "(LSL|LAR|VERR|VERW)_.*": "the answer depends on the host's descriptor tables",
        "(E?VEX_V)?(RCP|RSQRT)[PS]S_.*": "approximations differ between CPUs within a bound",
    }.items()
}  # fmt: skip


@lru_cache(maxsize=4096)
def not_comparable(form: str) -> str | None:
    """Why no host CPU can judge this form, or None."""
    for pattern, reason in _NOT_COMPARABLE.items():
        if pattern.fullmatch(form):
            return reason
    return None


def is_undefined(insn: Insn, state: State) -> bool:
    """Whether what happens is up to the CPU for this state.

    16-bit SHLD and SHRD by more than 16; BSF and BSR of 0; MASKMOVDQU and MASKMOVQ with an empty
    mask (which may or may not fault); LDMXCSR of a bit that one maker has (17, AMD's misaligned
    exception mask) and the other reserves; SHA with a misaligned memory operand (#GP by the SDM,
    AMD's do not mind); FLD from memory with denormals unmasked (AMD's push them, Intel's do not).
    """
    if insn.mnemonic in ("bsf", "bsr"):
        return _source_is_zero(insn, state)
    if insn.form in ("FLD_M32FP", "FLD_M64FP"):
        return not state.fpcw & _DENORMAL
    if insn.mnemonic == "maskmovq":
        number = RegisterInfo(insn.iced.op2_register).number
        mask_bits = state.st[number - (state.fpsw >> 11) & 7]
        return not mask_bits & 0x8080_8080_8080_8080
    if insn.mnemonic in ("shld", "shrd") and "RM16" in insn.form:
        count = state.gpr[RCX] if insn.form.endswith("CL") else insn.iced.immediate8
        return count & 31 > 16
    if insn.mnemonic in ("maskmovdqu", "vmaskmovdqu"):
        mask = state.vector(RegisterInfo(insn.iced.op2_register).number, 16)
        return not any(byte & 0x80 for byte in mask)
    if insn.mnemonic in ("ldmxcsr", "vldmxcsr"):
        (used,) = InstructionInfoFactory().info(insn.iced).used_memory()
        at = (linear_address(insn, used, state) or 0) - REGION
        value = int.from_bytes(state.memory[at : at + 4], "little") if at >= 0 else 0
        return value >> 16 == 2
    if insn.mnemonic.startswith("sha") and "SHA" in insn.features:
        memory = InstructionInfoFactory().info(insn.iced).used_memory()
        return any((linear_address(insn, used, state) or 0) & 15 for used in memory)
    return False


def _source_is_zero(insn: Insn, state: State) -> bool:
    size = RegisterInfo(insn.iced.op0_register).size
    if insn.iced.op1_kind == OpKind.REGISTER:
        source = RegisterInfo(insn.iced.op1_register)
        return not state.gpr[source.number] & (1 << 8 * size) - 1
    (used,) = InstructionInfoFactory().info(insn.iced).used_memory()
    at = (linear_address(insn, used, state) or 0) - REGION
    return 0 <= at < len(state.memory) and not any(state.memory[at : at + size])


@lru_cache(maxsize=4096)
def defined_flags(insn: Insn) -> int:
    """Status flags and DF, less what the manual leaves undefined after this form."""
    mask = STATUS | DF
    if insn.mnemonic in ("rcl", "rcr") and insn.iced.op_count == 2 and "_1" not in insn.form:
        mask &= ~OF  # defined for a count of 1 only, also where the count wraps round to 0
    undefined = insn.iced.rflags_undefined
    for theirs, ours in _ICED_FLAGS.items():
        if undefined & theirs:
            mask &= ~ours
    return mask


@lru_cache(maxsize=4096)
def _is_interruptible(insn: Insn) -> bool:
    """Whether a fault may leave a part of the work done: gathers, repeated strings, ENTER."""
    return insn.iced.is_vsib or insn.iced.is_string_instruction or insn.mnemonic == "enter"


def difference(insn: Insn, native: Result, subject: Outcome, flags: int) -> str | None:
    """The first difference in a line of text, or None. ``flags``: RFLAGS bits to compare."""
    if native.crashed:
        return "the native worker crashed"
    if native.fault and native.fault.vector == DB:
        return None  # the instruction set TF, and the worker's own code was stepped
    any_order = insn.mnemonic == "enter" or insn.mnemonic.startswith("cmps")
    fault = _fault_difference(native, subject, any_order=any_order)
    if fault or (native.fault and _is_interruptible(insn)):
        return fault
    return _state_difference(insn, native.state, subject.state, flags)


def _fault_difference(native: Result, subject: Outcome, *, any_order: bool) -> str | None:
    want, got = native.fault, subject.fault
    if want is None or got is None:
        if want is None and got is None:
            return None
        return f"fault: native {want}, subject {got!r}"
    if any_order:  # ENTER and CMPS touch several places
        return None
    same = want.vector == got.vector
    if same and want.vector == PF_:
        told = _ERROR_BITS if (want.address or 0) >> 47 == 0 else _ERROR_BITS & ~1
        error = (got.error_code or 0) & told == want.error_code & told
        same_page = (got.address or 0) >> 12 == (want.address or 0) >> 12
        same = error and same_page
    elif same and got.error_code is not None:
        same = want.error_code == got.error_code
    return None if same else f"fault: native {want}, subject {got!r}"


def _state_difference(insn: Insn, want: State, got: State, flags: int) -> str | None:
    if want.gpr != got.gpr:
        pairs = zip(GPR_NAMES, want.gpr, got.gpr, strict=True)
        name, a, b = next((name, a, b) for name, a, b in pairs if a != b)
        return f"{name}: native {a:#x}, subject {b:#x}"
    differ = (want.rflags ^ got.rflags) & flags & (STATUS | DF)
    if differ:
        bit, name = next((bit, name) for bit, name in FLAG_NAMES.items() if differ & bit)
        return f"{name}: native {int(want.rflags & bit > 0)}, subject {int(got.rflags & bit > 0)}"
    if want.vectors != got.vectors:
        found = _vector_difference(want.vectors, got.vectors)
        if found:
            return found
    if want.opmask != got.opmask and _has_avx512():
        masks = zip(range(8), want.opmask, got.opmask, strict=True)
        number, a, b = next((number, a, b) for number, a, b in masks if a != b)
        return f"k{number}: native {a:#x}, subject {b:#x}"
    if want.mxcsr != got.mxcsr:
        return f"mxcsr: native {want.mxcsr:#x}, subject {got.mxcsr:#x}"
    if want.memory != got.memory:
        return _memory_difference(want.memory, got.memory)
    if _uses_x87(insn):
        if insn.mnemonic in _TRANSCENDENTAL:
            got = _within_an_ulp(want, got)
        for name in ("fpsw", "fpcw", "fptag", "st"):
            a, b = getattr(want, name), getattr(got, name)
            if a != b:
                return f"{name}: native {_hex(a)}, subject {_hex(b)}"
    return None


def _rank(value: int) -> int:
    """80-bit floats of one sign as numbers in a row: without the integer bit."""
    return (value >> 64 & 0x7FFF) << 63 | value & (1 << 63) - 1


def _within_an_ulp(want: State, got: State) -> State:
    """``got`` with the x87 registers of ``want`` where they are neighbours, and its C1."""
    pairs = zip(want.st, got.st, strict=True)
    st = [a if a >> 79 == b >> 79 and abs(_rank(a) - _rank(b)) <= 1 else b for a, b in pairs]
    return replace(got, st=st, fpsw=got.fpsw & ~_C1 | want.fpsw & _C1)


def _hex(value: int | list[int]) -> str:
    return " ".join(f"{v:#x}" for v in (value if isinstance(value, list) else [value]))


@lru_cache(maxsize=1)
def _has_avx512() -> bool:
    """Whether the answers come from a CPU with AVX-512: recorded ones do."""
    return NativeCpu.available() is not None or NativeCpu.shared().xcr0 & 0xE0 == 0xE0


_uses_x87 = lru_cache(maxsize=4096)(uses_x87)


def _vector_difference(want: bytes, got: bytes) -> str | None:
    a = np.frombuffer(want, "u1").reshape(32, 64)
    b = np.frombuffer(got, "u1").reshape(32, 64)
    if not _has_avx512():  # the host cannot tell what lies above
        a, b = a[:16, :32], b[:16, :32]
    rows = np.flatnonzero((a != b).any(axis=1))
    if not len(rows):
        return None
    row = int(rows[0])
    byte = int(np.flatnonzero(a[row] != b[row])[0])
    native, subject = _lanes(a[row].tobytes()), _lanes(b[row].tobytes())
    return f"zmm{row} byte {byte}:\n    native  {native}\n    subject {subject}"


def _memory_difference(want: bytes, got: bytes) -> str:
    at = next(i for i in range(len(want)) if want[i] != got[i])
    low = at & ~15
    native, subject = want[low : low + 64].hex(" ", 4), got[low : low + 64].hex(" ", 4)
    return f"memory {REGION + at:#x}:\n    native  {native}\n    subject {subject}"


def _lanes(data: bytes) -> str:
    """32-bit lanes, lane 0 first; zero lanes at the end are left out."""
    lanes = [f"{int.from_bytes(data[i : i + 4], 'little'):08x}" for i in range(0, len(data), 4)]
    while len(lanes) > 4 and lanes[-1] == "00000000":
        lanes.pop()
    return " ".join(lanes)


def describe(insn: Insn, state: State) -> str:
    """The registers and memory that ``insn`` uses, as they stand in ``state``."""
    info = InstructionInfoFactory().info(insn.iced)
    lines, seen = [f"  {insn.text() or insn.iced}    [{insn.raw.hex(' ')}]"], set()
    for used in info.used_registers():
        full = RegisterInfo(used.register).full_register
        if full in seen:
            continue
        seen.add(full)
        register = RegisterInfo(full)
        if RegisterExt.is_gpr(full):
            lines.append(f"  {GPR_NAMES[register.number]} = {state.gpr[register.number]:#x}")
        elif RegisterExt.is_vector_register(full):
            lines.append(f"  zmm{register.number} = {_lanes(state.vector(register.number))}")
        elif Register.K0 <= full <= Register.K7:
            lines.append(f"  k{register.number} = {state.opmask[register.number]:#x}")
    if info.used_memory():
        lines += _describe_memory(insn, state)
    if _uses_x87(insn):
        lines.append(f"  st = {_hex(state.st)}  fpsw = {state.fpsw:#x}  fpcw = {state.fpcw:#x}")
    lines.append(f"  rflags = {state.rflags:#x}  mxcsr = {state.mxcsr:#x}")
    return "\n".join(lines)


def _describe_memory(insn: Insn, state: State) -> Iterator[str]:
    for used in InstructionInfoFactory().info(insn.iced).used_memory()[:4]:
        address = linear_address(insn, used, state)
        if address is None:
            continue
        at = address - REGION
        if -64 < at < len(state.memory):
            data = state.memory[max(at, 0) : max(at, 0) + 64]
            yield f"  [{address:#x}] = {_lanes(data)}"
        else:
            yield f"  [{address:#x}] is not mapped"


@dataclass(slots=True)
class Verdict:
    """How often a form was tried, how often it differed, and the first difference in full."""

    form: str
    cases: int = 0
    differences: int = 0
    first: str = ""
    skipped: str = ""
    seconds: float = 0.0
    declined: set[str] = field(default_factory=set)
    """Encodings of the form that the subject does not emulate, as hex."""
    completed: int = 0
    """Cases in which the instruction did not fault on hardware."""
    gaps: dict[str, int] = field(default_factory=dict)
    """How often a known gap explained a difference, by its name."""
    example: tuple[Insn, State] | None = None
    """The first case that differed."""


def check(
    subject: Subject,
    insn: Insn,
    states: Sequence[State],
    flags: int | None = None,
    verdict: Verdict | None = None,
    reconcile: Reconcile | None = None,
) -> Verdict:
    """Run one instruction on all states, natively and by the subject; add up in ``verdict``.

    ``reconcile`` is asked about outcomes that differ: what it explains in full is a gap.
    """
    verdict = verdict or Verdict(insn.form)
    mask = defined_flags(insn) if flags is None else flags
    states = [state for state in states if not is_undefined(insn, state)]
    results = NativeCpu.shared().run_batch([(insn.raw, state) for state in states])
    for state, native in zip(states, results, strict=True):
        try:
            outcome = subject.run(insn, state)
            found = difference(insn, native, outcome, mask)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            found = f"the subject raised {type(error).__name__}: {error}"
        else:
            if found and reconcile is not None:
                outcome, gaps = reconcile(insn, state, native, outcome)
                if gaps:
                    found = difference(insn, native, outcome, mask)
                if not found:
                    for gap in gaps:
                        verdict.gaps[gap] = verdict.gaps.get(gap, 0) + 1
        verdict.cases += 1
        verdict.completed += native.fault is None
        if found:
            verdict.differences += 1
            if verdict.example is None:
                verdict.example = insn, state
                verdict.first = f"{found}\n{describe(insn, state)}"
    return verdict


def sweep(
    subject: Subject,
    forms: Iterable[int],
    cases: int = 32,
    seed: int = 0,
    faults: bool = True,
    mxcsr: Sequence[int] | None = None,
    reconcile: Reconcile | None = None,
    enough: int | None = None,
) -> Iterator[Verdict]:
    """A verdict for each form: all its :func:`~sandbox.encodings.encodings` on random states.

    A form is given up after ``enough`` differences.
    """
    for code in forms:
        verdict = Verdict(FORM_NAMES[code])
        started = time.perf_counter()
        verdict.skipped = not_comparable(verdict.form) or ""
        if verdict.skipped:
            yield verdict
            continue
        for insn in encodings(code):
            missing = missing_features(insn)
            if missing:
                verdict.skipped = f"the host has no {', '.join(missing)}"
                break
            if not subject.accepts(insn):
                verdict.declined.add(insn.raw.hex())
                continue
            states = Cases(insn, seed, faults, mxcsr).take(cases)
            check(subject, insn, states, verdict=verdict, reconcile=reconcile)
            if enough is not None and verdict.differences >= enough:
                break
        verdict.seconds = time.perf_counter() - started
        yield verdict


def table(verdicts: Iterable[Verdict]) -> Iterator[str]:
    """A line of text per form: cases, differences, and the first difference in short."""
    for verdict in verdicts:
        note = verdict.skipped or verdict.first.partition("\n")[0]
        if verdict.declined:
            note = note or f"{len(verdict.declined)} encodings declined: {min(verdict.declined)}"
        yield f"{verdict.form:<48} {verdict.cases:>7} {verdict.differences:>7}  {note}".rstrip()
