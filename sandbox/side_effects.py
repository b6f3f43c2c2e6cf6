"""What Unicorn leaves out next to a right value, and what a run does about it.

Unicorn computes SSE floats with the right values and rounding, but it ignores FTZ, never sets the
exception flags in MXCSR and never raises an unmasked exception; its x87 has the same limits. It
does not raise #GP for misaligned 16-byte operands either. A policy says what to do:

``float_flags = "lazy"``
    Float forms run on the fast path while MXCSR and the x87 control word ask for nothing that it
    cannot do. When the guest sets FTZ or DAZ or unmasks an exception, the forms concerned are
    trapped until it sets them back. When it reads MXCSR, or the x87 status word, after float forms
    may have run on the fast path, the run says so, once for each, in ``Stats.notices``.
``float_flags = "exact"``
    Float forms are always trapped.
``alignment = "lazy" | "exact"``
    Left out, or had by trapping the memory operands concerned.

All instructions that change or show MXCSR are intercepted whatever the policy says, so that its
writes are seen here. The instructions that show the x87 status word are trapped until a notice
about it was given, but FNSTSW AX only if more than condition codes is read from it, so that the
comparisons of old code cost nothing (:mod:`sandbox.x87_status`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Final

from sandbox.cpu import Fault
from sandbox.decode import FORM_NAMES, MAX_LENGTH, Insn
from sandbox.engine.protocol import Engine
from sandbox.fallback import lowering_of
from sandbox.lowering import Lowering
from sandbox.memory import PAGE_SIZE, MmioRead
from sandbox.policy import ALLOW, ASK, TRAP, operand_kind
from sandbox.registers import CS
from sandbox.settings import Settings
from sandbox.stats import Notice, Stats
from sandbox.x87_status import FNSTSW_AX, all_read_conditions_only, reads_conditions_only

MASKS, FLAGS, FTZ, DAZ = 0x1F80, 0x3F, 0x8000, 0x40
FPCW_MASKS = 0x3F

_SUFFIXED: Final = tuple(
    name + suffix
    for name in "add sub mul div sqrt min max cmp round".split()
    for suffix in ("ps", "pd", "ss", "sd")
)
SSE_FLOAT: Final = frozenset(
    (
        *_SUFFIXED,
        *"comiss comisd ucomiss ucomisd haddps haddpd hsubps hsubpd addsubps addsubpd dpps dppd "
        "cvtdq2ps cvtpd2dq cvtpd2pi cvtpd2ps cvtpi2ps cvtps2dq cvtps2pd cvtps2pi cvtsd2si cvtsd2ss "
        "cvtsi2sd cvtsi2ss cvtss2sd cvtss2si cvttpd2dq cvttpd2pi cvttps2dq cvttps2pi cvttsd2si "
        "cvttss2si".split(),
    )
)
"""Mnemonics of legacy SSE that read the control bits of MXCSR or set its flags (SDM Vol. 1, 11.5).
RCPPS and RSQRTPS do neither."""

_X87_CONTROL: Final = frozenset(
    "fldcw fnstcw fstcw fninit finit fnclex fclex fnstsw fstsw fldenv fnstenv fstenv fnsave fsave "
    "frstor fnop wait fdisi fneni fnsetpm ffree ffreep fincstp fdecstp fstdw fstsg emms "
    "fdisi fndisi feni frstpm fxsave fxsave64 fxrstor fxrstor64".split()
)
_X87_QUIET: Final = frozenset(
    "fld1 fldz fldpi fldl2e fldl2t fldlg2 fldln2 fild fxch fabs fchs fxam fcmovb fcmove fcmovbe "
    "fcmovu fcmovnb fcmovne fcmovnbe fcmovnu fstpnce".split()
)
"""Mnemonics that raise nothing but stack faults: they make no notice."""
_STATUS_READERS: Final = frozenset("fnstsw fnstenv fnsave".split())
_NEWER: Final = ("VEX_", "EVEX_", "XOP_", "MVEX_", "D3NOW_")
_VEX_ALIGNED: Final = frozenset(
    "vmovaps vmovapd vmovdqa vmovntps vmovntpd vmovntdq vmovntdqa".split()
)
_UNALIGNED: Final = frozenset(
    "movups movupd movdqu lddqu pcmpestri pcmpestrm pcmpistri pcmpistrm".split()
)


def _codes(holds: Callable[[str, str], bool]) -> tuple[int, ...]:
    """The forms without VEX, EVEX or XOP whose mnemonic and name fit."""
    legacy = ((c, n) for c, n in FORM_NAMES.items() if not n.startswith(_NEWER))
    return tuple(code for code, name in legacy if holds(name.split("_", 1)[0].lower(), name))


@lru_cache(maxsize=1)
def sse_float_forms() -> tuple[int, ...]:
    """The forms (iced-x86 ``Code``) of legacy SSE that compute with floats under MXCSR."""
    return _codes(lambda mnemonic, name: mnemonic in SSE_FLOAT and "XMM" in name)


@lru_cache(maxsize=1)
def x87_float_forms() -> tuple[int, ...]:
    """The forms of x87 that compute, load or store: what can raise its exceptions."""
    return _codes(lambda mnemonic, _name: mnemonic[0] == "f" and mnemonic not in _X87_CONTROL)


@lru_cache(maxsize=1)
def x87_raising_forms() -> frozenset[int]:
    """Those of them whose flags the fast path leaves out while the stack does not overflow."""
    return frozenset(_codes(lambda name, _form: name not in _X87_QUIET)) & set(x87_float_forms())


@lru_cache(maxsize=1)
def status_forms() -> frozenset[int]:
    """The forms that show the x87 status word, but for FXSAVE and its like."""
    return frozenset(_codes(lambda mnemonic, _name: mnemonic in _STATUS_READERS))


@lru_cache(maxsize=1)
def aligned_forms() -> tuple[int, ...]:
    """The legacy SSE forms whose memory operand, if they have one, must be aligned."""
    return _codes(lambda mnemonic, name: "M128" in name and mnemonic not in _UNALIGNED)


class SideEffects:
    """Decides what the engine of one vCPU traps: the policy's word, and what side effects need."""

    def __init__(
        self, engine: Engine, settings: Settings, stats: Stats, changed: Callable[[], None]
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._stats = stats
        self._changed = changed
        self._sse = self._x87 = False
        """Whether MXCSR or the x87 control word asks for more than the fast path can do."""
        self._float_ran = self._x87_ran = False
        self._told = self._x87_told = False
        engine.on_float_control = self.float_control

    def apply(self) -> None:
        """Tell the engine which forms to trap; call it when the policy or handlers changed."""
        policy = self._settings.policy
        marks = bytearray(policy.marks)
        exact = policy.float_flags == "exact"
        _replace(marks, sse_float_forms(), ALLOW, ASK)  # to know whether any ran
        if exact or self._sse:
            self._trap(marks, sse_float_forms(), exact)
        if exact or self._x87:
            self._trap(marks, x87_float_forms(), exact)
        _replace(marks, x87_raising_forms(), ALLOW, ASK)
        readers = frozenset() if exact or self._x87_told else status_forms()
        _replace(marks, readers, ALLOW, ASK)
        aligned = frozenset(aligned_forms() if policy.alignment == "exact" else ())
        _replace(marks, aligned, ALLOW, ASK)
        for code in self._settings.intercepted_codes:
            marks[code] = TRAP
        floats, raising = frozenset(sse_float_forms()), x87_raising_forms()

        def traps(insn: Insn) -> bool:
            if not policy.allows(insn):
                return True
            if insn.code in aligned and operand_kind(insn) == "memory":
                return True
            if insn.code in readers:
                return self._shows_x87_flags(insn)
            self._float_ran = self._float_ran or insn.code in floats
            self._x87_ran = self._x87_ran or insn.code in raising
            return False

        lowered = self._lowered if policy.lowering else None
        count = self._settings.count_lowered
        self._engine.set_traps(bytes(marks), traps, lowered, count=count)

    def _lowered(self, insn: Insn) -> Lowering | None:
        """How ``insn`` is lowered: as the handler says that would emulate it."""
        exact = self._settings.policy.alignment == "exact"
        if exact and insn.mnemonic in _VEX_ALIGNED and operand_kind(insn) == "memory":
            return None  # the sequences do not mind
        found = self._settings.handlers.find(insn)
        return lowering_of(found[0], insn, host=self._settings.policy.host) if found else None

    def _trap(self, marks: bytearray, forms: Iterable[int], every: bool) -> None:
        """Trap float forms: every one, or those that a handler takes."""
        takes = self._settings.handlers.takes
        for code in forms:
            if every or takes(code):
                marks[code] = TRAP

    def float_control(self, name: str, value: int) -> None:
        """``mxcsr`` or ``fpcw`` was written."""
        before = self._sse, self._x87
        if name == "mxcsr":
            self._sse = value & MASKS != MASKS or bool(value & (FTZ | DAZ))
        else:
            self._x87 = value & FPCW_MASKS != FPCW_MASKS
        if before != (self._sse, self._x87) and self._settings.policy.float_flags == "lazy":
            self.apply()
            self._changed()

    def mxcsr_shown(self) -> None:
        """The guest reads MXCSR: say so if flags may be missing there."""
        registers = self._engine.registers
        if self._told or not self._float_ran or registers.mxcsr & FLAGS == FLAGS:
            return
        self._told = True
        text = (
            "the guest reads MXCSR, whose exception flags the fast path does not set: "
            'run with float_flags = "exact" if it looks at them'
        )
        self._stats.notices.append(Notice(registers.rip, text))

    def x87_shown(self, insn: Insn) -> None:
        """The guest reads the x87 status word by ``insn``: say so if flags may be missing there."""
        registers = self._engine.registers
        if self._x87_told or not self._x87_ran or registers.bank.read("fpsw") & FLAGS == FLAGS:
            return
        if insn.raw == FNSTSW_AX and self._conditions_only(registers.rip):
            return
        self._x87_told = True
        text = (
            "the guest reads the x87 status word, whose exception flags the fast path does not "
            'set: run with float_flags = "exact" if it looks at them'
        )
        self._stats.notices.append(Notice(registers.rip, text))
        self.apply()
        self._changed()

    def _conditions_only(self, rip: int) -> bool:
        """Whether the code around the FNSTSW AX at RIP reads but condition codes."""
        engine, bitness = self._engine, self._engine.bank.bitness
        base = 0 if bitness == 64 else engine.bank.segment_base(CS)
        try:
            code = engine.memory.fetch(base + rip - 2 & _ADDRESS[bitness], 4 + MAX_LENGTH)
        except (Fault, MmioRead):
            return False
        return reads_conditions_only(code[:2], code[4:], bitness)

    def _shows_x87_flags(self, insn: Insn) -> bool:
        """Whether an instruction that is being translated is to be trapped for what it shows."""
        if insn.raw == FNSTSW_AX:
            memory = self._settings.memory
            pages = (memory.read(number << 12, PAGE_SIZE) for number in memory.code_pages)
            if all_read_conditions_only(pages, insn.bitness):
                return False
        return self._settings.handlers.takes(insn.code)


_ADDRESS: Final = {16: 0xFFFF_FFFF, 32: 0xFFFF_FFFF, 64: 0xFFFF_FFFF_FFFF_FFFF}


def _replace(marks: bytearray, codes: Iterable[int], old: int, new: int) -> None:
    for code in codes:
        if marks[code] == old:
            marks[code] = new
