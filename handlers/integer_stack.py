"""The stack (SDM Vol. 1, chapter 6): PUSH, POP, PUSHA, POPA, PUSHF, POPF, ENTER, LEAVE."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import Code, OpKind, Register

from handlers.flags import MASK, STATUS
from handlers.integer import Read, bind_memory, bind_operand, bind_register, general_register
from handlers.integer_flags import may_change_interrupts
from handlers.integer_move import SEGMENTS
from sandbox.cpu import GP, SS_, Fault, bind_address, is_canonical
from sandbox.handler import Action, Handler
from sandbox.registers import AC, DF, IF, IOPL, NT, RBP, RF, RSP, SS, TF, VM

if TYPE_CHECKING:
    from sandbox.cpu import Cpu
    from sandbox.decode import Insn

ID = 1 << 21
_POPPED = STATUS | TF | DF | NT | AC | ID


class Stack:
    """The stack of one vCPU in code of one size; addresses wrap as SS.D says.

    ``at`` is the linear address of an offset, #SS(0) if it is not canonical; ``drop`` moves the
    stack pointer. A faulting access leaves the stack pointer as it was.
    """

    def __init__(self, cpu: Cpu, bitness: int) -> None:
        self._cpu = cpu
        self._long = bitness == 64

    def mask(self) -> int:
        """Ones as wide as the stack pointer."""
        if self._long:
            return MASK[64]
        return MASK[32 if self._cpu.registers.bank.read_segment("ss").db else 16]

    def at(self, offset: int) -> int:
        if self._long:
            offset &= MASK[64]
            if not is_canonical(offset):
                raise Fault(SS_, 0)
            return offset
        base = self._cpu.registers.bank.segment_base(SS)
        return (offset & self.mask()) + base & MASK[32]

    def top(self) -> int:
        """Linear address of the top of the stack."""
        return self.at(self._cpu.gpr[RSP])

    def set(self, pointer: int) -> None:
        gpr, mask = self._cpu.gpr, self.mask()
        gpr[RSP] = gpr[RSP] & ~mask & MASK[64] | pointer & mask

    def drop(self, size: int) -> None:
        self.set(self._cpu.gpr[RSP] + size)

    def push(self, data: bytes) -> None:
        """Push ``data`` as one piece: its first byte becomes the top."""
        pointer = self._cpu.gpr[RSP] - len(data)
        self._cpu.write(self.at(pointer), data)
        self.set(pointer)


class Push(Handler):
    name = f"{__name__}.push"
    mnemonics = ("push",)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        read = _bind_pushed(cpu, insn)
        if read is None:
            return None
        value, stack, size = read, Stack(cpu, insn.bitness), -insn.iced.stack_pointer_increment
        mask = (1 << 8 * size) - 1
        return lambda: stack.push((value() & mask).to_bytes(size, "little"))


def _bind_pushed(cpu: Cpu, insn: Insn) -> Read | None:
    iced, bank = insn.iced, cpu.registers.bank
    if iced.op0_kind == OpKind.REGISTER and iced.op0_register in SEGMENTS:
        name = SEGMENTS[iced.op0_register][1]
        return lambda: bank.read_segment(name).selector
    operand = bind_operand(cpu, insn, 0)
    return operand.read if operand else None


class Pop(Handler):
    """POP r/m; an address based on (E/R)SP sees the pointer after the pop."""

    name = f"{__name__}.pop"
    mnemonics = ("pop",)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        iced, size, stack = insn.iced, insn.iced.stack_pointer_increment, Stack(cpu, insn.bitness)
        if iced.op0_kind == OpKind.MEMORY:
            moved = size if iced.memory_base in (Register.RSP, Register.ESP) else 0
            memory = bind_memory(cpu, bind_address(cpu, insn, moved), size)

            def to_memory() -> None:
                memory.write(cpu.read_int(stack.top(), size))
                stack.drop(size)

            return to_memory
        target = bind_register(cpu, iced.op0_register)
        if target is None:
            return None
        write = target.write

        def to_register() -> None:
            value = cpu.read_int(stack.top(), size)
            stack.drop(size)
            write(value)

        return to_register


class PushAll(Handler):
    """PUSHA and PUSHAD: AX CX DX BX, SP as it was, BP SI DI."""

    name = f"{__name__}.pusha"
    mnemonics = ("pusha", "pushad")
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        size, stack = -insn.iced.stack_pointer_increment // 8, Stack(cpu, insn.bitness)
        gpr, mask = cpu.gpr, MASK[8 * size]

        def action() -> None:
            values = [gpr[number] & mask for number in range(7, -1, -1)]
            stack.push(b"".join(value.to_bytes(size, "little") for value in values))

        return action


class PopAll(Handler):
    """POPA and POPAD: the value for the stack pointer is thrown away."""

    name = f"{__name__}.popa"
    mnemonics = ("popa", "popad")
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        size, stack = insn.iced.stack_pointer_increment // 8, Stack(cpu, insn.bitness)
        names = "DI SI BP SP BX DX CX AX".split()
        prefix = "E" if size == 4 else ""
        targets = [general_register(cpu, getattr(Register, prefix + name)) for name in names]

        def action() -> None:
            data = cpu.read(stack.top(), 8 * size)
            for place, target in enumerate(targets):
                if place != names.index("SP"):
                    at = place * size
                    target.write(int.from_bytes(data[at : at + size], "little"))
            stack.drop(8 * size)

        return action


def _check_virtual_8086(flags: int) -> None:
    if flags & VM and flags & IOPL != IOPL:
        raise Fault(GP, 0)


class PushFlags(Handler):
    """PUSHF: VM and RF read as 0; #GP(0) in virtual-8086 mode unless IOPL is 3."""

    name = f"{__name__}.pushf"
    mnemonics = ("pushf", "pushfd", "pushfq")
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        size, stack = -insn.iced.stack_pointer_increment, Stack(cpu, insn.bitness)
        bank, mask = cpu.registers.bank, MASK[8 * size] & ~(VM | RF)

        def action() -> None:
            flags = bank.read("rflags")
            _check_virtual_8086(flags)
            stack.push((flags & mask).to_bytes(size, "little"))

        return action


