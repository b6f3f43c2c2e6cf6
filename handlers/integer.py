"""General-purpose operands bound to a vCPU, and operations declared as pure functions.

A family file says *what* is computed, ``compute(bits, *sources)``; the decoder says which forms
exist; :class:`Operation` joins the two when an instruction is bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from iced_x86 import MemorySizeExt, OpKind, Register

from handlers.flags import MASK
from sandbox.cpu import bind_address, bind_offset
from sandbox.decode import IMMEDIATE_BITS
from sandbox.handler import Action, Handler

if TYPE_CHECKING:
    from sandbox.cpu import Cpu
    from sandbox.decode import Insn

Read = Callable[[], int]
Write = Callable[[int], None]


def _register_places() -> dict[int, tuple[int, int, int]]:
    names = {
        (64, 0): "RAX RCX RDX RBX RSP RBP RSI RDI R8 R9 R10 R11 R12 R13 R14 R15",
        (32, 0): "EAX ECX EDX EBX ESP EBP ESI EDI R8D R9D R10D R11D R12D R13D R14D R15D",
        (16, 0): "AX CX DX BX SP BP SI DI R8W R9W R10W R11W R12W R13W R14W R15W",
        (8, 0): "AL CL DL BL SPL BPL SIL DIL R8L R9L R10L R11L R12L R13L R14L R15L",
        (8, 8): "AH CH DH BH",
    }
    return {
        getattr(Register, name): (number, bits, shift)
        for (bits, shift), row in names.items()
        for number, name in enumerate(row.split())
    }


REGISTERS = _register_places()
"""iced-x86 register to (number in ``cpu.gpr``, width in bits, first bit)."""


@dataclass(frozen=True, slots=True)
class Operand:
    """One operand of one instruction on one vCPU; values are unsigned, within ``bits``.

    ``modify`` reads a value that will be written back: for memory it faults as the write would
    (SDM Vol. 3, 4.7: a read-modify-write reports W/R = 1). ``write`` cuts its value to ``bits``;
    a 32-bit register is zero-extended, narrower ones keep the rest (SDM Vol. 1, 3.4.1.1).
    """

    bits: int
    read: Read
    write: Write
    modify: Read


def bind_operand(cpu: Cpu, insn: Insn, number: int) -> Operand | None:
    """Operand ``number``, or None if it is not a general register, memory or an immediate."""
    iced = insn.iced
    kind = iced.op_kind(number)
    if kind == OpKind.REGISTER:
        return bind_register(cpu, iced.op_register(number))
    if kind == OpKind.MEMORY:
        size = MemorySizeExt.size(iced.memory_size)
        return bind_memory(cpu, bind_address(cpu, insn), size) if size else None
    if kind in IMMEDIATE_BITS:
        return _bind_immediate(iced.immediate(number), IMMEDIATE_BITS[kind])
    return None


def bind_register(cpu: Cpu, register: int) -> Operand | None:
    """A general register as operand, or None if ``register`` is none."""
    return general_register(cpu, register) if register in REGISTERS else None


def general_register(cpu: Cpu, register: int) -> Operand:
    """A general register as operand. KeyError if ``register`` is none."""
    number, bits, shift = REGISTERS[register]
    gpr, mask = cpu.gpr, MASK[bits]
    keep = MASK[64] & ~(mask << shift)

    def read_wide() -> int:
        return gpr[number]

    def read_low() -> int:
        return gpr[number] & mask

    def read_high() -> int:
        return gpr[number] >> 8 & 0xFF

    def write_wide(value: int) -> None:
        gpr[number] = value & mask

    def write_part(value: int) -> None:
        gpr[number] = gpr[number] & keep | (value & mask) << shift

    read = read_high if shift else read_wide if bits == 64 else read_low
    return Operand(bits, read, write_wide if bits >= 32 else write_part, read)


def bind_memory(cpu: Cpu, address: Read, size: int) -> Operand:
    """``size`` bytes at the linear address that ``address()`` gives, little-endian."""
    load, store, check, mask = cpu.read, cpu.write, cpu.check_write, (1 << 8 * size) - 1

    def read() -> int:
        return int.from_bytes(load(address(), size), "little")

    def write(value: int) -> None:
        store(address(), (value & mask).to_bytes(size, "little"))

    def modify() -> int:
        at = address()
        check(at, size)
        return int.from_bytes(load(at, size), "little")

    return Operand(8 * size, read, write, modify)


def address_bits(insn: Insn) -> int:
    """The address size of the memory operand: 16, 32 or 64."""
    iced = insn.iced
    for register in (iced.memory_base, iced.memory_index):
        if register in REGISTERS:
            return REGISTERS[register][1]
    if iced.memory_base in (Register.RIP, Register.EIP):
        return 64 if iced.memory_base == Register.RIP else 32
    return {2: 16, 4: 32, 8: 64}.get(iced.memory_displ_size, insn.bitness)


def bind_moved_address(cpu: Cpu, insn: Insn, distance: Read) -> Read:
    """The linear address ``distance()`` bytes from the memory operand, in its segment."""
    offset, start, mask = bind_offset(cpu, insn), bind_address(cpu, insn), MASK[address_bits(insn)]
    wrap = MASK[64 if insn.bitness == 64 else 32]

    def address() -> int:
        at = offset()
        return start() + ((at + distance()) & mask) - at & wrap

    return address


def _bind_immediate(value: int, bits: int) -> Operand:
    value &= MASK[bits]

    def write(_value: int) -> None:
        raise TypeError("an immediate operand cannot be written")

    return Operand(bits, lambda: value, write, lambda: value)


def bind_operands(cpu: Cpu, insn: Insn, count: int) -> list[Operand] | None:
    """All operands of an instruction that has ``count`` of them, or None if one is foreign."""
    if insn.iced.op_count != count:
        return None
    bound = [bind_operand(cpu, insn, number) for number in range(count)]
    operands = [operand for operand in bound if operand is not None]
    return operands if len(operands) == count else None


class Operation(Handler):
    """``destination = compute(bits, *sources)``, the shape of most instructions.

    ``operands`` has a letter for each explicit operand in the decoder's order: ``r`` is read,
    ``w`` written, ``m`` modified (read and written). ``bits`` is the width of operand ``measure``.
    ``compute`` gets the operands that are read, one or two, more if it takes flags; and RFLAGS at
    the end if ``takes_flags``. If ``flags`` (the RFLAGS bits it defines) is not 0, as is so for
    all that take flags, it returns ``(result, flags)``.
    """

    restartable = True

    def __init__(
        self,
        mnemonic: str,
        operands: str,
        compute: Callable[..., Any],
        flags: int = 0,
        *,
        takes_flags: bool = False,
        measure: int = 0,
    ) -> None:
        self.name = f"{compute.__module__}.{mnemonic}"
        self.mnemonics = (mnemonic,)
        self.operands = operands
        self.compute = compute
        self.flags = flags
        self.takes_flags = takes_flags
        self.measure = measure

    def on_host(self, insn: Insn) -> bool:
        return True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        bound = bind_operands(cpu, insn, len(self.operands))
        if bound is None:
            return None
        bits = bound[self.measure].bits
        pairs = list(zip(bound, self.operands, strict=True))
        sources = [o.modify if letter == "m" else o.read for o, letter in pairs if letter != "w"]
        written = [o.write for o, letter in pairs if letter != "r"]
        if self.takes_flags:
            return _bind_carry_action(cpu, self, bits, sources, written[0])
        evaluate = _bind_evaluation(self.compute, bits, sources)
        if not self.flags:
            return _bind_plain_action(evaluate, written[0])
        if not written:
            return _bind_test_action(cpu, evaluate, self.flags)
        return _bind_flag_action(cpu, evaluate, written[0], self.flags)


def _bind_evaluation(
    compute: Callable[..., Any], bits: int, sources: list[Read]
) -> Callable[[], Any]:
    if len(sources) == 1:
        (a,) = sources
        return lambda: compute(bits, a())
    a, b = sources
    return lambda: compute(bits, a(), b())


def _bind_plain_action(evaluate: Callable[[], int], write: Write) -> Action:
    def action() -> None:
        write(evaluate())

    return action


def _bind_test_action(cpu: Cpu, evaluate: Callable[[], tuple[int, int]], flags: int) -> Action:
    bank, keep = cpu.registers.bank, ~flags

    def action() -> None:
        bank.write("rflags", bank.read("rflags") & keep | evaluate()[1])

    return action


def _bind_flag_action(
    cpu: Cpu, evaluate: Callable[[], tuple[int, int]], write: Write, flags: int
) -> Action:
    bank, keep = cpu.registers.bank, ~flags

    def action() -> None:
        result, defined = evaluate()
        write(result)
        bank.write("rflags", bank.read("rflags") & keep | defined)

    return action


def _bind_carry_action(
    cpu: Cpu, operation: Operation, bits: int, sources: list[Read], write: Write
) -> Action:
    bank, keep, compute = cpu.registers.bank, ~operation.flags, operation.compute
    a, b, *more = sources

    def action() -> None:
        flags = bank.read("rflags")
        result, defined = compute(bits, a(), b(), *[source() for source in more], flags)
        write(result)
        bank.write("rflags", flags & keep | defined)

    def binary() -> None:
        flags = bank.read("rflags")
        result, defined = compute(bits, a(), b(), flags)
        write(result)
        bank.write("rflags", flags & keep | defined)

    return action if more else binary
