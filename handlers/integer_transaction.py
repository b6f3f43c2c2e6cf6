"""Restricted transactional memory where every transaction aborts as it starts (SDM Vol. 1, 16).

The status in EAX is 0: no reason given, and a retry not worth while. So no code is ever inside a
transaction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from handlers.flags import STATUS
from handlers.integer_branch import bind_jump, bind_target
from sandbox.cpu import GP, Fault
from sandbox.handler import Action, Handler, Resume
from sandbox.registers import RAX, ZF

if TYPE_CHECKING:
    from sandbox.cpu import Cpu
    from sandbox.decode import Insn


class Begin(Handler):
    name = f"{__name__}.xbegin"
    mnemonics = ("xbegin",)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        target, jump, gpr = bind_target(cpu, insn), bind_jump(cpu, insn), cpu.gpr
        if target is None:
            return None
        fallback = target

        def action() -> Resume:
            where = jump(fallback())
            gpr[RAX] = 0
            return where

        return action


class Query(Handler):
    """XTEST: ZF says that no transaction is under way."""

    name = f"{__name__}.xtest"
    mnemonics = ("xtest",)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        bank = cpu.registers.bank
        return lambda: bank.write("rflags", bank.read("rflags") & ~STATUS | ZF)


class End(Handler):
    """XEND outside of a transaction: #GP(0)."""

    name = f"{__name__}.xend"
    mnemonics = ("xend",)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        def action() -> None:
            raise Fault(GP, 0)

        return action


HANDLERS = [Begin(), Query(), End()]
