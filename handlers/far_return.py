"""Far RET and IRET in all modes (SDM Vol. 2, RET, IRET; Vol. 3, 5.8.6 and 6.12.1)."""

from __future__ import annotations

from dataclasses import dataclass

from handlers.far import check_target, current_stack, is_64_bit, load_code
from handlers.segments import Load, code_segment, is_protected, load_stack, real_mode_segment
from sandbox.cpu import GP, NP, Cpu, Fault
from sandbox.decode import Insn
from sandbox.descriptors import (
    EFER_LMA,
    is_conforming,
    is_null,
    null_segment,
    null_stack,
    within_limit,
)
from sandbox.errors import EngineError
from sandbox.handler import Resume, handler
from sandbox.registers import AC, CF, DF, IF, IOPL, NT, OF, PF, RF, RSP, SF, TF, VM, ZF, Segment
from sandbox.registers import AF as AF_
from sandbox.stack import Stack

VIF, VIP, ID = 1 << 19, 1 << 20, 1 << 21
_ALWAYS = CF | PF | AF_ | ZF | SF | TF | DF | OF | NT
_WIDE_ONLY = RF | AC | ID


def _size(insn: Insn) -> int:
    """Operand size in bytes: IRETW, IRETD, IRETQ, RETFW ..."""
    return {"W": 2, "D": 4, "Q": 8}[insn.form.removesuffix("_IMM16")[-1]]


@dataclass(frozen=True, slots=True)
class _Return:
    """A checked way back: code, address and, when the privilege or the stack changes, a stack."""

    code: Load
    offset: int
    cpl: int
    stack: Load | None
    pointer: int


def _outer_stack(cpu: Cpu, selector: int, cpl: int, to_64_bit: bool) -> Load:
    if is_null(selector):
        if not to_64_bit or cpl == 3 or selector & 3 != cpl:
            raise Fault(GP, 0)
        return Load(cpu, "ss", null_stack(cpl))
    return load_stack(cpu, selector, cpl)


def _return_code(cpu: Cpu, selector: int) -> Segment:
    """The code segment of a return, checked against CPL and the selector's RPL."""
    code = code_segment(cpu, selector)
    error, rpl = selector & 0xFFFC, selector & 3
    bad_level = code.dpl > rpl if is_conforming(code) else code.dpl != rpl
    if rpl < cpu.cpl or bad_level:
        raise Fault(GP, error)
    if not code.present:
        raise Fault(NP, error)
    return code


def _prepare(
    cpu: Cpu, stack: Stack, selector: int, offset: int, size: int, *, always: bool, drop: int = 0
) -> _Return:
    """Check a return to ``selector:offset``; ``always``: SS and (E)SP are popped in any case."""
    code = _return_code(cpu, selector)
    rpl, wide = selector & 3, is_64_bit(cpu, code)
    stack.skip(drop)
    load, pointer = None, stack.pointer
    if rpl > cpu.cpl or always:
        pointer = stack.pop(cpu.memory, size)
        load = _outer_stack(cpu, stack.pop(cpu.memory, size) & 0xFFFF, rpl, wide)
        if not wide and not load.segment.db:
            pointer = cpu.gpr[RSP] & ~0xFFFF | pointer & 0xFFFF
        pointer = _released(load, pointer, drop, wide)
    check_target(cpu, code, offset)
    return _Return(load_code(cpu, code, rpl), offset, rpl, load, pointer)


def _released(load: Load, pointer: int, drop: int, wide: bool) -> int:
    """RET n takes its parameters off the outer stack too."""
    outer = Stack(load.segment, pointer, Fault(GP, 0), flat=wide)
    outer.skip(drop)
    return outer.pointer


def _go(cpu: Cpu, back: _Return) -> Resume:
    outer = back.cpl > cpu.cpl
    back.code.commit()
    if back.stack is not None:
        back.stack.commit()
    cpu.gpr[RSP] = back.pointer
    if outer:
        _hide_segments(cpu, back.cpl)
    return Resume(back.offset)


def _hide_segments(cpu: Cpu, cpl: int) -> None:
    """Segments that the outer level may not use become null (SDM Vol. 3, 5.8.6)."""
    bank = cpu.registers.bank
    for name in ("es", "ds", "fs", "gs"):
        segment = bank.read_segment(name)
        if segment.s and segment.dpl < cpl and not is_conforming(segment):
            bank.write_segment(name, null_segment(0))


