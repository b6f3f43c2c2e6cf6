"""Rules for what SSE has no instruction for: lanes chosen or shifted by a vector, signs tested.

Lanes go through memory and general registers one by one: moves, and the shifts of BMI2, leave the
flags alone, and a load by index chooses a lane. That takes a few dozen instructions, where the
handler costs as much as hundreds.
"""

from __future__ import annotations

from functools import partial
from typing import Final, cast

from iced_x86 import MemoryOperand, Register

from handlers.lowered_special import (
    HIGH,
    LOW,
    as_register,
    finish,
    half,
    is_wide,
    permute_in_lane,
    test_wide,
)
from sandbox.lowering import Emitter, Immediate, NotLoweredError, Operand, Rule, is_vector

_TABLE, _INDEX, _RESULT = 0x00, 0x30, 0x50
"""Offsets in spill memory: 32 bytes to choose from and 16 of zeros, 32 of numbers, 32 chosen."""
_MOVES: Final = {
    1: ("MOVZX_R32_RM8", "MOV_RM8_R8"),
    4: ("MOV_R32_RM32", "MOV_RM32_R32"),
    8: ("MOV_R64_RM64", "MOV_RM64_R64"),
}
"""Load and store of a lane, by its size."""


def _sized(number: int, size: int) -> int:
    """A general register, by number, as lanes of so many bytes are loaded to it."""
    return int(Register.RAX if size == 8 else Register.EAX) + number


def _load_halves(e: Emitter, source: Operand, wide: bool) -> list[int]:
    """Both halves of an operand in scratch registers; one that is not ``wide`` has the low one."""
    found = []
    for which in (LOW, HIGH)[: 1 + wide]:
        t = e.scratch()
        e.load(t, half(e, source, which))
        found.append(t)
    return found


def _spill(e: Emitter, at: int, halves: list[int]) -> None:
    for number, register in enumerate(halves):
        e.store(e.spill_at(at + 16 * number), register)


def _keep_bits(e: Emitter, registers: list[int], size: int, bits: int) -> None:
    """Clear all but the lowest ``bits`` of each lane."""
    mask = e.scratch()
    e.emit("PCMPEQD_XMM_XMMM128", mask, mask)
    shift = "PSRLD_XMM_IMM8" if size == 4 else "PSRLQ_XMM_IMM8"
    e.emit(shift, mask, Immediate(8 * size - bits))
    for register in registers:
        e.emit("PAND_XMM_XMMM128", register, mask)


def _pick(e: Emitter, size: int, count: int, table: int = 0, first: int = 0) -> None:
    """``count`` lanes of the result from ``first`` on: those of the table by their numbers."""
    n = e.scratch_gpr()
    load, store = _MOVES[size]
    lane = _sized(n, size)
    for at in range(first * size, (first + count) * size, size):
        e.emit(load, lane, e.spill_at(_INDEX + at))
        e.emit(load, lane, e.spill_chosen(_TABLE + table, _sized(n, 8), size))
        e.emit(store, e.spill_at(_RESULT + at), _low_byte(n) if size == 1 else lane)


def _low_byte(n: int) -> int:
    return int(Register.AL) + n if n < 4 else int(Register.SPL) + n - 4


def _take_result(e: Emitter, d: Operand, wide: bool) -> None:
    t = e.scratch()
    e.load(t, e.spill_at(_RESULT))
    other = None
    if wide:
        other = e.scratch()
        e.load(other, e.spill_at(_RESULT + 16))
    finish(e, d, t, other)


def _permute(e: Emitter) -> None:
    """VPERMD, VPERMPS: eight lanes, each any of eight."""
    d, numbers, source = e.operands
    table, index = _load_halves(e, source, True), _load_halves(e, numbers, True)
    _keep_bits(e, index, 4, 3)
    _spill(e, _TABLE, table)
    _spill(e, _INDEX, index)
    _pick(e, 4, 8)
    _take_result(e, d, True)


