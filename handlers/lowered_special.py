"""Rules of their own: stores, broadcasts, lanes that change places, masks, VPTEST, VZEROUPPER."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

from iced_x86 import MemoryOperand, Register

from sandbox.decode import FORM_NAMES
from sandbox.lowering import (
    Emitter,
    Immediate,
    Operand,
    Rule,
    number,
    xmm,
)

LOW, HIGH = 0, 1
_SWAP = Immediate(0xEE)
"""PSHUFD: the high quadword into both."""


def as_register(operand: Operand) -> int:
    """The XMM register of a vector register."""
    return xmm(number(cast(int, operand)))


def is_wide(operand: Operand) -> bool:
    return isinstance(operand, int) and Register.YMM0 <= operand <= Register.YMM15


def _form(e: Emitter) -> str:
    return FORM_NAMES[e.insn.code]


def half(e: Emitter, operand: Operand, which: int) -> Operand:
    """One half of a YMM register or of 32 bytes of memory."""
    if isinstance(operand, MemoryOperand):
        return e.memory(16 * which)
    return e.upper(cast(int, operand)) if which else as_register(operand)


def store(e: Emitter, legacy: str, operands: list[Operand]) -> None:
    """A store of at most 16 bytes."""
    if legacy.split("_")[1].endswith("128"):
        store_whole(e, cast(int, operands[1]))
    else:
        e.emit(legacy, *operands)


def store_whole(e: Emitter, low: int, high: Operand | None = None) -> None:
    """A store of 16 or 32 bytes: all of it, or nothing if there is a page that cannot be written.

    The fast path stores 8 bytes at a time, and these whole or not at all. So the first are written
    as they were, then the last; after that nothing can fault.
    """
    t = e.scratch()
    e.emit("MOVQ_XMM_XMMM64", t, e.memory())
    e.emit("MOVQ_XMMM64_XMM", e.memory(), t)
    if high is None:
        e.emit("MOVHPS_M64_XMM", e.memory(8), low)
        e.emit("MOVLPS_M64_XMM", e.memory(), low)
        return
    e.load(t, high)
    e.emit("MOVHPS_M64_XMM", e.memory(24), t)
    e.emit("MOVLPS_M64_XMM", e.memory(16), t)
    e.store(e.memory(), low)


def finish(e: Emitter, d: Operand, low: int, high: Operand | None) -> None:
    """Write a result: its halves, the upper one zero if None. Nothing can fault any more."""
    if high is None:
        e.zero_upper(cast(int, d))
    elif isinstance(high, MemoryOperand):
        t = e.scratch()
        e.load(t, high)
        e.store(e.upper(cast(int, d)), t)
    else:
        e.store(e.upper(cast(int, d)), cast(int, high))
    e.load(as_register(d), low)


# -- broadcasts -------------------------------------------------------------------------------


def _broadcast(bits: int, e: Emitter) -> None:
    """VPBROADCAST*, VBROADCASTS*."""
    d, source = e.operands
    t = e.scratch()
    plain = source if isinstance(source, MemoryOperand) else as_register(source)
    if bits == 64:
        e.emit("MOVDDUP_XMM_XMMM64", t, plain)
    elif bits == 32:
        _load_low(e, t, source, "MOVD_XMM_RM32")
        e.emit("PSHUFD_XMM_XMMM128_IMM8", t, t, Immediate(0))
    else:
        _load_low(e, t, source, "PINSRW_XMM_R32M16_IMM8" if bits == 16 else "PINSRB_XMM_R32M8_IMM8")
        if bits == 8:
            e.emit("PUNPCKLBW_XMM_XMMM128", t, t)
        e.emit("PSHUFLW_XMM_XMMM128_IMM8", t, t, Immediate(0))
        e.emit("PUNPCKLQDQ_XMM_XMMM128", t, t)
    finish(e, d, t, t if is_wide(d) else None)


def _load_low(e: Emitter, t: int, source: Operand, load: str) -> None:
    if not isinstance(source, MemoryOperand):
        e.load(t, as_register(source))
    elif load.startswith("PINSR"):
        e.emit(load, t, source, Immediate(0))
    else:
        e.emit(load, t, source)


def _broadcast_128(e: Emitter) -> None:
    d, source = e.operands
    t = e.scratch()
    e.load(t, source)
    finish(e, d, t, t)


# -- lanes of 128 bits ------------------------------------------------------------------------


def _extract_128(e: Emitter) -> None:
    d, source, which = e.operands
    part = half(e, source, cast(Immediate, which).value & 1)
    if isinstance(d, MemoryOperand):
        if isinstance(part, MemoryOperand):
            t = e.scratch()
            e.load(t, part)
            part = t
        store_whole(e, cast(int, part))
        return
    e.load(as_register(d), part)
    e.zero_upper(cast(int, d))


def _insert_128(e: Emitter) -> None:
    d, a, b, which = e.operands
    t = e.scratch()
    e.load(t, b if isinstance(b, MemoryOperand) else as_register(b))
    if cast(Immediate, which).value & 1:
        finish(e, d, as_register(a), t)
    else:
        finish(e, d, t, e.upper(cast(int, a)))


def _permute_128(e: Emitter) -> None:
    d, a, b, control = e.operands
    bits = cast(Immediate, control).value
    results = []
    for field in (bits, bits >> 4):
        t = e.scratch()
        if field & 8:
            e.emit("PXOR_XMM_XMMM128", t, t)
        else:
            e.load(t, half(e, b if field & 2 else a, field & 1))
        results.append(t)
    if isinstance(b, MemoryOperand):
        _touch(e)
    finish(e, d, results[0], results[1])


def _touch(e: Emitter) -> None:
    """Read both halves of a memory operand, as the instruction does."""
    t = e.scratch()
    e.load(t, e.memory())
    e.load(t, e.memory(16))


def _permute_quads(e: Emitter) -> None:
    """VPERMQ, VPERMPD by immediate."""
    d, source, control = e.operands
    picks = [cast(Immediate, control).value >> 2 * n & 3 for n in range(4)]
    if isinstance(source, MemoryOperand):
        _touch(e)
    results = []
    for i, j in (picks[:2], picks[2:]):
        t = e.scratch()
        e.load(t, half(e, source, i >> 1))
        select = Immediate(i & 1 | (j & 1) << 1)
        e.emit("SHUFPD_XMM_XMMM128_IMM8", t, half(e, source, j >> 1), select)
        results.append(t)
    finish(e, d, results[0], results[1])


def permute_in_lane(legacy: str, split: int, e: Emitter) -> None:
    """VPERMILPS, VPERMILPD by immediate: SHUFPS of a register with itself."""
    d, source, last = e.operands
    control = cast(Immediate, last)
    results = []
    for which in (LOW, HIGH)[: 1 + is_wide(d)]:
        t = e.scratch()
        e.load(t, half(e, source, which))
        mask = 3 if split else 255
        e.emit(legacy, t, t, Immediate(control.value >> split * which & mask))
        results.append(t)
    finish(e, d, results[0], results[1] if is_wide(d) else None)


def _blend_dwords(e: Emitter) -> None:
    """VPBLENDD: PBLENDW with each bit of the immediate twice."""
    d, a, b, control = e.operands
    results = []
    for which in (LOW, HIGH)[: 1 + is_wide(d)]:
        bits = cast(Immediate, control).value >> 4 * which
        words = sum(3 << 2 * n for n in range(4) if bits >> n & 1)
        t = e.scratch()
        e.load(t, half(e, a, which))
        e.emit("PBLENDW_XMM_XMMM128_IMM8", t, half(e, b, which), Immediate(words))
        results.append(t)
    finish(e, d, results[0], results[1] if is_wide(d) else None)


def _duplicate_doubles(e: Emitter) -> None:
    """VMOVDDUP."""
    d, source = e.operands
    results = []
    for which in (LOW, HIGH)[: 1 + is_wide(d)]:
        t = e.scratch()
        e.emit("MOVDDUP_XMM_XMMM64", t, half(e, source, which))
        results.append(t)
    if is_wide(d) and isinstance(source, MemoryOperand):
        _touch(e)
    finish(e, d, results[0], results[1] if is_wide(d) else None)


# -- other widths -----------------------------------------------------------------------------


def _widen(legacy: str, step: int, e: Emitter) -> None:
    """The source has half the width or less: ``step`` bytes of it make 16 of the result."""
    d, source = e.operands
    t = e.scratch()
    plain = source if isinstance(source, MemoryOperand) else as_register(source)
    if not is_wide(d):
        _widen_part(e, legacy, t, plain)
        finish(e, d, t, None)
        return
    other = e.scratch()
    _widen_part(e, legacy, t, plain)
    if isinstance(source, MemoryOperand):
        _widen_part(e, legacy, other, e.memory(step))
    else:
        e.load(other, plain)
        e.emit("PSRLDQ_XMM_IMM8", other, Immediate(step))
        e.emit(legacy, other, other)
    finish(e, d, t, other)


def _widen_part(e: Emitter, legacy: str, t: int, source: Operand) -> None:
    if legacy.startswith("CVT") and isinstance(source, MemoryOperand):  # not right from memory
        e.emit("MOVQ_XMM_XMMM64", t, source)
        source = t
    e.emit(legacy, t, source)


def _narrow_doubles(legacy: str, e: Emitter) -> None:
    """VCVTPD2PS and its kin: four doubles make one XMM register."""
    d, source = e.operands
    t = e.scratch()
    e.emit(legacy, t, half(e, source, LOW))
    if "256" in _form(e):
        other = e.scratch()
        e.emit(legacy, other, half(e, source, HIGH))
        e.emit("PUNPCKLQDQ_XMM_XMMM128", t, other)
    finish(e, d, t, None)


# -- masks and flags --------------------------------------------------------------------------


def _byte_mask(e: Emitter) -> None:
    """VPMOVMSKB: the halves' masks put together in memory, since shifts would change flags."""
    d, source = e.operands
    assert isinstance(d, int)
    if not is_wide(source):
        e.emit("PMOVMSKB_R32_XMM", d, as_register(source))
        return
    t = e.scratch()
    e.load(t, e.upper(cast(int, source)))
    e.emit("PMOVMSKB_R32_XMM", d, t)
    e.emit("MOV_RM32_R32", e.spill_at(2), d)
    e.emit("PMOVMSKB_R32_XMM", d, as_register(source))
    e.emit("MOV_RM16_R16", e.spill, _of_size(d, Register.AX))
    e.emit("MOV_R32_RM32", d, e.spill)


