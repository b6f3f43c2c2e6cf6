"""LDMXCSR and STMXCSR (SDM Vol. 2). Bits 31:16 of MXCSR are reserved (SDM Vol. 1, 11.6.6)."""

from __future__ import annotations

from handlers.vector import form_of
from sandbox.cpu import GP, Cpu, Fault
from sandbox.decode import Insn
from sandbox.handler import Action, Handler
from sandbox.xsave import MXCSR_MASK


def _nothing() -> None: ...


class LoadMxcsr(Handler):
    """#GP(0) if a reserved bit is to be set."""

    name = "float_control.ldmxcsr"
    mnemonics = ("ldmxcsr", "vldmxcsr")
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        form = form_of(cpu, insn)
        if form is None:
            return None
        guard, address, read_int = form.bind_guard(), form.bind_address(), cpu.read_int

        def action() -> None:
            guard()
            value = read_int(address(), 4)
            if value & ~MXCSR_MASK:
                raise Fault(GP, 0)
            cpu.mxcsr = value

        return action


class StoreMxcsr(Handler):
    """The reserved bits are stored as zeros. The service ``mxcsr_shown`` hears of it."""

    name = "float_control.stmxcsr"
    mnemonics = ("stmxcsr", "vstmxcsr")
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        form = form_of(cpu, insn)
        if form is None:
            return None
        guard, address = form.bind_guard(), form.bind_address()
        shown = cpu.services.get("mxcsr_shown", _nothing)

        def action() -> None:
            guard()
            cpu.write_int(address(), cpu.mxcsr & MXCSR_MASK, 4)
            shown()

        return action


CONTROL = [LoadMxcsr(), StoreMxcsr()]
