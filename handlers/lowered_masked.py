"""Rules for what a mask picks lane by lane from memory: gathers, and moves under a mask.

No lane that is masked out may fault. So the address of each lane is chosen, from a table of two by
the mask's bit, before it is accessed: its own, or one in memory of the machine's own. Flags stay as
they are, since moves and LEA leave them alone.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from iced_x86 import Instruction, MemoryOperand, Register, RegisterExt

from handlers.lowered_special import HIGH, LOW, finish, half, is_wide
from sandbox.lowering import Emitter, Immediate, NotLoweredError, Operand, Rule, number, signed, xmm

_INDEX, _MASK, _LANES, _PLACES, _CHOICE, _NOWHERE = 0x00, 0x20, 0x40, 0x60, 0xA0, 0xB0
"""Offsets in spill memory: 32 bytes of indices, of mask bits, of lanes; 8 addresses; the two to
choose from; 8 bytes that stand for lanes that are masked out."""
_LOADS: Final = {4: "MOV_R32_RM32", 8: "MOV_R64_RM64"}
_STORES: Final = {4: "MOV_RM32_R32", 8: "MOV_RM64_R64"}
_FLAT: Final = (Register.DS, Register.SS, Register.ES, Register.CS)


def _sized(n: int, size: int) -> int:
    return int(Register.RAX if size == 8 else Register.EAX) + n


class _Lanes:
    """What the rules do for each lane of ``size`` bytes: two scratch registers are theirs."""

    def __init__(self, e: Emitter, size: int) -> None:
        if e.insn.memory_segment not in _FLAT:
            raise NotLoweredError  # a lane that is masked out lies in no segment
        self.e = e
        self.size = size
        self.first = e.scratch_gpr()
        self.second = e.scratch_gpr()
        self.address = _sized(self.first, 8)
        zero = e.scratch()
        e.emit("PXOR_XMM_XMMM128", zero, zero)
        e.emit("MOVQ_XMMM64_XMM", e.spill_at(_NOWHERE), zero)
        e.emit("LEA_R64_M", self.address, e.spill_at(_NOWHERE))
        e.emit("MOV_RM64_R64", e.spill_at(_CHOICE), self.address)

    def spill_mask(self, mask: list[int]) -> None:
        """Leave 1 in memory for each lane that is chosen, 0 for the others."""
        e, size = self.e, self.size
        for which, register in enumerate(mask):
            t = e.scratch()
            e.load(t, register)
            e.emit("PSRLD_XMM_IMM8" if size == 4 else "PSRLQ_XMM_IMM8", t, Immediate(8 * size - 1))
            e.store(e.spill_at(_MASK + 16 * which), t)

    def choose(self, lane: int) -> None:
        """``address`` stays as it is if the lane is chosen, else it leads to nowhere."""
        e = self.e
        e.emit("MOV_RM64_R64", e.spill_at(_CHOICE + 8), self.address)
        bit = _sized(self.second, self.size)
        e.emit(_LOADS[self.size], bit, e.spill_at(_MASK + self.size * lane))
        choice = e.spill_chosen(_CHOICE, _sized(self.second, 8), 8)
        e.emit("MOV_R64_RM64", self.address, choice)

    def there(self) -> MemoryOperand:
        """Memory at ``address``."""
        return MemoryOperand(self.address)  # type: ignore[arg-type]

    def load(self, lane: int, source: MemoryOperand) -> None:
        """Put a lane where the result is collected."""
        value = _sized(self.second, self.size)
        self.e.emit(_LOADS[self.size], value, source)
        self.e.emit(_STORES[self.size], self.e.spill_at(_LANES + self.size * lane), value)


def _halves(e: Emitter, operand: Operand, wide: bool) -> list[int]:
    found = []
    for which in (LOW, HIGH)[: 1 + wide]:
        t = e.scratch()
        e.load(t, half(e, operand, which))
        found.append(t)
    return found


# -- gathers ----------------------------------------------------------------------------------


def _gather(size: int, index_size: int, e: Emitter) -> None:
    """VPGATHER*, VGATHER*. If an element faults, the handler does it all, from the start."""
    insn = e.insn
    d, index, mask = (int(r) for r in (insn.op0_register, insn.memory_index, insn.op2_register))
    if len({number(r) for r in (d, index, mask)}) < 3 or RegisterExt.is_gpr32(insn.memory_base):
        raise NotLoweredError  # the first is #UD
    wide, wide_index = is_wide(d), is_wide(index)
    count = min((32 if wide else 16) // size, (32 if wide_index else 16) // index_size)
    lanes = _Lanes(e, size)
    masks = _halves(e, mask, wide)
    lanes.spill_mask(masks)
    for which, register in enumerate(_halves(e, index, wide_index)):
        e.store(e.spill_at(_INDEX + 16 * which), register)
    for lane in range(count):
        extend = "MOVSXD_R64_RM32" if index_size == 4 else "MOV_R64_RM64"
        e.emit(extend, lanes.address, e.spill_at(_INDEX + index_size * lane))
        e.emit("LEA_R64_M", lanes.address, _element(insn, lanes.address))
        lanes.choose(lane)
        lanes.load(lane, lanes.there())
    results = [_blended(e, size, d, masks[which], which) for which in range(1 + wide)]
    if count * size < 16:
        e.emit("MOVQ_XMM_XMMM64", results[0], results[0])
    finish(e, d, results[0], results[1] if wide else None)
    low = xmm(number(mask))
    e.emit("PXOR_XMM_XMMM128", low, low)
    e.zero_upper(mask)


def _element(insn: Instruction, index: int) -> MemoryOperand:
    base = insn.memory_base
    displacement = signed(insn.memory_displacement)
    size = 8 if base == Register.NONE else 1
    scale = insn.memory_index_scale
    return MemoryOperand(base, index, scale, displacement, size)  # type: ignore[arg-type]


def _blended(e: Emitter, size: int, d: Operand, mask: int, which: int) -> int:
    """The lanes collected where the mask's sign is set, else those of the destination."""
    chosen = e.scratch()
    if size == 4:
        e.load(chosen, mask)
        e.emit("PSRAD_XMM_IMM8", chosen, Immediate(31))
    else:
        e.emit("PSHUFD_XMM_XMMM128_IMM8", chosen, mask, Immediate(0xF5))
        e.emit("PSRAD_XMM_IMM8", chosen, Immediate(31))
    t = e.scratch()
    e.load(t, e.spill_at(_LANES + 16 * which))
    e.emit("PAND_XMM_XMMM128", t, chosen)
    e.emit("PANDN_XMM_XMMM128", chosen, half(e, d, which))
    e.emit("POR_XMM_XMMM128", t, chosen)
    return t


