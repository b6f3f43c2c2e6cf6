"""Exceptions and interrupts into the guest: what the processor does between instructions.

Source: SDM Vol. 3, chapter 6 (6.12 protected mode, 6.14 long mode, 6.15 double faults), Vol. 2
INT n (the pseudocode gives the order of the checks), Vol. 3, 20.1.4 (real mode), 17.3.1.1 (RF).
An event is delivered as a whole or, when a check fails, not at all: nothing is written before
the last check has passed. CR2 is the exception: the processor sets it when it meets the #PF.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sandbox.cpu import (
    DE,
    DF_,
    ERROR_CODE_VECTORS,
    GP,
    NP,
    PF_,
    SS_,
    TS,
    UD,
    Cpu,
    Fault,
    is_canonical,
)
from sandbox.descriptors import (
    EFER_LMA,
    INTERRUPT_GATE,
    INTERRUPT_GATE16,
    TASK_GATE,
    TRAP_GATE,
    TRAP_GATE16,
    Gate,
    SystemMemory,
    is_code,
    is_conforming,
    is_null,
    load_descriptor,
    null_segment,
    null_stack,
    parse_gate,
    touch,
    within_limit,
)
from sandbox.errors import EngineError
from sandbox.registers import AC, IF, NT, RF, RSP, TF, VM, Bank, DescriptorTable, Segment
from sandbox.stack import Stack, inner_stack, read_tss

IDT = 2
"""Error code bit: the selector index names a gate of the IDT."""
CR0_PE = 1

CONTRIBUTORY = frozenset({DE, TS, NP, SS_, GP, 21})
PAGE_FAULTS = frozenset({PF_, 20})
FAULTS = frozenset({DE, 5, UD, 7, TS, NP, SS_, GP, PF_, 16, 17, 19, 20, 21})
"""Fault-class exceptions (SDM Vol. 3, table 6-1): they push RF = 1."""


class TripleFault(Exception):
    """An exception came up while #DF was being delivered: the processor shuts down."""


@dataclass(frozen=True, slots=True)
class Event:
    """One exception, interrupt or INT instruction on its way. ``rip`` is the address to push."""

    vector: int
    error_code: int | None
    software: bool
    rip: int
    external: bool = False
    """Whether it is an interrupt, which is nobody's fault."""

    @property
    def ext(self) -> int:
        """Error code bit 0: whether the event is external to the program."""
        return 0 if self.software else 1

    @property
    def gate_error(self) -> int:
        return self.vector * 8 + IDT + self.ext


def can_deliver(cpu: Cpu, vector: int = UD) -> bool:
    """Whether the guest has an IDT (IVT in real mode) that reaches to ``vector``."""
    bank = cpu.registers.bank
    size = _gate_size(bank)
    return (vector + 1) * size - 1 <= bank.read_table("idtr").limit


def deliver(
    cpu: Cpu,
    memory: SystemMemory,
    vector: int,
    error_code: int | None = None,
    *,
    software: bool = False,
    external: bool = False,
    next_rip: int | None = None,
    address: int | None = None,
) -> None:
    """Enter the guest's handler for ``vector``.

    ``memory`` makes supervisor accesses. ``software``: an INT n, INT3 or INTO instruction.
    ``external``: an interrupt from a device, whose vector may be any, without an error code.
    ``next_rip`` is the return address where it is not the current RIP (traps, INT n).
    ``address`` goes to CR2. A fault during delivery becomes the event, or #DF.
    Raises :class:`TripleFault`; :class:`~sandbox.errors.EngineError` for a task gate.
    """
    if error_code is None and vector in ERROR_CODE_VECTORS and not (software or external):
        error_code = 0
    rip = cpu.rip if next_rip is None else next_rip
    event = Event(vector, error_code, software, rip, external)
    if vector == PF_ and address is not None:
        cpu.registers.bank.write("cr2", address)
    while True:
        try:
            return _enter(cpu, memory, event)
        except Fault as second:
            if second.vector == PF_ and second.address is not None:
                cpu.registers.bank.write("cr2", second.address)
            event = _combine(event, second, cpu.rip)


