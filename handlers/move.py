"""Moves of whole vectors and single elements, and the zeroing of registers.

SDM Vol. 2: MOVAPS ... MOVNTPD, LDDQU, MOVD/MOVQ, MOVSS/MOVSD, MOVLPS/MOVLPD, VZEROUPPER/VZEROALL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from handlers.lowered import rule_of
from handlers.operands import Form, Place, bind_avx_guard
from handlers.vector import (
    Extent,
    Operation,
    applied,
    end_of_write,
    form_of,
    has_memory,
    loads,
    mnemonics_of,
    planned,
    registers_only,
    stores,
)
from sandbox.cpu import Cpu
from sandbox.decode import Insn
from sandbox.handler import Action, Handler
from sandbox.lowering import Rule


def _two_operands(form: Form) -> bool:
    return len(form.places) == 2


@dataclass(eq=False)
class Move(Handler):
    """Copy as many bytes as the narrower operand has; zero the rest of a register."""

    names: tuple[str, ...]
    accepts: Callable[[Form], bool] = _two_operands

    def __post_init__(self) -> None:
        self.name = f"move.{self.names[0]}"
        self.mnemonics = mnemonics_of(self.names)
        self.restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        form = form_of(cpu, insn)
        if form is None or not self.accepts(form):
            return None
        target, source = form.places
        size = min(target.size, source.size)
        if target.is_memory:
            return _store(form, source.bytes(size))
        if source.is_memory:
            return _load(form, target, size)
        return _copy(form, target, source, size)

    def lowering(self, insn: Insn) -> Rule | None:
        return rule_of(insn)

    def on_host(self, insn: Insn) -> bool:
        return True


def _store(form: Form, source: memoryview) -> Action:
    guard, address, write = form.bind_guard(), form.bind_address(), form.cpu.write

    def store() -> None:
        guard()
        write(address(), bytes(source))

    return store


def _load(form: Form, target: Place, size: int) -> Action:
    guard, address, read = form.bind_guard(), form.bind_address(), form.cpu.read
    end = end_of_write(form)
    raw, span, zeros = target.raw, slice(target.offset, target.offset + end), bytes(end - size)

    def load() -> None:
        guard()
        raw[span] = read(address(), size) + zeros

    return load


def _copy(form: Form, target: Place, source: Place, size: int) -> Action:
    guard, data, end = form.bind_guard(), source.bytes(size), end_of_write(form)
    raw, low = target.raw, slice(target.offset, target.offset + size)
    above, zeros = slice(target.offset + size, target.offset + end), bytes(end - size)

    def copy() -> None:
        guard()
        raw[low] = data
        raw[above] = zeros

    return copy


MOVES = Move(
    tuple(
        "movaps movapd movups movupd movdqa movdqu lddqu movntdqa movntdq movntps movntpd"
        " movd movq".split()
    )
)


SCALAR_MEMORY = Move(("movss", "movsd"), has_memory)
LOW_STORES = Move(("movlps", "movlpd"), stores)


def _low(names: str, lane: str, accepts: Callable[[Form], bool]) -> Operation:
    """Replace the low element, keep the rest of the first source."""
    plan = applied(lambda source, out: np.copyto(out, source))
    return planned(names, f"{lane}->{lane}", plan, Extent.SCALAR, accepts=accepts)


SCALAR_REGISTER = [_low("movss", "u4", registers_only), _low("movsd", "u8", registers_only)]
LOW_LOADS = _low("movlps movlpd", "u8", loads)


@dataclass(eq=False)
class ZeroRegisters(Handler):
    """Zero the bytes from ``first`` upwards in all registers that the mode can name."""

    mnemonic: str
    first: int

    def __post_init__(self) -> None:
        self.name = f"move.{self.mnemonic}"
        self.mnemonics = (self.mnemonic,)
        self.restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        count = 16 if insn.bitness == 64 else 8
        guard, part = bind_avx_guard(cpu), cpu.vec.view("u8")[:count, self.first // 8 :]

        def zero() -> None:
            guard()
            part.fill(0)

        return zero

    def lowering(self, insn: Insn) -> Rule | None:
        return rule_of(insn)

    def on_host(self, insn: Insn) -> bool:
        return True


ZEROING = [ZeroRegisters("vzeroupper", 16), ZeroRegisters("vzeroall", 0)]
