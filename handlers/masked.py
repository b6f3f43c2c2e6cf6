"""Moves under a vector mask: elements that the mask leaves out are neither accessed nor faulting.

SDM Vol. 2: VMASKMOVPS/PD, VPMASKMOVD/Q, MASKMOVDQU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

from iced_x86 import OpKind, Register

from handlers.lowered import rule_of
from handlers.operands import Form, Place, bind_avx_guard, bind_sse_guard
from handlers.vector import end_of_write, form_of, mnemonics_of
from sandbox.cpu import Cpu
from sandbox.decode import Insn
from sandbox.handler import Action, Handler
from sandbox.lowering import Rule
from sandbox.registers import DS, FS, GS, RDI, VECTOR_BYTES

_MASK64 = 0xFFFF_FFFF_FFFF_FFFF


def selected_runs(mask: memoryview, lane: int) -> list[tuple[int, int]]:
    """``(first byte, end)`` of each run of lanes of ``lane`` bytes with their sign bit set."""
    lanes = range(len(mask) // lane)
    runs = []
    for chosen, group in groupby(lanes, lambda i: mask[lane * i + lane - 1] >> 7):
        if chosen:
            numbers = list(group)
            runs.append((numbers[0] * lane, numbers[-1] * lane + lane))
    return runs


def _bind_masked_store(
    cpu: Cpu, address: Callable[[], int], mask: memoryview, source: memoryview, lane: int
) -> Action:
    def store() -> None:
        runs = selected_runs(mask, lane)
        if not runs:
            return
        at = address()
        for first, end in runs:
            cpu.check_write(at + first & _MASK64, end - first)
        for first, end in runs:
            cpu.write(at + first & _MASK64, bytes(source[first:end]))

    return store


def _bind_masked_load(form: Form, target: Place, mask: memoryview, lane: int) -> Action:
    address, read, end_of = form.bind_address(), form.cpu.read, end_of_write(form)
    whole = target.raw[target.offset : target.offset + end_of]

    def load() -> None:
        data = bytearray(end_of)
        runs = selected_runs(mask, lane)
        if runs:
            at = address()
            for first, end in runs:
                data[first:end] = read(at + first & _MASK64, end - first)
        whole[:] = data

    return load


@dataclass(eq=False)
class MaskedMove(Handler):
    """``load xmm1, mask, m`` and ``store m, mask, xmm2``, lanes of ``lane`` bytes."""

    names: tuple[str, ...]
    lane: int

    def __post_init__(self) -> None:
        self.name = f"masked.{self.names[0]}"
        self.mnemonics = self.names
        self.restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        form = form_of(cpu, insn)
        if form is None:
            return None
        guard, (target, mask, source) = form.bind_guard(), form.places
        if target.is_memory:
            address = form.bind_address()
            move = _bind_masked_store(cpu, address, mask.bytes(), source.bytes(), self.lane)
        else:
            move = _bind_masked_load(form, target, mask.bytes(), self.lane)

        def action() -> None:
            guard()
            move()

        return action

    def lowering(self, insn: Insn) -> Rule | None:
        return rule_of(insn)


MASKED_MOVES = [
    MaskedMove(("vmaskmovps", "vpmaskmovd"), 4),
    MaskedMove(("vmaskmovpd", "vpmaskmovq"), 8),
]


class MaskMoveBytes(Handler):
    """MASKMOVDQU: bytes of the first register under the second's signs, to [rDI].

    Unlike the other masked moves it may fault on bytes that it does not write, which the manual
    leaves to the implementation; AMD's do.
    """

    name = "masked.maskmovdqu"
    mnemonics = mnemonics_of(("maskmovdqu",))
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        iced = insn.iced
        guard = bind_avx_guard(cpu) if insn.mnemonic.startswith("v") else bind_sse_guard(cpu)
        raw = cpu.vec.raw
        source, mask = (
            raw[VECTOR_BYTES * n : VECTOR_BYTES * n + 16]
            for n in (iced.op1_register - Register.XMM0, iced.op2_register - Register.XMM0)
        )
        address, check_write, write = bind_rdi(cpu, insn), cpu.check_write, cpu.write

        def action() -> None:
            guard()
            at = address()
            check_write(at, 16)
            for first, end in selected_runs(mask, 1):
                write(at + first, bytes(source[first:end]))

        return action


_RDI_BITS = {OpKind.MEMORY_SEG_DI: 16, OpKind.MEMORY_SEG_EDI: 32, OpKind.MEMORY_SEG_RDI: 64}
_OVERRIDES = {
    Register.ES: 0, Register.CS: 1, Register.SS: 2, Register.DS: DS,
    Register.FS: FS, Register.GS: GS,
}  # fmt: skip


def bind_rdi(cpu: Cpu, insn: Insn) -> Callable[[], int]:
    """The linear address of [rDI] in DS or the overriding segment."""
    gpr, base = cpu.gpr, cpu.registers.bank.segment_base
    low = (1 << _RDI_BITS[insn.iced.op_kind(0)]) - 1
    segment = _OVERRIDES[insn.iced.memory_segment]
    if insn.bitness == 64 and segment not in (FS, GS):
        return lambda: gpr[RDI] & low
    limit = _MASK64 if insn.bitness == 64 else 0xFFFF_FFFF
    return lambda: (gpr[RDI] & low) + base(segment) & limit


MASK_MOVE_BYTES = MaskMoveBytes()