def _permute_by_vector(size: int, immediate: Rule, e: Emitter) -> None:
    """VPERMILPS, VPERMILPD by a vector; bit 1 of each number of the latter counts."""
    d, source, numbers = e.operands
    if isinstance(numbers, Immediate):
        immediate(e)
        return
    wide = is_wide(d)
    index, table = _load_halves(e, numbers, wide), _load_halves(e, source, wide)
    if size == 8:
        for register in index:
            e.emit("PSRLQ_XMM_IMM8", register, Immediate(1))
    _keep_bits(e, index, size, 2 if size == 4 else 1)
    _spill(e, _TABLE, table)
    _spill(e, _INDEX, index)
    for which in range(1 + wide):
        _pick(e, size, 16 // size, 16 * which, which * 16 // size)
    _take_result(e, d, wide)


def _shuffle_bytes(e: Emitter) -> None:
    """PSHUFB, VPSHUFB. Numbers with bit 7 set choose 16, where a zero stands."""
    operands = e.operands
    legacy = len(operands) == 2
    d, source, numbers = (operands[0], *operands) if legacy else operands
    wide = is_wide(d)
    if legacy and isinstance(numbers, MemoryOperand):
        t = e.scratch()
        e.emit("MOVAPS_XMM_XMMM128", t, numbers)
        index = [t]
    else:
        index = _load_halves(e, numbers, wide)
    table = _load_halves(e, source, wide)
    _number_bytes(e, index)
    _spill(e, _INDEX, index)
    zero = e.scratch()
    e.emit("PXOR_XMM_XMMM128", zero, zero)
    e.store(e.spill_at(_TABLE + 16), zero)
    for which, register in enumerate(table):
        e.store(e.spill_at(_TABLE), register)
        _pick(e, 1, 16, 0, 16 * which)
    if legacy:
        e.load(as_register(d), e.spill_at(_RESULT))
    else:
        _take_result(e, d, wide)


def _number_bytes(e: Emitter, registers: list[int]) -> None:
    """Each byte modulo 16, but 16 where its bit 7 is set."""
    ones, mask, sixteen = e.scratch(), e.scratch(), e.scratch()
    e.emit("PCMPEQD_XMM_XMMM128", ones, ones)
    e.emit("PXOR_XMM_XMMM128", mask, mask)
    e.emit("PSUBB_XMM_XMMM128", mask, ones)  # 1 in each byte
    e.emit("PSLLW_XMM_IMM8", mask, Immediate(4))
    e.load(sixteen, mask)
    e.emit("PSLLW_XMM_IMM8", mask, Immediate(3))
    e.emit("PADDB_XMM_XMMM128", mask, sixteen)
    e.emit("PADDB_XMM_XMMM128", mask, ones)  # 0x80 + 16 - 1
    for register in registers:
        e.emit("PAND_XMM_XMMM128", register, mask)
        e.emit("PMINUB_XMM_XMMM128", register, sixteen)


# -- shifts -----------------------------------------------------------------------------------


def _shift(size: int, operation: str, e: Emitter) -> None:
    """VPSLLV*, VPSRLV*, VPSRAVD: each lane by its own count, which may be as large as it likes."""
    d, source, counts = e.operands
    wide = is_wide(d)
    count, value = _load_halves(e, counts, wide), _load_halves(e, source, wide)
    if size == 4:
        _limit(e, count, 31 if operation == "SARX" else 32)
    else:
        for register, shifted in zip(count, value, strict=True):
            _clear_overshot(e, register, shifted)
    _spill(e, _TABLE, value)
    _spill(e, _INDEX, count)
    n, by = e.scratch_gpr(), e.scratch_gpr()
    load, store = _MOVES[size]
    width = 4 if operation == "SARX" else 8
    bits = 8 * width
    for at in range(0, 32 if wide else 16, size):
        e.emit(load, _sized(n, size), e.spill_at(_TABLE + at))
        e.emit(load, _sized(by, size), e.spill_at(_INDEX + at))
        lane, amount = _sized(n, width), _sized(by, width)
        e.emit(f"VEX_{operation}_R{bits}_RM{bits}_R{bits}", lane, lane, amount)
        e.emit(store, e.spill_at(_RESULT + at), _sized(n, size))
    _take_result(e, d, wide)


def _limit(e: Emitter, counts: list[int], most: int) -> None:
    """Counts of 32 bits, no larger than ``most``: 31 or 32."""
    limit = e.scratch()
    e.emit("PCMPEQD_XMM_XMMM128", limit, limit)
    e.emit("PSRLD_XMM_IMM8", limit, Immediate(31 if most == 32 else 27))
    if most == 32:
        e.emit("PSLLD_XMM_IMM8", limit, Immediate(5))
    for count in counts:
        e.emit("PMINUD_XMM_XMMM128", count, limit)


def _clear_overshot(e: Emitter, count: int, value: int) -> None:
    """Clear the quadwords whose count is 64 or more."""
    beyond, zero = e.scratch(), e.scratch()
    e.load(beyond, count)
    e.emit("PSRLQ_XMM_IMM8", beyond, Immediate(6))
    e.emit("PXOR_XMM_XMMM128", zero, zero)
    e.emit("PCMPEQQ_XMM_XMMM128", beyond, zero)
    e.emit("PAND_XMM_XMMM128", value, beyond)


# -- tests and comparisons ----------------------------------------------------------------------


def _test_signs(size: int, e: Emitter) -> None:
    """VTESTPS, VTESTPD: PTEST of the sign bits."""
    a, b = e.operands
    wide = is_wide(a)
    signs = _load_halves(e, b, wide)
    mask = e.scratch()
    e.emit("PCMPEQD_XMM_XMMM128", mask, mask)
    e.emit("PSLLD_XMM_IMM8" if size == 4 else "PSLLQ_XMM_IMM8", mask, Immediate(8 * size - 1))
    for register in signs:
        e.emit("PAND_XMM_XMMM128", register, mask)
    if not wide:
        e.emit("PTEST_XMM_XMMM128", as_register(a), signs[0])
        return
    test_wide(e, a, signs)


_SWAPPED: Final = {9: 6, 10: 5, 13: 2, 14: 1}
"""Predicates of VCMP* that are others with the operands exchanged (SDM Vol. 2, CMPPD)."""


def _legacy_predicate(predicate: Operand) -> tuple[int, bool]:
    """A predicate that the legacy form has, and whether the operands are to be exchanged.

    Those from 16 on differ from the ones below only in which NaNs raise a flag.
    """
    kind = cast(Immediate, predicate).value & 15
    if kind > 7 and kind not in _SWAPPED:
        raise NotLoweredError
    return _SWAPPED.get(kind, kind), kind in _SWAPPED


def _compare(legacy: str, e: Emitter) -> None:
    """VCMPPS, VCMPPD."""
    d, a, b, last = e.operands
    predicate, exchanged = _legacy_predicate(last)
    wide = is_wide(d)
    second, first = _load_halves(e, b, wide), _load_halves(e, a, wide)
    if exchanged:
        first, second = second, first
    for t, other in zip(first, second, strict=True):
        e.emit(legacy, t, other, Immediate(predicate))
    finish(e, d, first[0], first[1] if wide else None)


def _compare_scalar(legacy: str, load: str, e: Emitter) -> None:
    """VCMPSS, VCMPSD: the rest of the result is the first source's."""
    d, a, b, last = e.operands
    predicate, exchanged = _legacy_predicate(last)
    other, t = e.scratch(), e.scratch()
    e.emit(load, other, b if isinstance(b, MemoryOperand) else as_register(b))
    e.load(t, as_register(a))
    if exchanged:
        e.emit(legacy, other, t, Immediate(predicate))
        e.emit(load, t, other)
    else:
        e.emit(legacy, t, other, Immediate(predicate))
    finish(e, d, t, None)


def _from_register(legacy: str, load: str, e: Emitter) -> None:
    """A legacy form that the fast path has right with operands in registers only."""
    d, source, *rest = e.operands
    if not isinstance(d, int) or not isinstance(source, MemoryOperand) or not is_vector(d):
        raise NotLoweredError
    t = e.scratch()
    e.emit(load, t, source)
    e.emit(legacy, d, t, *rest)


def _from_memory(legacy: str, e: Emitter) -> None:
    """A legacy form that the fast path has right with a source in memory only."""
    d, source = e.operands
    if not isinstance(source, int):
        raise NotLoweredError
    e.store(e.spill, source)
    e.emit(legacy, d, e.spill)


def _set_condition(form: str, e: Emitter) -> None:
    """SETcc to memory: in a register first, for a store that faults would lose flags."""
    (target,) = e.operands
    if not isinstance(target, MemoryOperand):
        raise NotLoweredError
    byte = _low_byte(e.scratch_gpr())
    e.emit(form, byte)
    e.emit("MOV_RM8_R8", target, byte)


RULES: dict[str, Rule] = {
    "vpermd": _permute,
    "vpermps": _permute,
    "vpermilps": partial(
        _permute_by_vector, 4, partial(permute_in_lane, "SHUFPS_XMM_XMMM128_IMM8", 0)
    ),
    "vpermilpd": partial(
        _permute_by_vector, 8, partial(permute_in_lane, "SHUFPD_XMM_XMMM128_IMM8", 2)
    ),
    "vpshufb": _shuffle_bytes,
    "vpsllvd": partial(_shift, 4, "SHLX"),
    "vpsrlvd": partial(_shift, 4, "SHRX"),
    "vpsravd": partial(_shift, 4, "SARX"),
    "vpsllvq": partial(_shift, 8, "SHLX"),
    "vpsrlvq": partial(_shift, 8, "SHRX"),
    "vtestps": partial(_test_signs, 4),
    "vtestpd": partial(_test_signs, 8),
    "vcmpps": partial(_compare, "CMPPS_XMM_XMMM128_IMM8"),
    "vcmppd": partial(_compare, "CMPPD_XMM_XMMM128_IMM8"),
    "vcmpss": partial(_compare_scalar, "CMPSS_XMM_XMMM32_IMM8", "MOVSS_XMM_XMMM32"),
    "vcmpsd": partial(_compare_scalar, "CMPSD_XMM_XMMM64_IMM8", "MOVSD_XMM_XMMM64"),
}

LEGACY: dict[str, Rule] = {
    **{
        f"SET{condition}_RM8": partial(_set_condition, f"SET{condition}_RM8")
        for condition in "BE A L GE LE G P NP O NO".split()
    },
    "PSHUFB_XMM_XMMM128": _shuffle_bytes,
    "CVTDQ2PD_XMM_XMMM64": partial(_from_register, "CVTDQ2PD_XMM_XMMM64", "MOVQ_XMM_XMMM64"),
    "CVTPS2PD_XMM_XMMM64": partial(_from_register, "CVTPS2PD_XMM_XMMM64", "MOVQ_XMM_XMMM64"),
    "ROUNDSS_XMM_XMMM32_IMM8": partial(
        _from_register, "ROUNDSS_XMM_XMMM32_IMM8", "MOVSS_XMM_XMMM32"
    ),
    "ROUNDSD_XMM_XMMM64_IMM8": partial(
        _from_register, "ROUNDSD_XMM_XMMM64_IMM8", "MOVSD_XMM_XMMM64"
    ),
    "CMPPD_XMM_XMMM128_IMM8": partial(
        _from_register, "CMPPD_XMM_XMMM128_IMM8", "MOVAPD_XMM_XMMM128"
    ),
    **{
        form: partial(_from_memory, form)
        for form in (f"PH{name}_XMM_XMMM128" for name in "ADDW ADDD ADDSW SUBW SUBD SUBSW".split())
    },
}
"""Legacy forms, trapped where the fast path has them wrong, said in what it has right."""