def _of_size(register: int, first: int) -> int:
    """A general register of 32 or 64 bits as one of another size."""
    base = Register.EAX if register <= Register.R15D else Register.RAX
    return int(first) + (register - base)


def _sign_mask(e: Emitter) -> None:
    """VMOVMSKPS, VMOVMSKPD."""
    d, source = e.operands
    assert isinstance(d, int)
    double = "PD" in _form(e)
    low = as_register(source)
    if not is_wide(source):
        e.emit("MOVMSKPD_R32_XMM" if double else "MOVMSKPS_R32_XMM", d, low)
        return
    t = e.scratch()
    e.load(t, low)
    upper = e.upper(cast(int, source))
    if double:
        e.emit("SHUFPS_XMM_XMMM128_IMM8", t, upper, Immediate(0xDD))
        e.emit("MOVMSKPS_R32_XMM", d, t)
        return
    e.emit("PACKSSDW_XMM_XMMM128", t, upper)
    e.emit("PACKSSWB_XMM_XMMM128", t, t)
    e.emit("MOVQ_XMM_XMMM64", t, t)
    e.emit("PMOVMSKB_R32_XMM", d, t)


def _test(e: Emitter) -> None:
    """VPTEST: ZF = no bit in both, CF = no bit in the second alone; SDM Vol. 2, PTEST."""
    a, b = e.operands
    if not is_wide(a):
        plain = b if isinstance(b, MemoryOperand) else as_register(b)
        e.emit("PTEST_XMM_XMMM128", as_register(a), plain)
        return
    test_wide(e, a, [half(e, b, which) for which in (LOW, HIGH)])


