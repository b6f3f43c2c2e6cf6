"""String instructions (SDM Vol. 1, 7.3.9): MOVS, CMPS, SCAS, LODS, STOS and their REP prefixes.

A repeated instruction keeps its progress in the count and index registers after every element, so
that a fault leaves it where it can go on, as on hardware. Elements are accessed one by one, which
is what a device sees. After :data:`BATCH` elements the handler lets go of the instruction without
leaving it, for interrupts and time limits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from iced_x86 import OpKind, Register

from handlers.flags import MASK, STATUS
from handlers.integer import Operand, Read, Write, bind_memory, general_register
from handlers.integer_arithmetic import sub
from handlers.integer_move import SEGMENTS
from sandbox.handler import Action, Handler, Resume
from sandbox.registers import DF, ES, FS, GS, ZF

if TYPE_CHECKING:
    from sandbox.cpu import Cpu
    from sandbox.decode import Insn

BATCH = 1024
"""The most elements that one execution handles."""

_SOURCES: dict[int, int] = {
    OpKind.MEMORY_SEG_SI: Register.SI,
    OpKind.MEMORY_SEG_ESI: Register.ESI,
    OpKind.MEMORY_SEG_RSI: Register.RSI,
}
_DESTINATIONS: dict[int, int] = {
    OpKind.MEMORY_ESDI: Register.DI,
    OpKind.MEMORY_ESEDI: Register.EDI,
    OpKind.MEMORY_ESRDI: Register.RDI,
}
_COUNTS = {16: Register.CX, 32: Register.ECX, 64: Register.RCX}
_ACCUMULATORS = {1: Register.AL, 2: Register.AX, 4: Register.EAX, 8: Register.RAX}
_SIZES = {"b": 1, "w": 2, "d": 4, "q": 8}

Step = Callable[[], None]


class _Strings:
    """The parts of one string instruction: its elements and how its index registers advance."""

    def __init__(self, cpu: Cpu, insn: Insn) -> None:
        self.cpu = cpu
        self.insn = insn
        self.size = _SIZES[insn.mnemonic[-1]]
        self.bank = cpu.registers.bank
        self.address_bits = insn.bitness
        self._kinds = [insn.iced.op_kind(number) for number in range(insn.iced.op_count)]
        self._indexes: list[Operand] = []

    def accumulator(self) -> Operand:
        return general_register(self.cpu, _ACCUMULATORS[self.size])

    def count(self) -> Operand:
        return general_register(self.cpu, _COUNTS[self.address_bits])

    def source(self) -> Operand:
        """The element at (E/R)SI, in DS or the segment of a prefix."""
        return self._bind_element(_SOURCES, SEGMENTS[self.insn.iced.memory_segment][0])

    def destination(self) -> Operand:
        """The element at (E/R)DI, always in ES."""
        return self._bind_element(_DESTINATIONS, ES)

    def _bind_element(self, registers: dict[int, int], segment: int) -> Operand:
        (register,) = (registers[kind] for kind in self._kinds if kind in registers)
        index = general_register(self.cpu, register)
        self.address_bits = index.bits
        self._indexes.append(index)
        return bind_memory(self.cpu, self._bind_address(index.read, segment), self.size)

    def _bind_address(self, offset: Read, segment: int) -> Read:
        base = self.bank.segment_base
        if self.insn.bitness != 64:
            return lambda: (offset() + base(segment)) & MASK[32]
        if segment in (FS, GS):
            return lambda: (offset() + base(segment)) & MASK[64]
        return offset

    def bind_advance(self) -> Step:
        """Move the index registers to the next element, in the direction that DF gives."""
        bank, size, indexes = self.bank, self.size, self._indexes

        def advance() -> None:
            step = -size if bank.read("rflags") & DF else size
            for index in indexes:
                index.write(index.read() + step)

        return advance


def _bind_movs(strings: _Strings) -> Step:
    return _bind_transfer(strings, strings.source().read, strings.destination().write)


def _bind_stos(strings: _Strings) -> Step:
    return _bind_transfer(strings, strings.accumulator().read, strings.destination().write)


def _bind_lods(strings: _Strings) -> Step:
    return _bind_transfer(strings, strings.source().read, strings.accumulator().write)


def _bind_transfer(strings: _Strings, read: Read, write: Write) -> Step:
    advance = strings.bind_advance()

    def step() -> None:
        write(read())
        advance()

    return step


def _bind_cmps(strings: _Strings) -> Step:
    return _bind_comparison(strings, strings.source().read, strings.destination().read)


def _bind_scas(strings: _Strings) -> Step:
    return _bind_comparison(strings, strings.accumulator().read, strings.destination().read)


def _bind_comparison(strings: _Strings, first: Read, second: Read) -> Step:
    advance, bank, bits = strings.bind_advance(), strings.bank, 8 * strings.size

    def step() -> None:
        _difference, flags = sub(bits, first(), second())
        advance()
        bank.write("rflags", bank.read("rflags") & ~STATUS | flags)

    return step


def _bind_repeat(strings: _Strings, step: Step, stop_at: int | None) -> Action:
    """Repeat ``step``; ``stop_at``: the state of ZF that ends it early."""
    count, bank, cpu = strings.count(), strings.bank, strings.cpu
    read, write = count.read, count.write

    def action() -> Resume | None:
        for _ in range(BATCH):
            left = read()
            if not left:
                return None
            step()
            write(left - 1)
            if stop_at is not None and bank.read("rflags") & ZF == stop_at:
                return None
        return Resume(cpu.rip)

    return action


class StringInstruction(Handler):
    """One string instruction in all element sizes, ``compares``: REPE and REPNE look at ZF.

    Declared by form, as MOVSD and CMPSD are the names of SSE2 instructions too.
    """

    restartable = True

    def __init__(
        self,
        stem: str,
        forms: str,
        bind_step: Callable[[_Strings], Step],
        *,
        compares: bool = False,
    ) -> None:
        self.name = f"{__name__}.{stem}"
        self.forms = tuple(forms.split())
        self.bind_step = bind_step
        self.compares = compares

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        iced = insn.iced
        strings = _Strings(cpu, insn)
        step = self.bind_step(strings)
        if not (iced.has_rep_prefix or iced.has_repne_prefix):
            return step
        stop_at = None
        if self.compares:
            stop_at = ZF if iced.has_repne_prefix else 0
        return _bind_repeat(strings, step, stop_at)


HANDLERS = [
    StringInstruction("movs", "MOVSB_M8_M8 MOVSW_M16_M16 MOVSD_M32_M32 MOVSQ_M64_M64", _bind_movs),
    StringInstruction("stos", "STOSB_M8_AL STOSW_M16_AX STOSD_M32_EAX STOSQ_M64_RAX", _bind_stos),
    StringInstruction("lods", "LODSB_AL_M8 LODSW_AX_M16 LODSD_EAX_M32 LODSQ_RAX_M64", _bind_lods),
    StringInstruction(
        "cmps", "CMPSB_M8_M8 CMPSW_M16_M16 CMPSD_M32_M32 CMPSQ_M64_M64", _bind_cmps, compares=True
    ),
    StringInstruction(
        "scas", "SCASB_AL_M8 SCASW_AX_M16 SCASD_EAX_M32 SCASQ_RAX_M64", _bind_scas, compares=True
    ),
]
