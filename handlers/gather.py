"""AVX2 gathers: restartable, element by element from the lowest.

An element that is loaded goes to the destination at once and its mask is cleared, so that after
a fault half-way the instruction continues where it stopped. SDM Vol. 2, VPGATHERDD and others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from iced_x86 import EncodingKind, Register, RegisterExt

from handlers.lowered import rule_of
from handlers.operands import bind_avx_guard
from sandbox.cpu import SS_, Cpu, Fault, is_canonical
from sandbox.decode import Insn
from sandbox.handler import Action, Handler
from sandbox.lowering import Rule
from sandbox.registers import FS, GS, SS, VECTOR_BYTES

_SEGMENT_NUMBERS = {
    getattr(Register, name): number for number, name in enumerate("ES CS SS DS FS GS".split())
}


def bind_element_address(cpu: Cpu, insn: Insn) -> Callable[[int], int]:
    """A function from an index (signed) to the linear address of that element."""
    iced, gpr = insn.iced, cpu.gpr
    base, scale, fixed = iced.memory_base, iced.memory_index_scale, iced.memory_displacement
    number = None if base == Register.NONE else RegisterExt.number(base)
    size = iced.memory_displ_size if number is None else RegisterExt.size(base)
    low = 0xFFFF_FFFF_FFFF_FFFF if size == 8 else 0xFFFF_FFFF
    segment = _SEGMENT_NUMBERS[iced.memory_segment]
    segment_base = cpu.registers.bank.segment_base
    flat = insn.bitness == 64 and segment not in (FS, GS)
    limit = 0xFFFF_FFFF_FFFF_FFFF if insn.bitness == 64 else 0xFFFF_FFFF

    def offset(index: int) -> int:
        start = fixed if number is None else gpr[number] + fixed
        return start + index * scale & low

    def stack(index: int) -> int:
        at = offset(index)
        if not is_canonical(at):
            raise Fault(SS_, 0)
        return at

    if flat:
        return stack if segment == SS else offset
    return lambda index: offset(index) + segment_base(segment) & limit


@dataclass(eq=False)
class Gather(Handler):
    """Elements of ``lane`` bytes at indices of ``index`` bytes, where the mask's sign is set."""

    names: tuple[str, ...]
    lane: int
    index: int

    def __post_init__(self) -> None:
        self.name = f"gather.{self.names[0]}"
        self.mnemonics = self.names
        self.restartable = True  # what a fault leaves behind is what the manual asks for

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        iced = insn.iced
        if iced.encoding != EncodingKind.VEX:
            return None
        target = RegisterExt.number(iced.op0_register)
        mask = RegisterExt.number(iced.op2_register)
        indices = RegisterExt.number(iced.memory_index)
        size = RegisterExt.size(iced.op0_register)
        count = min(size // self.lane, RegisterExt.size(iced.memory_index) // self.index)
        step = self._bind_step(cpu, insn, target, mask, indices, count)
        guard, raw = bind_avx_guard(cpu), cpu.vec.raw
        above = slice(
            VECTOR_BYTES * target + count * self.lane, VECTOR_BYTES * target + VECTOR_BYTES
        )
        whole_mask = slice(VECTOR_BYTES * mask, VECTOR_BYTES * mask + VECTOR_BYTES)
        zeros, none = bytes(VECTOR_BYTES - count * self.lane), bytes(VECTOR_BYTES)

        def action() -> None:
            guard()
            step()
            raw[above] = zeros
            raw[whole_mask] = none

        return action

    def lowering(self, insn: Insn) -> Rule | None:
        return rule_of(insn)

    def _bind_step(
        self, cpu: Cpu, insn: Insn, target: int, mask: int, indices: int, count: int
    ) -> Callable[[], None]:
        address, read, lane = bind_element_address(cpu, insn), cpu.read, self.lane
        index_lanes = cpu.vec.lanes(indices, f"i{self.index}", count * self.index)
        mask_lanes = cpu.vec.lanes(mask, f"i{lane}", count * lane)
        raw, start = cpu.vec.raw, VECTOR_BYTES * target
        zero: Any = np.array(0, mask_lanes.dtype)

        def step() -> None:
            chosen = np.less(mask_lanes, zero).nonzero()[0].tolist()
            np.right_shift(mask_lanes, 8 * lane - 1, mask_lanes)  # the sign bit fills the lane
            numbers = index_lanes.tolist()
            for i in chosen:
                raw[start + lane * i : start + lane * i + lane] = read(address(numbers[i]), lane)
                mask_lanes[i] = 0

        return step


GATHERS = [
    Gather(("vpgatherdd", "vgatherdps"), 4, 4),
    Gather(("vpgatherqd", "vgatherqps"), 4, 8),
    Gather(("vpgatherdq", "vgatherdpd"), 8, 4),
    Gather(("vpgatherqq", "vgatherqpd"), 8, 8),
]
