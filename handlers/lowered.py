"""How vector instructions are lowered: which of them the SSE instructions of the fast path make.

A rule belongs to a mnemonic, as the semantics of an operation do; :func:`rule_for` finds it. Most
come from two observations: a VEX.128 form is its legacy twin, with a destination of its own and
the upper half cleared; and most VEX.256 forms are the twin on either half, ``PER_LANE``. What has
no twin has rules of its own, beside this file, or is left to the handlers.
"""

from __future__ import annotations

from functools import cache, partial
from typing import TypeAlias

from iced_x86 import Code, EncodingKind, MemoryOperand

from handlers import lowered_lanes, lowered_masked, lowered_special
from sandbox.decode import FORM_NAMES, MNEMONIC_NAMES, Insn
from sandbox.lowering import (
    Emitter,
    Immediate,
    Operand,
    Rule,
    is_vector,
    number,
    xmm,
)

PER_LANE = frozenset(
    f"v{name}"
    for name in (
        # integers
        "paddb paddw paddd paddq paddsb paddsw paddusb paddusw psubb psubw psubd psubq psubsb "
        "psubsw psubusb psubusw pmullw pmulld pmulhw pmulhuw pmulhrsw pmuludq pmuldq pmaddwd "
        "pmaddubsw pavgb pavgw psadbw pabsb pabsw pabsd psignb psignw psignd pminsb pminsw pminsd "
        "pminub pminuw pminud pmaxsb pmaxsw pmaxsd pmaxub pmaxuw pmaxud phaddw phaddd phaddsw "
        "phsubw phsubd phsubsw pand pandn por pxor pcmpeqb pcmpeqw pcmpeqd pcmpeqq pcmpgtb "
        "pcmpgtw pcmpgtd pcmpgtq psllw pslld psllq psrlw psrld psrlq psraw psrad pslldq psrldq "
        # order
        "pshufb pshufd pshufhw pshuflw punpcklbw punpcklwd punpckldq punpcklqdq punpckhbw "
        "punpckhwd punpckhdq punpckhqdq packsswb packssdw packuswb packusdw palignr pblendw "
        "shufps unpcklps unpckhps unpcklpd unpckhpd movshdup movsldup "
        # moves
        "movaps movapd movups movupd movdqa movdqu lddqu movntdqa movntps movntpd movntdq "
        # floats
        "andps andpd andnps andnpd orps orpd xorps xorpd addps addpd subps subpd mulps mulpd "
        "divps divpd minps minpd maxps maxpd sqrtps sqrtpd addsubps addsubpd haddps "
        "haddpd hsubps hsubpd roundps roundpd cvtdq2ps cvtps2dq cvttps2dq rcpps rsqrtps dpps "
        "aesenc aesenclast aesdec aesdeclast pclmulqdq"
    ).split()
)
"""Mnemonics whose 256-bit form does to each 128-bit lane what the legacy form does."""

SPLIT_IMMEDIATES = {
    "vshufpd": (0, 2, 3),
    "vblendps": (0, 4, 15),
    "vblendpd": (0, 2, 3),
    "vmpsadbw": (0, 3, 7),
}
"""The same with an immediate of its own for each lane: their shifts, and the mask of both."""

_TWINS = {
    "VEX_VMOVSS_XMM_XMM_XMM": "MOVSS_XMM_XMMM32",
    "VEX_VMOVSD_XMM_XMM_XMM": "MOVSD_XMM_XMMM64",
    "VEX_VMOVSS_XMM_XMM_XMM_0F11": "MOVSS_XMM_XMMM32",
    "VEX_VMOVSD_XMM_XMM_XMM_0F11": "MOVSD_XMM_XMMM64",
    "VEX_VMOVSS_XMM_M32": "MOVSS_XMM_XMMM32",
    "VEX_VMOVSD_XMM_M64": "MOVSD_XMM_XMMM64",
    "VEX_VMOVSS_M32_XMM": "MOVSS_XMMM32_XMM",
    "VEX_VMOVSD_M64_XMM": "MOVSD_XMMM64_XMM",
}
_MOVES = frozenset(
    f"{name}_XMM_{memory}"
    for name in (
        "MOVUPS MOVUPD MOVDQU LDDQU MOVAPS MOVAPD MOVDQA MOVNTDQA MOVSHDUP MOVSLDUP".split()
    )
    for memory in ("XMMM128", "M128")
)
_NEVER = frozenset("vldmxcsr vstmxcsr vmaskmovdqu vpcmpistri vpcmpistrm".split())
_FROM_REGISTER = {
    "ROUNDSS_XMM_XMMM32_IMM8": "MOVSS_XMM_XMMM32",
    "ROUNDSD_XMM_XMMM64_IMM8": "MOVSD_XMM_XMMM64",
}
"""Legacy forms that the fast path has right with operands in registers only, and what loads one."""

_SPECIAL = lowered_special.RULES, lowered_lanes.RULES, lowered_masked.RULES

Twin: TypeAlias = tuple[str, bool]
"""Name of the legacy form, and whether VEX gives it a first source of its own (NDS)."""


@cache
def twin(form: int) -> Twin | None:
    """The legacy form that does to XMM registers what a VEX form does."""
    name = FORM_NAMES[form]
    if not name.startswith("VEX_V"):
        return None
    if name in _TWINS:
        return _TWINS[name], name.startswith(("VEX_VMOVSS_XMM_XMM", "VEX_VMOVSD_XMM_XMM"))
    plain = name.removeprefix("VEX_V").replace("YMM", "XMM").replace("256", "128")
    mnemonic, _, rest = plain.partition("_")
    for candidate, has_first in (
        (plain, False),
        (f"{mnemonic}_{rest.removeprefix('XMM_')}", True),
    ):
        if hasattr(Code, candidate) and candidate != "NONE":
            return candidate, has_first
    return None