def _combine(first: Event, second: Fault, rip: int) -> Event:
    """What is delivered when ``second`` comes up during ``first`` (SDM Vol. 3, table 6-5)."""
    serious = second.vector in CONTRIBUTORY or second.vector in PAGE_FAULTS
    if first.software or first.external:
        pass
    elif first.vector == DF_:
        raise TripleFault(f"vector {second.vector} while delivering #DF at {rip:#x}")
    elif (first.vector in PAGE_FAULTS and serious) or (
        first.vector in CONTRIBUTORY and second.vector in CONTRIBUTORY
    ):
        return Event(DF_, 0, False, rip)
    return Event(second.vector, second.error_code, False, rip)


def _gate_size(bank: Bank) -> int:
    if not bank.read("cr0") & CR0_PE:
        return 4
    return 16 if bank.read("efer") & EFER_LMA else 8


def _enter(cpu: Cpu, memory: SystemMemory, event: Event) -> None:
    size = _gate_size(cpu.registers.bank)
    {4: _real, 8: _protected, 16: _long}[size](cpu, memory, event)


def _pushed_flags(cpu: Cpu, event: Event) -> int:
    flags = cpu.rflags
    is_fault = event.vector in FAULTS and not (event.software or event.external)
    return flags | RF if is_fault else flags


# Real mode


def _real(cpu: Cpu, memory: SystemMemory, event: Event) -> None:
    bank = cpu.registers.bank
    table = bank.read_table("idtr")
    if event.vector * 4 + 3 > table.limit:
        raise Fault(GP, event.gate_error)
    entry = memory.read(table.base + event.vector * 4, 4)
    offset, selector = int.from_bytes(entry[:2], "little"), int.from_bytes(entry[2:], "little")
    cs = bank.read_segment("cs")
    flags = cpu.rflags
    stack = bank.read_segment("ss")
    frame = Stack(stack, cpu.gpr[RSP], Fault(SS_, event.ext))
    frame.push([flags, cs.selector, event.rip], 2)
    frame.check(memory)

    frame.write(memory)
    bank.write_segment("cs", replace(cs, selector=selector, base=selector << 4))
    cpu.gpr[RSP] = frame.pointer
    cpu.registers.rip = offset
    cpu.rflags = flags & ~(IF | TF | AC | RF)


# The IDT of protected and long mode


def _read_gate(cpu: Cpu, memory: SystemMemory, event: Event, size: int) -> Gate:
    """The gate of an event's vector, after the checks that concern the gate alone."""
    table: DescriptorTable = cpu.registers.bank.read_table("idtr")
    at = event.vector * size
    if at + size - 1 > table.limit:
        raise Fault(GP, event.gate_error)
    gate = parse_gate(memory.read(table.base + at, size))
    if gate.type == TASK_GATE and size == 8:
        raise EngineError(
            f"vector {event.vector}: the IDT holds a task gate; hardware task switches are not "
            "supported, use an interrupt or trap gate"
        )
    wide = (INTERRUPT_GATE, TRAP_GATE)
    if gate.type not in (wide if size == 16 else (*wide, INTERRUPT_GATE16, TRAP_GATE16)):
        raise Fault(GP, event.gate_error)
    if event.software and gate.dpl < cpu.cpl:
        raise Fault(GP, event.gate_error)
    if not gate.present:
        raise Fault(NP, event.gate_error)
    return gate


def _code_segment(
    cpu: Cpu, memory: SystemMemory, gate: Gate, event: Event, long_mode: bool
) -> tuple[Segment, int]:
    """The handler's code segment and the privilege level it runs at."""
    if is_null(gate.selector):
        raise Fault(GP, event.ext)
    error = gate.selector & 0xFFFC | event.ext
    code = load_descriptor(cpu.registers.bank, memory, gate.selector, ext=event.ext)
    if not is_code(code) or code.dpl > cpu.cpl:
        raise Fault(GP, error)
    if long_mode and (not code.l or code.db):
        raise Fault(GP, error)
    if not code.present:
        raise Fault(NP, error)
    cpl = cpu.cpl if is_conforming(code) else code.dpl
    if cpu.rflags & VM and cpl:
        raise Fault(GP, error)
    return code, cpl


