"""x87 instructions in place: on the registers as the engine has them, if it can show them so.

An instruction that takes normal numbers and leaves one needs little of what
:mod:`handlers.x87_fpu` does; everything else is left to that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from handlers.softfloat import PE
from handlers.x87_format import INTEGER_BIT, SIGNIFICAND, TOP_EXPONENT
from handlers.x87_fpu import C1, EM, ES, FLAGS, TS, Instruction
from sandbox.cpu import Cpu
from sandbox.decode import Insn
from sandbox.handler import Action, Verdict
from sandbox.registers import DirectBank, X87View

Compute = Callable[[int, int, int], "tuple[int, bool] | None"]
"""Of the control word and two registers: an inexact result, and whether it was rounded up."""


class Quick(Instruction):
    """The same for an instruction that is mostly done in place: ``compute(control, x, y)`` makes of
    normal numbers in ST(0) and ST(1) another one, unless it leaves that to what ``make`` gives.

    ``pops``: the result takes the place of ST(1), and ST(0) is popped. Else ``y`` is any register.
    """

    def __init__(self, general: Instruction, compute: Compute, *, pops: bool) -> None:
        super().__init__(general.make, general.mnemonics, general.begin)
        self.name = general.name
        self.compute = compute
        self.pops = pops

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        general, bank = super().bind(cpu, insn), cpu.registers.bank
        view = bank.x87_view() if isinstance(bank, DirectBank) else None
        controls = cpu.registers.controls
        if view is None or controls is None:
            return general
        return self._in_place(general, view, controls, cpu.registers.rip_view)

    def _in_place(
        self, general: Action, view: X87View, controls: memoryview, rip: memoryview
    ) -> Action:
        compute, pops = self.compute, self.pops
        top, status, control, pointer = view.top, view.status, view.control, view.instruction
        empty, significands, exponents = view.empty, view.significands, view.exponents

        def action() -> Verdict | None:
            n, word = top[0], control[0]
            k = n + 1 & 7 if pops else n
            low, high, low_y, high_y = significands[n], exponents[n], significands[k], exponents[k]
            if (
                controls[0] & (EM | TS)
                or status[0] & ES
                or ~word & FLAGS
                or empty[n]
                or empty[k]
                or not low & low_y & INTEGER_BIT
                or not 0 < high & TOP_EXPONENT < TOP_EXPONENT
                or not 0 < high_y & TOP_EXPONENT < TOP_EXPONENT
            ):
                return general()
            found = compute(word, high << 64 | low, high_y << 64 | low_y)
            if found is None:
                return general()
            bits, up = found
            significands[k], exponents[k] = bits & SIGNIFICAND, bits >> 64
            status[0] = status[0] & ~C1 | (PE | C1 if up else PE)
            if pops:
                empty[n], top[0] = 1, k
            pointer[0] = rip[0]
            return None

        return action


def quick(compute: Compute, *, pops: bool = False) -> Callable[[Instruction], Quick]:
    """Have an instruction done in place where ``compute`` can."""
    return partial(Quick, compute=compute, pops=pops)