class PopFlags(Handler):
    """POPF: IF changes if CPL <= IOPL, IOPL at level 0 only, VM, VIF and VIP never."""

    name = f"{__name__}.popf"
    mnemonics = ("popf", "popfd", "popfq")
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        size, stack = insn.iced.stack_pointer_increment, Stack(cpu, insn.bitness)
        bank, mask = cpu.registers.bank, MASK[8 * size]

        def action() -> None:
            flags = bank.read("rflags")
            _check_virtual_8086(flags)
            changed = _POPPED
            if may_change_interrupts(cpu, flags):
                changed |= IF
            if cpu.cpl == 0:
                changed |= IOPL
            value, changed = cpu.read_int(stack.top(), size), changed & mask
            stack.drop(size)
            kept = flags & ~changed & ~(RF & mask)
            bank.write("rflags", kept | value & changed)

        return action


_ENTER_SIZES: dict[int, int] = {
    Code.ENTERW_IMM16_IMM8: 2,
    Code.ENTERD_IMM16_IMM8: 4,
    Code.ENTERQ_IMM16_IMM8: 8,
}
_LEAVE_SIZES: dict[int, int] = {Code.LEAVEW: 2, Code.LEAVED: 4, Code.LEAVEQ: 8}
_FRAME_POINTERS = {2: Register.BP, 4: Register.EBP, 8: Register.RBP}


class Enter(Handler):
    """ENTER size, level: the frame is written in one piece, then the registers change.

    (E/R)BP changes as far as both the operand and the stack are wide, as on the host CPU.
    """

    name = f"{__name__}.enter"
    mnemonics = ("enter",)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        size, stack = _ENTER_SIZES[insn.code], Stack(cpu, insn.bitness)
        local, level = insn.iced.immediate16, insn.iced.immediate8_2nd & 31
        gpr, mask = cpu.gpr, MASK[8 * size]

        def action() -> None:
            outer = gpr[RBP]
            frame = gpr[RSP] - size
            pushed = (outer & mask).to_bytes(size, "little")
            for n in range(1, level):
                where = stack.at(outer - n * size)
                above = frame - len(pushed) + size
                pushed = _overlaid(cpu.read(where, size), where, pushed, stack.at(above)) + pushed
            if level:
                pushed = (frame & mask).to_bytes(size, "little") + pushed
            top = frame - len(pushed) + size
            cpu.check_write(stack.at(top - local), size)
            cpu.write(stack.at(top), pushed)
            stack.set(top - local)
            width = mask & stack.mask()
            gpr[RBP] = outer & ~width | frame & width

        return action


def _overlaid(data: bytes, at: int, newer: bytes, newer_at: int) -> bytes:
    """``data`` at ``at``, as it is after ``newer`` was written at ``newer_at``."""
    start, end = max(at, newer_at), min(at + len(data), newer_at + len(newer))
    if start >= end:
        return data
    return data[: start - at] + newer[start - newer_at : end - newer_at] + data[end - at :]


class Leave(Handler):
    """LEAVE: (E/R)SP = (E/R)BP, as wide as the stack pointer, then pop (E/R)BP."""

    name = f"{__name__}.leave"
    mnemonics = ("leave",)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        size, stack, gpr = _LEAVE_SIZES[insn.code], Stack(cpu, insn.bitness), cpu.gpr
        write = general_register(cpu, _FRAME_POINTERS[size]).write

        def action() -> None:
            frame = gpr[RBP]
            value = cpu.read_int(stack.at(frame), size)
            stack.set(frame + size)
            write(value)

        return action


HANDLERS = [
    Push(),
    Pop(),
    PushAll(),
    PopAll(),
    PushFlags(),
    PopFlags(),
    Enter(),
    Leave(),
]
