"""Decimal adjustment (SDM Vol. 1, 7.3.3; Vol. 2, AAA AAD AAM AAS DAA DAS), outside 64-bit mode.

``adjust(ax, flags, base)`` gives the new AX and the flags it defines; undefined ones stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from iced_x86 import Register

from handlers.flags import of_result
from handlers.integer import general_register
from sandbox.cpu import DE, Fault
from sandbox.handler import Action, Handler
from sandbox.registers import AF, CF, PF, SF, ZF

if TYPE_CHECKING:
    from sandbox.cpu import Cpu
    from sandbox.decode import Insn

_RESULT = SF | ZF | PF


def _low_digit_carries(al: int, flags: int) -> bool:
    return al & 0xF > 9 or bool(flags & AF)


def _high_digit_carries(al: int, flags: int) -> bool:
    return al > 0x99 or bool(flags & CF)


def aaa(ax: int, flags: int, _base: int) -> tuple[int, int]:
    if _low_digit_carries(ax & 0xFF, flags):
        return (ax + 0x106) & 0xFF0F, AF | CF
    return ax & 0xFF0F, 0


def aas(ax: int, flags: int, _base: int) -> tuple[int, int]:
    if _low_digit_carries(ax & 0xFF, flags):
        return (ax - 0x106) & 0xFF0F, AF | CF
    return ax & 0xFF0F, 0


def daa(ax: int, flags: int, _base: int) -> tuple[int, int]:
    al, defined = ax & 0xFF, 0
    step = 6 if _low_digit_carries(al, flags) else 0
    defined |= AF if step else 0
    if _high_digit_carries(al, flags):
        step += 0x60
        defined |= CF
    al = (al + step) & 0xFF
    return ax & 0xFF00 | al, defined | of_result(8, al)


def das(ax: int, flags: int, _base: int) -> tuple[int, int]:
    al, step, defined = ax & 0xFF, 0, 0
    if _low_digit_carries(al, flags):
        step = 6
        defined = AF | (CF if al < 6 else 0)
    if _high_digit_carries(al, flags):
        step += 0x60
        defined |= CF
    al = (al - step) & 0xFF
    return ax & 0xFF00 | al, defined | of_result(8, al)


def aam(ax: int, _flags: int, base: int) -> tuple[int, int]:
    if not base:
        raise Fault(DE)
    high, low = divmod(ax & 0xFF, base)
    return high << 8 | low, of_result(8, low)


def aad(ax: int, _flags: int, base: int) -> tuple[int, int]:
    al = ((ax & 0xFF) + (ax >> 8) * base) & 0xFF
    return al, of_result(8, al)


class Adjust(Handler):
    """An adjustment of AX; ``flags`` are the RFLAGS bits it defines."""

    restartable = True

    def __init__(
        self, mnemonic: str, adjust: Callable[[int, int, int], tuple[int, int]], flags: int
    ) -> None:
        self.name = f"{__name__}.{mnemonic}"
        self.mnemonics = (mnemonic,)
        self.adjust = adjust
        self.flags = flags

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        accumulator = general_register(cpu, Register.AX)
        read, write, bank = accumulator.read, accumulator.write, cpu.registers.bank
        adjust, keep, base = self.adjust, ~self.flags, insn.iced.immediate8

        def action() -> None:
            flags = bank.read("rflags")
            result, defined = adjust(read(), flags, base)
            write(result)
            bank.write("rflags", flags & keep | defined)

        return action


HANDLERS = [
    Adjust("aaa", aaa, AF | CF),
    Adjust("aas", aas, AF | CF),
    Adjust("daa", daa, AF | CF | _RESULT),
    Adjust("das", das, AF | CF | _RESULT),
    Adjust("aam", aam, _RESULT),
    Adjust("aad", aad, _RESULT),
]
