"""What the fast path gets wrong in an exception's details, put right before it is delivered.

Unicorn reads the destination of a read-modify-write before it asks for write access, so that its
#PF says "read" where a processor says "write" (SDM Vol. 3, 4.7); and it raises #GP for every
non-canonical address, also where the stack segment is used, which is #SS (SDM Vol. 3, 6.15).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from iced_x86 import (
    CodeSize,
    InstructionInfoFactory,
    MemorySizeInfo,
    OpAccess,
    Register,
    RegisterInfo,
)

from sandbox.cpu import GP, PF_, SS_, Cpu, Fault, is_canonical
from sandbox.decode import Insn
from sandbox.registers import FS, GS

_WRITE, _FETCH = 2, 16
_MASK64 = (1 << 64) - 1
_MOVED = {Register.FS: FS, Register.GS: GS}
"""Segments that have a base in 64-bit mode."""
_WRITES = (OpAccess.WRITE, OpAccess.COND_WRITE)
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
    """Whether the first non-canonical access, reads before writes, is in the stack segment."""
    for used in _accesses(insn):
        address = _linear_address(cpu, insn, used)
        last = address + max(MemorySizeInfo(used.memory_size).size, 1) - 1
        if not (is_canonical(address) and is_canonical(last & _MASK64)):
            segment: int = used.segment
            return segment == Register.SS
    return False


@lru_cache(maxsize=1024)
def _accesses(insn: Insn) -> list[Any]:
    used = InstructionInfoFactory().info(insn.iced).used_memory()
    return sorted((u for u in used if not u.vsib_size), key=lambda u: u.access in _WRITES)


def _linear_address(cpu: Cpu, insn: Insn, used: Any) -> int:
    address: int = used.displacement
    if used.base == Register.NONE and insn.iced.is_ip_rel_memory_operand:
        address += cpu.rip
    for register, scale in ((used.base, 1), (used.index, used.scale)):
        if register != Register.NONE:
            info = RegisterInfo(register)
            address += (cpu.gpr[info.number] & (1 << 8 * info.size) - 1) * scale
    address &= (1 << 32) - 1 if used.address_size == CodeSize.CODE32 else _MASK64
    if used.segment in _MOVED:
        address += cpu.registers.bank.segment_base(_MOVED[used.segment])
    return address & _MASK64
