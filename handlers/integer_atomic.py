"""Read-modify-write on memory that must be aligned: RAO-INT and CMPccXADD (SDM Vol. 2).

A single vCPU makes every instruction atomic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from handlers.flags import CONDITIONS, MASK, STATUS, of_difference
from handlers.integer import Read, bind_memory, bind_operand
from sandbox.cpu import GP, Fault, bind_address
from sandbox.handler import Action, Handler

if TYPE_CHECKING:
    from sandbox.cpu import Cpu
    from sandbox.decode import Insn


def bind_aligned_address(cpu: Cpu, insn: Insn, size: int) -> Read:
    """The linear address of the memory operand: #GP(0) unless it is a multiple of ``size``."""
    address = bind_address(cpu, insn)

    def aligned() -> int:
        at = address()
        if at % size:
            raise Fault(GP, 0)
        return at

    return aligned


class RemoteOperation(Handler):
    """AADD, AAND, AOR, AXOR: no flags change."""

    restartable = True

    def __init__(self, mnemonic: str, compute: Callable[[int, int], int]) -> None:
        self.name = f"{__name__}.{mnemonic}"
        self.mnemonics = (mnemonic,)
        self.compute = compute

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        source = bind_operand(cpu, insn, 1)
        if source is None:
            return None
        size, read, compute = source.bits // 8, source.read, self.compute
        target = bind_memory(cpu, bind_aligned_address(cpu, insn, size), size)
        return lambda: target.write(compute(target.modify(), read()))


class CompareAndAdd(Handler):
    """CMPccXADD m, r1, r2: compare m with r1, r1 = m, and if the condition holds, m += r2."""

    name = f"{__name__}.cmpccxadd"
    mnemonics = tuple(
        f"cmp{suffix}xadd" for suffix in "o no b nb z nz be nbe s ns p np l nl le nle".split()
    )
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        compared, added = bind_operand(cpu, insn, 1), bind_operand(cpu, insn, 2)
        if compared is None or added is None:
            return None
        bits, bank = compared.bits, cpu.registers.bank
        memory = bind_memory(cpu, bind_aligned_address(cpu, insn, bits // 8), bits // 8)
        read, add, write = compared.read, added.read, compared.write
        holds = CONDITIONS[insn.iced.condition_code]

        def action() -> None:
            value, other = memory.modify(), read()
            flags = of_difference(bits, value, other, value - other)
            memory.write(value + add() & MASK[bits] if holds(flags) else value)
            write(value)
            bank.write("rflags", bank.read("rflags") & ~STATUS | flags)

        return action


HANDLERS = [
    RemoteOperation("aadd", lambda a, b: a + b),
    RemoteOperation("aand", lambda a, b: a & b),
    RemoteOperation("aor", lambda a, b: a | b),
    RemoteOperation("axor", lambda a, b: a ^ b),
    CompareAndAdd(),
]
