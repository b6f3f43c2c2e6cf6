"""Far JMP and CALL: to code segments and through call gates (SDM Vol. 2, JMP, CALL; Vol. 3, 5.8).

Hardware task switches (task gates, TSS selectors) are refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from iced_x86 import MemorySizeExt, OpKind

from handlers.segments import (
    Load,
    code_segment,
    is_protected,
    real_mode_segment,
)
from handlers.tables import system_memory
from sandbox.cpu import GP, NP, SS_, Cpu, Fault, is_canonical
from sandbox.decode import Insn
from sandbox.descriptors import (
    CALL_GATE,
    CALL_GATE16,
    EFER_LMA,
    TASK_GATE,
    Gate,
    descriptor_address,
    is_conforming,
    is_null,
    null_stack,
    parse_gate,
    parse_segment,
    touch,
    within_limit,
)
from sandbox.errors import EngineError
from sandbox.handler import Resume, handler
from sandbox.registers import RSP, Segment
from sandbox.stack import Stack, inner_stack, read_tss

_TASKS: Final = frozenset((1, 3, TASK_GATE, 9, 11))
FORMS: Final = {
    name: [f"{name}_{form}" for form in ("PTR1616", "PTR1632", "M1616", "M1632", "M1664")]
    for name in ("JMP", "CALL")
}


def far_pointer(cpu: Cpu, insn: Insn) -> tuple[int, int, int]:
    """Selector, offset and offset size in bytes of a far branch operand."""
    iced = insn.iced
    if iced.op0_kind == OpKind.FAR_BRANCH16:
        return iced.far_branch_selector, iced.far_branch16, 2
    if iced.op0_kind == OpKind.FAR_BRANCH32:
        return iced.far_branch_selector, iced.far_branch32, 4
    size = MemorySizeExt.size(iced.memory_size) - 2
    data = cpu.read(cpu.address(insn), size + 2)
    return int.from_bytes(data[size:], "little"), int.from_bytes(data[:size], "little"), size


def check_target(cpu: Cpu, code: Segment, offset: int) -> None:
    """#GP(0) for an entry point beyond the segment's limit or, in 64-bit code, not canonical."""
    inside = is_canonical(offset) if is_64_bit(cpu, code) else within_limit(code, offset, 1)
    if not inside:
        raise Fault(GP, 0)


def is_64_bit(cpu: Cpu, code: Segment) -> bool:
    return bool(code.l and cpu.registers.bank.read("efer") & EFER_LMA)


def current_stack(cpu: Cpu) -> Stack:
    """The running code's stack."""
    bank = cpu.registers.bank
    return Stack(bank.read_segment("ss"), cpu.gpr[RSP], Fault(SS_, 0), flat=cpu.bitness == 64)


