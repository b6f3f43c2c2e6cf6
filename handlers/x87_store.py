"""FISTTP: store ST(0) as an integer, truncated, and pop. SDM Vol. 2, FISTTP; Vol. 1, 8.5.

It came with SSE3; the fast path stores a wrong value when the result does not fit.
"""

from __future__ import annotations

from sandbox.cpu import MF, NM, Cpu, Fault, bind_address
from sandbox.decode import Insn
from sandbox.handler import Action, Handler

_CR0_EM_TS = 4 | 8
_IE, _PE, _SF, _ES, _C1, _B = 1, 0x20, 0x40, 0x80, 0x200, 0x8000
_MASKS = 0x3F
_BIAS = 0x3FFF

SIZES = {"FISTTP_M16INT": 2, "FISTTP_M32INT": 4, "FISTTP_M64INT": 8}


def truncate(value: int, size: int) -> tuple[int | None, bool]:
    """An 80-bit float as a signed integer of ``size`` bytes, and whether it was exact.

    None if it has no such value: NaN, infinity, unsupported format, or too large.
    """
    negative, exponent, significand = value >> 79, value >> 64 & 0x7FFF, value & (1 << 64) - 1
    if exponent == 0x7FFF or (exponent and not significand >> 63):
        return None, True
    shift = 63 - (exponent - _BIAS)
    if shift < 0:
        return None, True
    magnitude = significand >> shift
    exact = magnitude << shift == significand
    number = -magnitude if negative else magnitude
    limit = 1 << 8 * size - 1
    return (number, exact) if -limit <= number < limit else (None, True)


class StoreTruncated(Handler):
    """Invalid operands store the integer indefinite, if that exception is masked."""

    name = "x87_store.fisttp"
    mnemonics = ("fisttp",)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        size = SIZES[insn.form]
        bank, address = cpu.registers.bank, bind_address(cpu, insn)

        def action() -> None:
            if bank.read("cr0") & _CR0_EM_TS:
                raise Fault(NM)
            status, control = bank.read("fpsw"), bank.read("fpcw")
            if status & ~control & _MASKS:
                raise Fault(MF)
            at = address()
            cpu.check_write(at, size)
            top, tags = status >> 11 & 7, bank.read("fptag")
            empty = tags >> 2 * top & 3 == 3
            number, exact = (None, True) if empty else truncate(bank.read("st0"), size)
            raised = (_IE | (_SF if empty else 0)) if number is None else 0 if exact else _PE
            status = status & ~_C1 | raised
            if raised & ~control & _MASKS:
                status |= _ES | _B
            if number is not None or control & _IE:
                cpu.write_int(at, 1 << 8 * size - 1 if number is None else number, size)
                status = status & ~0x3800 | (top + 1 & 7) << 11
                bank.write("fptag", tags | 3 << 2 * top)
            bank.write("fpsw", status)

        return action


FISTTP = StoreTruncated()
