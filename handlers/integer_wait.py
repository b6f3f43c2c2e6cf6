"""Waiting for a store or for a time: WAITPKG, MONITOR/MWAIT, MONITORX/MWAITX.

No wait is ever long: all of these may end at any time (SDM Vol. 2; APM Vol. 3), so they end at
once, as if an interrupt had come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Register

from handlers.flags import MASK, STATUS
from handlers.integer import REGISTERS, Read, general_register
from sandbox.cpu import GP, UD, Fault
from sandbox.handler import Action, Handler
from sandbox.registers import DS, ES, FS, GS, RAX, RCX, SS

if TYPE_CHECKING:
    from sandbox.cpu import Cpu
    from sandbox.decode import Insn

_TSD = 4
"""CR4 bit: time stamps are for CPL 0 only."""
_SEGMENTS = {
    Register.ES: ES, Register.SS: SS, Register.DS: DS, Register.FS: FS, Register.GS: GS,
    Register.CS: 1, Register.NONE: DS,
}  # fmt: skip
_ADDRESS_BITS = {"W": 16, "D": 32, "Q": 64}


def bind_implied_address(cpu: Cpu, insn: Insn, number: int, bits: int) -> Read:
    """The linear address that a register holds, in DS or the segment of the prefix."""
    gpr, base, low = cpu.gpr, cpu.registers.bank.segment_base, MASK[bits]
    segment = _SEGMENTS[insn.iced.segment_prefix]
    if insn.bitness == 64 and segment not in (FS, GS):
        return lambda: gpr[number] & low
    wrap = MASK[64 if insn.bitness == 64 else 32]
    return lambda: (gpr[number] & low) + base(segment) & wrap


class UserMonitor(Handler):
    """UMONITOR: faults as a load of a byte does."""

    name = f"{__name__}.umonitor"
    mnemonics = ("umonitor",)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        number, bits, _ = REGISTERS[insn.iced.op0_register]
        address, read = bind_implied_address(cpu, insn, number, bits), cpu.read

        def action() -> None:
            read(address(), 1)

        return action


class UserWait(Handler):
    """UMWAIT, TPAUSE: CF is clear, as the limit that an OS sets was not what ended the wait."""

    name = f"{__name__}.umwait"
    mnemonics = ("umwait", "tpause")
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        control, bank = general_register(cpu, insn.iced.op0_register).read, cpu.registers.bank

        def action() -> None:
            if control() & 0xFFFF_FFFE or (cpu.cpl and bank.read("cr4") & _TSD):
                raise Fault(GP, 0)
            bank.write("rflags", bank.read("rflags") & ~STATUS)

        return action


class Monitor(Handler):
    """MONITOR, MONITORX: no extensions (ECX) exist; faults as a load of a byte does."""

    name = f"{__name__}.monitor"
    mnemonics = ("monitor", "monitorx")
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        address = bind_implied_address(cpu, insn, RAX, _ADDRESS_BITS[insn.form[-1]])
        read, gpr, privileged = cpu.read, cpu.gpr, insn.mnemonic == "monitor"

        def action() -> None:
            if privileged and cpu.cpl:
                raise Fault(UD)
            if gpr[RCX] & 0xFFFF_FFFF:
                raise Fault(GP, 0)
            read(address(), 1)

        return action


_EXTENSIONS = {"mwait": 1, "mwaitx": 3}
"""Bits of ECX: masked interrupts end the wait; EBX is a time (MWAITX)."""


class MonitorWait(Handler):
    name = f"{__name__}.mwait"
    mnemonics = tuple(_EXTENSIONS)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        gpr, reserved = cpu.gpr, 0xFFFF_FFFF & ~_EXTENSIONS[insn.mnemonic]
        privileged = insn.mnemonic == "mwait"

        def action() -> None:
            if privileged and cpu.cpl:
                raise Fault(UD)
            if gpr[RCX] & reserved:
                raise Fault(GP, 0)

        return action


HANDLERS = [UserMonitor(), UserWait(), Monitor(), MonitorWait()]