# RETF


@handler(form=[f"RETF{size}{tail}" for size in "WDQ" for tail in ("", "_IMM16")])
def far_return(cpu: Cpu, insn: Insn) -> Resume:
    size = _size(insn)
    drop = insn.iced.immediate16 if insn.form.endswith("IMM16") else 0
    stack = current_stack(cpu)
    offset = stack.pop(cpu.memory, size)
    selector = stack.pop(cpu.memory, size) & 0xFFFF
    if is_protected(cpu):
        return _go(cpu, _prepare(cpu, stack, selector, offset, size, always=False, drop=drop))
    code = real_mode_segment(cpu, "cs", selector)
    if not within_limit(code, offset, 1):
        raise Fault(GP, 0)
    stack.skip(drop)
    cpu.registers.bank.write_segment("cs", code)
    cpu.gpr[RSP] = stack.pointer
    return Resume(offset)


# IRET


def _merged_flags(old: int, image: int, size: int, cpl: int) -> int:
    """RFLAGS after IRET at privilege level ``cpl``: what may not be changed stays."""
    mask = _ALWAYS | (_WIDE_ONLY if size > 2 else 0)
    if cpl <= (old & IOPL) >> 12:
        mask |= IF
    if cpl == 0:
        mask |= IOPL | (VIF | VIP if size > 2 else 0)
    return old & ~mask | image & mask | 2


@handler("iret", "iretd", "iretq")
def interrupt_return(cpu: Cpu, insn: Insn) -> Resume:
    size, flags = _size(insn), cpu.rflags
    if flags & VM and flags & IOPL != IOPL:
        raise Fault(GP, 0)
    if not is_protected(cpu):
        return _return_real(cpu, size)
    long_mode = cpu.registers.bank.read("efer") & EFER_LMA
    if flags & NT:
        if long_mode:
            raise Fault(GP, 0)
        raise EngineError(
            f"IRET at {cpu.rip:#x} with NT set: hardware task switches are not supported"
        )
    stack = current_stack(cpu)
    offset, selector, image = (stack.pop(cpu.memory, size) for _ in range(3))
    if image & VM and cpu.cpl == 0 and size == 4 and not long_mode:
        return _return_virtual(cpu, stack, offset, selector & 0xFFFF, image)
    merged = _merged_flags(flags, image, size, cpu.cpl)
    always = cpu.bitness == 64
    back = _prepare(cpu, stack, selector & 0xFFFF, offset, size, always=always)
    answer = _go(cpu, back)
    cpu.rflags = merged
    return answer


def _return_real(cpu: Cpu, size: int) -> Resume:
    """Real mode, and virtual-8086 mode with IOPL 3, which keeps IOPL."""
    stack = current_stack(cpu)
    offset, selector, image = (stack.pop(cpu.memory, size) for _ in range(3))
    code = real_mode_segment(cpu, "cs", selector & 0xFFFF)
    if not within_limit(code, offset, 1):
        raise Fault(GP, 0)
    flags = cpu.rflags
    mask = _ALWAYS | IF | (0 if flags & VM else IOPL) | (_WIDE_ONLY if size > 2 else 0)
    cpu.registers.bank.write_segment("cs", code)
    cpu.gpr[RSP] = stack.pointer
    cpu.rflags = flags & ~mask | image & mask | 2
    return Resume(offset)


def _return_virtual(cpu: Cpu, stack: Stack, offset: int, cs: int, image: int) -> Resume:
    """From CPL 0 of protected mode to virtual-8086 mode."""
    pointer, ss, es, ds, fs, gs = (stack.pop(cpu.memory, 4) for _ in range(6))
    bank = cpu.registers.bank
    cpu.rflags = image & (_ALWAYS | _WIDE_ONLY | IF | IOPL | VIF | VIP | VM) | 2
    selectors = {"cs": cs, "ss": ss, "es": es, "ds": ds, "fs": fs, "gs": gs}
    for name, selector in selectors.items():
        bank.write_segment(name, real_mode_segment(cpu, name, selector & 0xFFFF))
    cpu.gpr[RSP] = pointer
    return Resume(offset & 0xFFFF)
