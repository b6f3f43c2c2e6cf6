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
from handlers.integer import Operand, Read, bind_memory, bind_register
from handlers.integer_arithmetic import sub
from handlers.integer_move import SEGMENTS
from sandbox.handler import Action, Handler, Resume
from sandbox.registers import DF, ES, FS, GS, ZF

if TYPE_CHECKING:
    from sandbox.cpu import Cpu
    from sandbox.decode import Insn

BATCH = 1024
"""The most elements that one execution handles."""

_SOURCES = {
    OpKind.MEMORY_SEG_SI: Register.SI,
    OpKind.MEMORY_SEG_ESI: Register.ESI,
    OpKind.MEMORY_SEG_RSI: Register.RSI,
}
_DESTINATIONS = {
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
        self.bits = 8 * self.size
        self.bank = cpu.registers.bank
        self.source: Operand | None = None
        self.destination: Operand | None = None
        self.address_bits = insn.bitness
        self._indexes: list[Operand] = []
        for number in range(insn.iced.op_count):
            kind = insn.iced.op_kind(number)
            if kind in _SOURCES:
                segment = SEGMENTS[insn.iced.memory_segment][0]
                self.source = self._bind_element(_SOURCES[kind], segment)
            elif kind in _DESTINATIONS:
                self.destination = self._bind_element(_DESTINATIONS[kind], ES)

    def register(self, register: int) -> Operand:
        operand = bind_register(self.cpu, register)
        assert operand is not None
        return operand

    def accumulator(self) -> Operand:
        return self.register(_ACCUMULATORS[self.size])

    def _bind_element(self, register: int, segment: int) -> Operand:
        index = self.register(register)
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
    source, destination, advance = strings.source, strings.destination, strings.bind_advance()
    assert source is not None and destination is not None
    read, write = source.read, destination.write

    def step() -> None:
        write(read())
        advance()

    return step


def _bind_stos(strings: _Strings) -> Step:
    destination, advance = strings.destination, strings.bind_advance()
    assert destination is not None
    read, write = strings.accumulator().read, destination.write

    def step() -> None:
        write(read())
        advance()

    return step


def _bind_lods(strings: _Strings) -> Step:
    source, advance = strings.source, strings.bind_advance()
    assert source is not None
    read, write = source.read, strings.accumulator().write

    def step() -> None:
        write(read())
        advance()

    return step


def _bind_cmps(strings: _Strings) -> Step:
    assert strings.source is not None
    return _bind_comparison(strings, strings.source.read)


def _bind_scas(strings: _Strings) -> Step:
    return _bind_comparison(strings, strings.accumulator().read)


def _bind_comparison(strings: _Strings, first: Read) -> Step:
    destination, advance, bank = strings.destination, strings.bind_advance(), strings.bank
    assert destination is not None
    second, bits = destination.read, strings.bits

    def step() -> None:
        _difference, flags = sub(bits, first(), second())
        advance()
        bank.write("rflags", bank.read("rflags") & ~STATUS | flags)

    return step


def _bind_repeat(strings: _Strings, step: Step, stop_at: int | None) -> Action:
    """Repeat ``step``; ``stop_at``: the state of ZF that ends it early."""
    count, bank = strings.register(_COUNTS[strings.address_bits]), strings.bank
    read, write, cpu = count.read, count.write, strings.cpu

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