# -- moves under a mask -------------------------------------------------------------------------


def _move(size: int, e: Emitter) -> None:
    """VMASKMOV*, VPMASKMOV*: a load clears the lanes that are masked out, a store leaves them."""
    if RegisterExt.is_gpr32(e.insn.memory_base):
        raise NotLoweredError
    target, mask, source = e.operands
    wide = is_wide(mask)
    lanes = _Lanes(e, size)
    lanes.spill_mask(_halves(e, mask, wide))
    count = (32 if wide else 16) // size
    if isinstance(target, MemoryOperand):
        _store(e, lanes, _halves(e, source, wide), count)
        return
    for lane in range(count):
        e.emit("LEA_R64_M", lanes.address, e.memory(size * lane))
        lanes.choose(lane)
        lanes.load(lane, lanes.there())
    results = []
    for which in range(1 + wide):
        t = e.scratch()
        e.load(t, e.spill_at(_LANES + 16 * which))
        results.append(t)
    finish(e, target, results[0], results[1] if wide else None)


def _store(e: Emitter, lanes: _Lanes, source: list[int], count: int) -> None:
    """Each lane is first written as it was: whatever faults does so before anything changes."""
    size = lanes.size
    for which, register in enumerate(source):
        e.store(e.spill_at(_LANES + 16 * which), register)
    value = _sized(lanes.second, size)
    for lane in range(count):
        e.emit("LEA_R64_M", lanes.address, e.memory(size * lane))
        lanes.choose(lane)
        e.emit("MOV_RM64_R64", e.spill_at(_PLACES + 8 * lane), lanes.address)
        e.emit(_LOADS[size], value, lanes.there())
        e.emit(_STORES[size], lanes.there(), value)
    for lane in range(count):
        e.emit(_LOADS[size], value, e.spill_at(_LANES + size * lane))
        e.emit("MOV_R64_RM64", lanes.address, e.spill_at(_PLACES + 8 * lane))
        e.emit(_STORES[size], lanes.there(), value)


RULES: dict[str, Rule] = {
    **{
        name: partial(_gather, size, index_size)
        for size, index_size, names in (
            (4, 4, "vpgatherdd vgatherdps"),
            (4, 8, "vpgatherqd vgatherqps"),
            (8, 4, "vpgatherdq vgatherdpd"),
            (8, 8, "vpgatherqq vgatherqpd"),
        )
        for name in names.split()
    },
    **{name: partial(_move, 4) for name in ("vmaskmovps", "vpmaskmovd")},
    **{name: partial(_move, 8) for name in ("vmaskmovpd", "vpmaskmovq")},
}