def test_wide(e: Emitter, a: Operand, b: Sequence[Operand]) -> None:
    """PTEST of a YMM register with two halves."""
    both, alone = (_folded(e, a, b, f"{name}_XMM_XMMM128") for name in ("PAND", "PANDN"))
    e.emit("PUNPCKLQDQ_XMM_XMMM128", both, alone)
    ones = e.scratch()
    e.emit("PCMPEQD_XMM_XMMM128", ones, ones)
    e.emit("PSRLDQ_XMM_IMM8", ones, Immediate(8))
    e.emit("PTEST_XMM_XMMM128", ones, both)


def _folded(e: Emitter, a: Operand, b: Sequence[Operand], operation: str) -> int:
    """All four quadwords of ``a operation b`` ORed into the lowest."""
    t, other = e.scratch(), e.scratch()
    e.load(t, half(e, a, LOW))
    e.emit(operation, t, b[LOW])
    e.load(other, half(e, a, HIGH))
    e.emit(operation, other, b[HIGH])
    e.emit("POR_XMM_XMMM128", t, other)
    e.emit("PSHUFD_XMM_XMMM128_IMM8", other, t, _SWAP)
    e.emit("POR_XMM_XMMM128", t, other)
    return t


_SIGNS = {
    "vpblendvb": ("PCMPGTB_XMM_XMMM128", False),
    "vblendvps": ("PCMPGTD_XMM_XMMM128", False),
    "vblendvpd": ("PCMPGTD_XMM_XMMM128", True),
}


