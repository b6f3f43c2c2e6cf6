"""Near branches (SDM Vol. 1, 7.3.8): JMP, Jcc, CALL, RET, LOOP, JCXZ.

A target beyond the limit of CS, or not canonical in 64-bit mode, is #GP(0) at the branch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from iced_x86 import OpKind, Register

from handlers.flags import CONDITION_NAMES, CONDITIONS, MASK
from handlers.integer import Read, bind_operand, bind_register
from handlers.integer_stack import Stack
from sandbox.cpu import GP, Fault, is_canonical
from sandbox.handler import Action, Handler, Resume
from sandbox.registers import ZF

if TYPE_CHECKING:
    from sandbox.cpu import Cpu
    from sandbox.decode import Insn

_RELATIVE = {OpKind.NEAR_BRANCH16: 16, OpKind.NEAR_BRANCH32: 32, OpKind.NEAR_BRANCH64: 64}

Jump = Callable[[int], Resume]


def bind_jump(cpu: Cpu, insn: Insn) -> Jump:
    """A function that goes to an offset in CS after checking it: #GP(0)."""
    bank = cpu.registers.bank

    def long(target: int) -> Resume:
        if not is_canonical(target):
            raise Fault(GP, 0)
        return Resume(target)

    def limited(target: int) -> Resume:
        if target > bank.read_segment("cs").limit:
            raise Fault(GP, 0)
        return Resume(target)

    return long if insn.bitness == 64 else limited


def bind_target(cpu: Cpu, insn: Insn) -> Read | None:
    """Where a near branch goes: an offset in CS. None for a far one."""
    iced, registers = insn.iced, cpu.registers
    if iced.op0_kind in _RELATIVE:
        distance, mask = iced.near_branch_target, MASK[_RELATIVE[iced.op0_kind]]
        return lambda: (registers.rip + distance) & mask
    if iced.is_jmp_near_indirect or iced.is_call_near_indirect:
        operand = bind_operand(cpu, insn, 0)
        return operand.read if operand else None
    return None


class Jmp(Handler):
    name = f"{__name__}.jmp"
    mnemonics = ("jmp",)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        target, jump = bind_target(cpu, insn), bind_jump(cpu, insn)
        if target is None:
            return None
        where = target
        return lambda: jump(where())


class JumpCondition(Handler):
    name = f"{__name__}.jcc"
    mnemonics = tuple(f"j{suffix}" for suffix in CONDITION_NAMES)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        target, jump = bind_target(cpu, insn), bind_jump(cpu, insn)
        if target is None:
            return None
        where, bank = target, cpu.registers.bank
        holds = CONDITIONS[insn.iced.condition_code]
        return lambda: jump(where()) if holds(bank.read("rflags")) else None


class Call(Handler):
    name = f"{__name__}.call"
    mnemonics = ("call",)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        target, jump = bind_target(cpu, insn), bind_jump(cpu, insn)
        if target is None:
            return None
        where, stack, registers = target, Stack(cpu, insn.bitness), cpu.registers
        size, length = -insn.iced.stack_pointer_increment, insn.length
        mask = MASK[8 * size]

        def action() -> Resume:
            resume = jump(where())
            stack.push(((registers.rip + length) & mask).to_bytes(size, "little"))
            return resume

        return action


class Ret(Handler):
    """RET and RET imm16, which drops so many bytes more."""

    name = f"{__name__}.ret"
    mnemonics = ("ret",)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        jump, stack = bind_jump(cpu, insn), Stack(cpu, insn.bitness)
        dropped = insn.iced.stack_pointer_increment
        size = dropped - (insn.iced.immediate16 if insn.iced.op_count else 0)

        def action() -> Resume:
            resume = jump(cpu.read_int(stack.top(), size))
            stack.drop(dropped)
            return resume

        return action


_LOOP_CONDITIONS: dict[str, Callable[[int], bool]] = {
    "loop": lambda _flags: True,
    "loope": lambda flags: flags & ZF != 0,
    "loopne": lambda flags: flags & ZF == 0,
}


class Loop(Handler):
    """LOOP, LOOPE, LOOPNE: the count is CX, ECX or RCX, as the address size says."""

    name = f"{__name__}.loop"
    mnemonics = tuple(_LOOP_CONDITIONS)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        target, jump = bind_target(cpu, insn), bind_jump(cpu, insn)
        count = bind_register(cpu, getattr(Register, insn.form.rpartition("_")[2]))
        if target is None or count is None:
            return None
        where, read, write = target, count.read, count.write
        holds, bank = _LOOP_CONDITIONS[insn.mnemonic], cpu.registers.bank

        def action() -> Resume | None:
            left = read() - 1
            resume = jump(where()) if left and holds(bank.read("rflags")) else None
            write(left)
            return resume

        return action


class JumpCountZero(Handler):
    """JCXZ, JECXZ, JRCXZ."""

    name = f"{__name__}.jcxz"
    mnemonics = ("jcxz", "jecxz", "jrcxz")
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        target, jump = bind_target(cpu, insn), bind_jump(cpu, insn)
        count = bind_register(cpu, getattr(Register, insn.mnemonic[1:-1].upper()))
        if target is None or count is None:
            return None
        where, read = target, count.read
        return lambda: None if read() else jump(where())


HANDLERS = [Jmp(), JumpCondition(), Call(), Ret(), Loop(), JumpCountZero()]