def _protected(cpu: Cpu, memory: SystemMemory, event: Event) -> None:
    bank = cpu.registers.bank
    flags = cpu.rflags
    if flags & VM and event.software and flags >> 12 & 3 < 3:
        raise Fault(GP, 0)
    gate = _read_gate(cpu, memory, event, 8)
    code, cpl = _code_segment(cpu, memory, gate, event, long_mode=False)
    size = 4 if gate.type & 8 else 2
    old_cs, old_ss, esp = bank.read_segment("cs"), bank.read_segment("ss"), cpu.gpr[RSP]
    values = [_pushed_flags(cpu, event), old_cs.selector, event.rip]
    inner = cpl < cpu.cpl
    if inner:
        values[:0] = [old_ss.selector, esp]
        if flags & VM:
            values[:0] = [bank.read_segment(n).selector for n in ("gs", "fs", "ds", "es")]
        stack, esp = inner_stack(bank, memory, cpl, event.ext)
        stack_error = stack.selector & 0xFFFC | event.ext
    else:
        stack, stack_error = old_ss, event.ext
    if event.error_code is not None:
        values.append(event.error_code)
    frame = Stack(stack, esp & 0xFFFF_FFFF, Fault(SS_, stack_error))
    frame.push(values, size)
    if not within_limit(code, gate.offset, 1):
        raise Fault(GP, event.ext)
    # Pushes are accesses of the handler's privilege level, and that is 3 only if ours is.
    pushes: SystemMemory = memory if cpl < 3 else cpu.memory
    frame.check(pushes)
    touch_code, code = touch(bank, memory, code)
    touch_stack, stack = touch(bank, memory, stack) if inner else (_nothing, stack)

    frame.write(pushes)
    touch_code()
    touch_stack()
    bank.write_segment("cs", replace(code, selector=code.selector & ~3 | cpl))
    if inner:
        bank.write_segment("ss", stack)
    if flags & VM:
        for name in ("gs", "fs", "ds", "es"):
            bank.write_segment(name, null_segment(0))
    cpu.gpr[RSP] = frame.pointer
    cpu.registers.rip = gate.offset
    cpu.rflags = _handler_flags(flags, gate)


def _handler_flags(flags: int, gate: Gate) -> int:
    return flags & ~(TF | NT | RF | VM | (IF if gate.interrupt else 0))


# Long mode


def _long(cpu: Cpu, memory: SystemMemory, event: Event) -> None:
    bank = cpu.registers.bank
    flags = cpu.rflags
    gate = _read_gate(cpu, memory, event, 16)
    code, cpl = _code_segment(cpu, memory, gate, event, long_mode=True)
    old_cs, old_ss, old_rsp = bank.read_segment("cs"), bank.read_segment("ss"), cpu.gpr[RSP]
    inner = cpl < cpu.cpl
    rsp = old_rsp
    if gate.ist:
        rsp = read_tss(bank, memory, gate.ist * 8 + 28, 8, event.ext)
    elif inner:
        rsp = read_tss(bank, memory, cpl * 8 + 4, 8, event.ext)
    values = [old_ss.selector, old_rsp, _pushed_flags(cpu, event), old_cs.selector, event.rip]
    if event.error_code is not None:
        values.append(event.error_code)
    frame = Stack(old_ss, rsp & ~15, Fault(SS_, event.ext), flat=True)
    frame.push(values, 8)
    if not is_canonical(gate.offset):
        raise Fault(GP, event.ext)
    pushes: SystemMemory = memory if cpl < 3 else cpu.memory
    frame.check(pushes)
    touch_code: Callable[[], None]
    touch_code, code = touch(bank, memory, code)

    frame.write(pushes)
    touch_code()
    bank.write_segment("cs", replace(code, selector=code.selector & ~3 | cpl))
    if inner:
        bank.write_segment("ss", null_stack(cpl))
    cpu.gpr[RSP] = frame.pointer
    cpu.registers.rip = gate.offset
    cpu.rflags = _handler_flags(flags, gate)


def _nothing() -> None:
    """No descriptor was loaded."""
