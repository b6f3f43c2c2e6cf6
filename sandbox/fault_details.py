"""What the fast path gets wrong in an exception's details, put right before it is delivered.

Unicorn reads the destination of a read-modify-write before it asks for write access, so that its
#PF says "read" where a processor says "write" (SDM Vol. 3, 4.7); and it raises #GP for every
non-canonical address, also where the stack segment is used, which is #SS (SDM Vol. 3, 6.15).
"""

from __future__ import annotations

from functools import lru_cache

from iced_x86 import InstructionInfoFactory, OpAccess, Register

from sandbox.cpu import GP, PF_, SS_, Cpu, Fault, bind_address, is_canonical
from sandbox.decode import Insn
from sandbox.registers import RSP

_WRITE, _FETCH = 2, 16
_READ_WRITE = (OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE)


def corrected(cpu: Cpu, insn: Insn, fault: Fault) -> Fault:
    """``fault``, raised by the fast path at ``insn``, as a processor raises it."""
    code = fault.error_code or 0
    if fault.vector == PF_ and not code & (_WRITE | _FETCH) and _is_read_modify_write(insn):
        return Fault(PF_, code | _WRITE, fault.address)
    if fault.vector == GP and not code and insn.bitness == 64 and _stack_is_beyond(cpu, insn):
        return Fault(SS_, 0)
    return fault


@lru_cache(maxsize=1024)
def _is_read_modify_write(insn: Insn) -> bool:
    used = InstructionInfoFactory().info(insn.iced).used_memory()
    return any(memory.access in _READ_WRITE for memory in used)


def _stack_is_beyond(cpu: Cpu, insn: Insn) -> bool:
    """Whether the instruction uses the stack segment at a non-canonical address."""
    if insn.iced.memory_segment == Register.SS and insn.iced.memory_base:
        try:
            bind_address(cpu, insn)()
        except Fault:
            return True
    if not insn.iced.is_stack_instruction:
        return False
    top = cpu.gpr[RSP]
    change = insn.iced.stack_pointer_increment
    lowest = (top + min(change, 0)) & 0xFFFF_FFFF_FFFF_FFFF
    return not is_canonical(lowest)