@cache
def rule_for(form: int, mnemonic: int, encoding: int) -> Rule | None:
    """The rule that lowers a form (an iced-x86 ``Code``), if there is one."""
    name = MNEMONIC_NAMES[mnemonic]
    if encoding == EncodingKind.LEGACY:
        return lowered_lanes.LEGACY.get(FORM_NAMES[form])
    if encoding != EncodingKind.VEX or name in _NEVER:
        return None
    special = next((rules[name] for rules in _SPECIAL if name in rules), None)
    if special is not None:
        return special
    found = twin(form)
    if found is None:
        return None
    legacy, has_first = found
    if "YMM" not in FORM_NAMES[form]:
        return partial(_narrow, legacy, has_first)
    if name in PER_LANE:
        return partial(_per_lane, legacy, has_first, (0, 0, 255))
    if name in SPLIT_IMMEDIATES:
        return partial(_per_lane, legacy, has_first, SPLIT_IMMEDIATES[name])
    return None


def rule_of(insn: Insn) -> Rule | None:
    """The same for an instruction."""
    return rule_for(insn.code, insn.iced.mnemonic, insn.iced.encoding)


def _low(operand: Operand) -> Operand:
    """The XMM register of a vector register; any other operand as it is."""
    return xmm(number(operand)) if is_vector(operand) else operand  # type: ignore[arg-type]


def _operands(legacy: str, e: Emitter) -> list[Operand]:
    """The operands, YMM registers as their lower half; in registers or memory where the legacy
    form is right with one of them only."""
    operands = [_low(operand) for operand in e.operands]
    last = operands[2] if len(operands) > 2 else None
    load = _FROM_REGISTER.get(legacy)
    if load is not None and isinstance(last, MemoryOperand):
        operands[2] = t = e.scratch()
        e.emit(load, t, last)
    elif legacy.startswith(("PHADD", "PHSUB")) and isinstance(last, int):
        e.store(e.spill, last)
        operands[2] = e.spill
    return operands


def _narrow(legacy: str, has_first: bool, e: Emitter) -> None:
    """A VEX.128 form: the legacy form, then the upper half of the destination cleared."""
    operands = _operands(legacy, e)
    if isinstance(operands[0], MemoryOperand):
        lowered_special.store(e, legacy, operands)
        return
    if has_first:
        _with_first(e, legacy, operands)
    elif isinstance(operands[1], MemoryOperand) and legacy in _MOVES:
        t = e.scratch()  # the fast path would change half of a register before a fault
        e.emit(legacy, t, operands[1])
        e.load(operands[0], t)  # type: ignore[arg-type]
    else:
        e.emit(legacy, *operands)
    if is_vector(operands[0]) and "COMIS" not in legacy:  # which compares, and writes flags
        e.zero_upper(operands[0])  # type: ignore[arg-type]


def _with_first(e: Emitter, legacy: str, operands: list[Operand]) -> None:
    """``d, a, b``: a copy of ``a`` in ``d``, then the two-operand form."""
    d, a, *rest = operands
    assert isinstance(d, int) and isinstance(a, int)
    if d == a:
        e.emit(legacy, d, *rest)
    elif isinstance(rest[0], MemoryOperand):
        t = e.scratch()
        e.load(t, a)
        e.emit(legacy, t, *rest)
        e.load(d, t)
    elif rest[0] == d:
        t = e.scratch()
        e.load(t, d)
        e.load(d, a)
        e.emit(legacy, d, t, *rest[1:])
    else:
        e.load(d, a)
        e.emit(legacy, d, *rest)


def _per_lane(legacy: str, has_first: bool, split: tuple[int, int, int], e: Emitter) -> None:
    """A VEX.256 form: the legacy form on either half."""
    low = _operands(legacy, e)
    if isinstance(low[0], MemoryOperand):
        source = low[1]
        assert isinstance(source, int)
        lowered_special.store_whole(e, source, e.upper(source))
        return
    shift_low, shift_high, mask = split
    high = list(low)
    for at, operand in enumerate(e.operands):
        if isinstance(operand, Immediate):
            low[at] = Immediate(operand.value >> shift_low & mask)
            high[at] = Immediate(operand.value >> shift_high & mask)
        elif is_vector(operand):
            high[at] = e.upper(operand) if _is_ymm(e, at) else low[at]  # type: ignore[arg-type]
        elif isinstance(operand, MemoryOperand) and _is_wide_memory(e):
            high[at] = e.memory(16)
    d = low[0]
    assert isinstance(d, int)
    t = e.scratch()
    if not has_first:
        if legacy.endswith("_XMMM128_XMM"):  # the store of that name, between registers
            legacy = f"{legacy.split('_')[0]}_XMM_XMMM128"
        e.emit(legacy, t, *high[1:])
        e.emit(legacy, d, *low[1:])
        e.store(e.upper(d), t)
        return
    e.load(t, high[1])
    e.emit(legacy, t, *high[2:])
    if low[1] != d and isinstance(low[2], MemoryOperand):
        other = e.scratch()
        e.load(other, low[1])
        e.emit(legacy, other, *low[2:])
        e.store(e.upper(d), t)
        e.load(d, other)
    elif isinstance(low[2], MemoryOperand):
        e.emit(legacy, d, *low[2:])
        e.store(e.upper(d), t)
    else:
        e.store(e.upper(d), t)
        _with_first(e, legacy, low)


def _is_ymm(e: Emitter, at: int) -> bool:
    return "YMM" in FORM_NAMES[e.insn.code].split("_")[2 + at]


def _is_wide_memory(e: Emitter) -> bool:
    return "M256" in FORM_NAMES[e.insn.code]