def _blend_variable(compare: str, quads: bool, e: Emitter) -> None:
    """By the sign of each lane of the fourth operand: (b & mask) | (a & ~mask)."""
    d, a, b, mask = e.operands
    results = []
    for which in (LOW, HIGH)[: 1 + is_wide(d)]:
        t = e.scratch()
        e.emit("PXOR_XMM_XMMM128", t, t)
        e.emit(compare, t, half(e, mask, which))
        if quads:
            e.emit("PSHUFD_XMM_XMMM128_IMM8", t, t, Immediate(0xF5))
        chosen = e.scratch()
        e.load(chosen, half(e, b, which))
        e.emit("PAND_XMM_XMMM128", chosen, t)
        e.emit("PANDN_XMM_XMMM128", t, half(e, a, which))
        e.emit("POR_XMM_XMMM128", t, chosen)
        results.append(t)
    finish(e, d, results[0], results[1] if is_wide(d) else None)


def _zero(registers: bool, e: Emitter) -> None:
    """VZEROUPPER, VZEROALL."""
    t = xmm(0) if registers else e.scratch()
    e.emit("PXOR_XMM_XMMM128", t, t)
    for n in range(16):
        e.store(e.upper(xmm(n)), t)
    for n in range(1, 16 if registers else 0):
        e.load(xmm(n), t)


_EXTENSIONS = ("bw", 8), ("bd", 4), ("bq", 2), ("wd", 8), ("wq", 4), ("dq", 8)

RULES: dict[str, Rule] = {
    "vbroadcastss": partial(_broadcast, 32),
    "vbroadcastsd": partial(_broadcast, 64),
    "vpbroadcastb": partial(_broadcast, 8),
    "vpbroadcastw": partial(_broadcast, 16),
    "vpbroadcastd": partial(_broadcast, 32),
    "vpbroadcastq": partial(_broadcast, 64),
    "vbroadcastf128": _broadcast_128,
    "vbroadcasti128": _broadcast_128,
    "vextractf128": _extract_128,
    "vextracti128": _extract_128,
    "vinsertf128": _insert_128,
    "vinserti128": _insert_128,
    "vperm2f128": _permute_128,
    "vperm2i128": _permute_128,
    "vpermq": _permute_quads,
    "vpermpd": _permute_quads,
    "vpblendd": _blend_dwords,
    "vmovddup": _duplicate_doubles,
    "vcvtdq2pd": partial(_widen, "CVTDQ2PD_XMM_XMMM64", 8),
    "vcvtps2pd": partial(_widen, "CVTPS2PD_XMM_XMMM64", 8),
    "vcvtpd2ps": partial(_narrow_doubles, "CVTPD2PS_XMM_XMMM128"),
    "vcvtpd2dq": partial(_narrow_doubles, "CVTPD2DQ_XMM_XMMM128"),
    "vcvttpd2dq": partial(_narrow_doubles, "CVTTPD2DQ_XMM_XMMM128"),
    "vpmovmskb": _byte_mask,
    "vmovmskps": _sign_mask,
    "vmovmskpd": _sign_mask,
    "vptest": _test,
    "vzeroupper": partial(_zero, False),
    "vzeroall": partial(_zero, True),
    **{
        f"vpmov{kind}x{pair}": partial(
            _widen, f"PMOV{kind.upper()}X{pair.upper()}_XMM_XMMM{8 * step}", step
        )
        for kind in ("s", "z")
        for pair, step in _EXTENSIONS
    },
    **{name: partial(_blend_variable, *how) for name, how in _SIGNS.items()},
}