def load_code(cpu: Cpu, segment: Segment, cpl: int) -> Load:
    """CS with privilege level ``cpl``, ready to be committed."""
    mark, segment = touch(cpu.registers.bank, system_memory(cpu), segment)
    return Load(cpu, "cs", replace(segment, selector=segment.selector & ~3 | cpl), mark)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a far transfer goes. ``gate`` if it goes through one; ``size`` of what is pushed."""

    code: Segment
    offset: int
    cpl: int
    size: int
    gate: Gate | None = None


def _find_target(cpu: Cpu, insn: Insn, calling: bool) -> Target:
    """Look up and check the operand of a far JMP or CALL in protected mode."""
    selector, offset, size = far_pointer(cpu, insn)
    if is_null(selector):
        raise Fault(GP, 0)
    bank, memory = cpu.registers.bank, system_memory(cpu)
    address = descriptor_address(bank, selector)
    if address is None:
        raise Fault(GP, selector & 0xFFFC)
    segment = parse_segment(memory.read(address, 8), selector)
    if not segment.s:
        return _through_gate(cpu, selector, segment, calling)
    code = code_segment(cpu, selector)
    cpl, error = cpu.cpl, selector & 0xFFFC
    conforming = is_conforming(code)
    if (code.dpl > cpl) if conforming else (selector & 3 > cpl or code.dpl != cpl):
        raise Fault(GP, error)
    if not code.present:
        raise Fault(NP, error)
    check_target(cpu, code, offset)
    return Target(code, offset, cpl, size)


def _through_gate(cpu: Cpu, selector: int, found: Segment, calling: bool) -> Target:
    error, long_mode = selector & 0xFFFC, cpu.registers.bank.read("efer") & EFER_LMA
    if found.type in _TASKS and not long_mode:
        raise EngineError(
            f"far transfer at {cpu.rip:#x} to selector {selector:#x}: hardware task switches are "
            "not supported; switch tasks in software"
        )
    if found.type != CALL_GATE and (long_mode or found.type != CALL_GATE16):
        raise Fault(GP, error)
    size = 16 if long_mode else 8
    address = descriptor_address(cpu.registers.bank, selector, size)
    if address is None or found.dpl < max(cpu.cpl, selector & 3):
        raise Fault(GP, error)
    if not found.present:
        raise Fault(NP, error)
    gate = parse_gate(system_memory(cpu).read(address, size))
    code = code_segment(cpu, gate.selector)
    error = gate.selector & 0xFFFC
    wrong_level = code.dpl > cpu.cpl if calling or is_conforming(code) else code.dpl != cpu.cpl
    if wrong_level or (long_mode and not code.l):
        raise Fault(GP, error)
    if not code.present:
        raise Fault(NP, error)
    check_target(cpu, code, gate.offset)
    cpl = cpu.cpl if is_conforming(code) else code.dpl
    pushed = 8 if long_mode else 4 if gate.type == CALL_GATE else 2
    return Target(code, gate.offset, cpl, pushed, gate)


def _real_target(cpu: Cpu, insn: Insn) -> Target:
    selector, offset, size = far_pointer(cpu, insn)
    code = real_mode_segment(cpu, "cs", selector)
    if not within_limit(code, offset, 1):
        raise Fault(GP, 0)
    return Target(code, offset, cpu.cpl, size)


@handler(form=FORMS["JMP"])
def far_jump(cpu: Cpu, insn: Insn) -> Resume:
    if is_protected(cpu):
        target = _find_target(cpu, insn, calling=False)
        load = load_code(cpu, target.code, target.cpl)
    else:
        target = _real_target(cpu, insn)
        load = Load(cpu, "cs", target.code)
    load.commit()
    return Resume(target.offset)


@handler(form=FORMS["CALL"])
def far_call(cpu: Cpu, insn: Insn) -> Resume:
    protected = is_protected(cpu)
    target = _find_target(cpu, insn, calling=True) if protected else _real_target(cpu, insn)
    back = [cpu.registers.bank.read_segment("cs").selector, cpu.rip + insn.length]
    if target.cpl < cpu.cpl:
        return _call_inner(cpu, target, back)
    stack = current_stack(cpu)
    stack.push(back, target.size)
    stack.check(cpu.memory)
    load = load_code(cpu, target.code, target.cpl) if protected else Load(cpu, "cs", target.code)
    stack.write(cpu.memory)
    load.commit()
    cpu.gpr[RSP] = stack.pointer
    return Resume(target.offset)


def _call_inner(cpu: Cpu, target: Target, back: list[int]) -> Resume:
    """Through a call gate to more privilege: stack from the TSS, parameters copied."""
    bank, memory = cpu.registers.bank, system_memory(cpu)
    old_ss, old_sp = bank.read_segment("ss"), cpu.gpr[RSP]
    assert target.gate is not None
    parameters = _parameters(cpu, target)
    load, pointer = _inner_stack(cpu, target.cpl)
    flat = target.size == 8
    fault = Fault(SS_, 0 if flat else load.segment.selector & 0xFFFC)
    stack = Stack(load.segment, pointer, fault, flat=flat)
    stack.push([old_ss.selector, old_sp, *parameters, *back], target.size)
    stack.check(memory)
    code = load_code(cpu, target.code, target.cpl)
    stack.write(memory)
    load.commit()
    code.commit()
    cpu.gpr[RSP] = stack.pointer
    return Resume(target.offset)


def _parameters(cpu: Cpu, target: Target) -> list[int]:
    """The gate's parameters from the caller's stack, in the order they are pushed again."""
    assert target.gate is not None
    old = current_stack(cpu)
    return [old.pop(cpu.memory, target.size) for _ in range(target.gate.count)][::-1]


def _inner_stack(cpu: Cpu, cpl: int) -> tuple[Load, int]:
    """SS and the stack pointer for privilege level ``cpl`` from the TSS (SDM Vol. 3, 7.2)."""
    bank, memory = cpu.registers.bank, system_memory(cpu)
    if bank.read("efer") & EFER_LMA:
        return Load(cpu, "ss", null_stack(cpl)), read_tss(bank, memory, cpl * 8 + 4, 8)
    segment, pointer = inner_stack(bank, memory, cpl)
    mark, segment = touch(bank, memory, segment)
    return Load(cpu, "ss", segment, mark), pointer
