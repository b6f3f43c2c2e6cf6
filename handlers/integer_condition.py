"""SETcc and CMOVcc (SDM Vol. 1, 7.3.1.1 and 7.3.7.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from handlers.flags import CONDITION_NAMES, CONDITIONS
from handlers.integer import bind_operands
from handlers.lowered import rule_of
from sandbox.handler import Action, Handler

if TYPE_CHECKING:
    from sandbox.cpu import Cpu
    from sandbox.decode import Insn
    from sandbox.lowering import Rule


class SetCondition(Handler):
    name = f"{__name__}.setcc"
    mnemonics = tuple(f"set{suffix}" for suffix in CONDITION_NAMES)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        bound = bind_operands(cpu, insn, 1)
        if bound is None:
            return None
        write, bank = bound[0].write, cpu.registers.bank
        holds = CONDITIONS[insn.iced.condition_code]
        return lambda: write(holds(bank.read("rflags")))

    def lowering(self, insn: Insn) -> Rule | None:
        return rule_of(insn)


class MoveCondition(Handler):
    """CMOVcc: the source is always read, a 32-bit destination always zero-extended."""

    name = f"{__name__}.cmovcc"
    mnemonics = tuple(f"cmov{suffix}" for suffix in CONDITION_NAMES)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        bound = bind_operands(cpu, insn, 2)
        if bound is None:
            return None
        target, source = bound
        bank, holds = cpu.registers.bank, CONDITIONS[insn.iced.condition_code]

        def action() -> None:
            value = source.read()
            target.write(value if holds(bank.read("rflags")) else target.read())

        return action


HANDLERS = [SetCondition(), MoveCondition()]
