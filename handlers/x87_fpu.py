"""The x87 unit as its handlers see it: stack, status, exceptions, and how instructions are bound.

An instruction runs between :meth:`Fpu.begin` and :meth:`Fpu.end` on working copies of the status
and tag words. What reads or checks memory comes first, so a fault leaves everything as it was.

An unmasked exception sets ES and B and is reported as #MF by the next waiting instruction among
these handlers, if CR0.NE is set (SDM Vol. 1, 8.6 and 8.7). With CR0.NE clear errors would go
through an interrupt controller, which is not here: they are ignored, as with IGNNE# asserted.

All but control instructions leave their address in FIP and that of a memory operand in FDP. FOP is
written when an exception becomes pending, as on processors since the Pentium 4; the selectors are
deprecated and 0 (CPUID.7:EBX[13]).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from handlers.softfloat import DE, IE, ZE
from handlers.x87_format import (
    DEFAULT_NAN,
    NANS,
    QUIET_BIT,
    SIGN,
    SIGNIFICAND,
    Kind,
    Rounded,
    kind_of,
)
from sandbox.cpu import MF, NM, Cpu, Fault, bind_offset
from sandbox.decode import Insn
from sandbox.handler import Action, Handler
from sandbox.registers import reader, writer

SF, ES, B = 0x40, 0x80, 0x8000
C0, C1, C2, C3 = 0x100, 0x200, 0x400, 0x4000
CONDITIONS = C0 | C1 | C2 | C3
FLAGS = 0x3F
"""IE DE ZE OE UE PE, at the same place in the status and the control word."""
TOP = 0x3800
PRECOMPUTATION = IE | DE | ZE
"""Exceptions that, unmasked, leave operands and stack alone (SDM Vol. 1, 8.6)."""

_MP, EM, TS, _NE = 2, 4, 8, 0x20
_ST: Final = tuple(f"st{i}" for i in range(8))
_EMPTY: Final = 3
_APPROXIMATE: Final = frozenset("fsin fcos fsincos fptan fpatan f2xm1 fyl2x fyl2xp1".split())
"""The last bit is not the same on every CPU."""


class Stop(Exception):
    """An unmasked exception ends the instruction before its result is stored."""


class Fpu:
    """The x87 state of one vCPU, for the length of an instruction: ``cw``, ``sw`` and ``tags``."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        bank = cpu.registers.bank
        self.read, self.write = bank.read, bank.write
        self._read_words = tuple(reader(bank, name) for name in ("fpsw", "fpcw", "fptag"))
        self._write_words = writer(bank, "fpsw"), writer(bank, "fptag")
        self._read_st = tuple(reader(bank, name) for name in _ST)
        self._write_st = tuple(writer(bank, name) for name in _ST)
        self.cw = self.sw = self.tags = 0
        self._before = (0, 0)
        self._failed = False
        self.denormal_source = False
        """The operand in memory is a denormal there, though no register that it fills is."""

    @classmethod
    def of(cls, cpu: Cpu) -> Fpu:
        """The one of this vCPU."""
        found = cpu.services.get("x87")
        if not isinstance(found, Fpu):
            found = cpu.services["x87"] = cls(cpu)
        return found

    # -- begin and end ----------------------------------------------------------------------------

    def begin_control(self) -> int:
        """#NM if the unit is off: for instructions that do not wait for a pending exception."""
        cr0 = self._cr0()
        if cr0 & (EM | TS):
            raise Fault(NM)
        self._load()
        return cr0

    def begin_waiting(self) -> None:
        """As :meth:`begin_control`, and #MF if an exception is pending."""
        self._report(self.begin_control())

    def begin(self) -> None:
        """As :meth:`begin_waiting`, for instructions that compute or move data: C1 = 0."""
        cr0 = self.begin_control()
        if self.sw & ES:
            self._report(cr0)
        self.sw &= ~C1

    def begin_wait(self) -> None:
        """For WAIT: #NM if CR0.MP and CR0.TS are set; #MF if an exception is pending."""
        cr0 = self._cr0()
        if cr0 & (_MP | TS) == _MP | TS:
            raise Fault(NM)
        self._load()
        self._report(cr0)

    def _cr0(self) -> int:
        controls = self._cpu.registers.controls
        return self.read("cr0") if controls is None else controls[0]

    def _load(self) -> None:
        read_status, read_control, read_tags = self._read_words
        self.sw, self.cw, self.tags = read_status(), read_control(), read_tags()
        self._before = (self.sw, self.tags)
        self._failed = self.denormal_source = False

    def _report(self, cr0: int) -> None:
        if self.sw & ES and cr0 & _NE:
            raise Fault(MF)

    def end(self) -> None:
        """Write the status and tag words back."""
        (sw, tags), (write_status, write_tags) = self._before, self._write_words
        if self.sw != sw:
            write_status(self.sw)
        if self.tags != tags:
            write_tags(self.tags)

    def bind_pointers(self, insn: Insn) -> Callable[[], None]:
        """What writes FIP, FDP and FOP for an instruction."""
        bank, rip, opcode = self._cpu.registers.bank, self._cpu.registers.rip_view, fop_of(insn)
        write_instruction, write_operand = writer(bank, "fip"), writer(bank, "fdp")
        operand = bind_offset(self._cpu, insn) if has_memory(insn) else None

        def point() -> None:
            write_instruction(rip[0])
            if operand is not None:
                write_operand(operand())
            if self._failed:
                bank.write("fop", opcode)

        return point

    # -- the stack --------------------------------------------------------------------------------

    def is_empty(self, i: int) -> bool:
        return self.tags >> 2 * ((self.sw >> 11) + i & 7) & 3 == _EMPTY

    def st(self, i: int) -> int:
        """ST(i) as it is, empty or not."""
        return self._read_st[i - self._moved & 7]()

    @property
    def _moved(self) -> int:
        """By how much the top of the stack stands below where the register bank has it."""
        return (self._before[0] >> 11) - (self.sw >> 11) & 7

    def set(self, i: int, value: int) -> None:
        """Write ST(i) and mark it as in use."""
        self._write_st[i - self._moved & 7](value)
        shift = 2 * ((self.sw >> 11) + i & 7)
        kind = kind_of(value)
        tag = 0 if kind is Kind.NORMAL else 1 if kind is Kind.ZERO else 2
        self.tags = self.tags & ~(3 << shift) | tag << shift

    def free(self, i: int) -> None:
        self.tags |= _EMPTY << 2 * ((self.sw >> 11) + i & 7)

    def move_top(self, by: int) -> None:
        self.sw = self.sw & ~TOP | (self.sw + (by << 11)) & TOP

    def pop(self) -> None:
        self.free(0)
        self.move_top(1)

    def push(self, value: int) -> None:
        self.move_top(-1)
        self.set(0, value)

    # -- exceptions -------------------------------------------------------------------------------

    def signal(self, flags: int) -> None:
        """Raise exceptions: :class:`Stop` if one that comes before the result is not masked."""
        self.note(flags)
        if flags & PRECOMPUTATION & ~self.cw:
            raise Stop

    def note(self, flags: int) -> None:
        """Raise exceptions of a result that is stored nevertheless."""
        self.sw |= flags
        if flags & ~self.cw & FLAGS:
            self.sw |= ES | B
            self._failed = True

    def summarize(self) -> None:
        """ES and B follow the flags and masks, after either was loaded."""
        pending = self.sw & ~self.cw & FLAGS
        self.sw = self.sw | ES | B if pending else self.sw & ~(ES | B)

    def load_control(self, value: int) -> None:
        self.cw = value
        self.write("fpcw", value)

    def rounded_up(self, up: bool) -> None:
        """C1 tells whether the last rounding was away from zero."""
        self.sw = self.sw & ~C1 | (C1 if up else 0)

    def underflow(self) -> None:
        """A register that should hold an operand is empty."""
        self.sw &= ~C1
        self.signal(IE | SF)

    def check_room(self) -> bool:
        """Whether a value can be pushed. If not, and that is masked, what is pushed is a NaN."""
        if self.is_empty(7):
            return True
        self.sw |= C1
        self.signal(IE | SF)
        return False

    def store(self, i: int, result: Rounded) -> None:
        """A rounded result goes to ST(i), its flags and C1 to the status word."""
        self.note(result.flags)
        self.rounded_up(result.up)
        self.set(i, result.bits)

    def special(self, *operands: int) -> int | None:
        """What unsupported operands and NaNs make of an instruction: a NaN, or None for neither.

        Raises IE as they demand, DE not at all.
        """
        kinds = [kind_of(a) for a in operands]
        if Kind.UNSUPPORTED in kinds:
            self.signal(IE)
            return DEFAULT_NAN
        if NANS.isdisjoint(kinds):
            return None
        if Kind.SIGNALING in kinds:
            self.signal(IE)
        return propagate(operands, kinds)

    def operands(self, target: int, *registers: int) -> tuple[int, ...] | None:
        """What ``registers`` hold, or None after ST(target) has become the NaN that comes of it."""
        if any(map(self.is_empty, registers)):
            self.underflow()
            self.set(target, DEFAULT_NAN)
            return None
        values = tuple(map(self.st, registers))
        nan = self.special(*values)
        if nan is not None:
            self.set(target, nan)
            return None
        return values

    def denormals(self, *operands: int) -> None:
        """Raise DE if an operand is a denormal."""
        if self.denormal_source or any(kind_of(a) is Kind.DENORMAL for a in operands):
            self.signal(DE)


def propagate(operands: tuple[int, ...], kinds: list[Kind]) -> int:
    """The NaN that comes of NaN operands, quiet (SDM Vol. 1, table 4-7).

    A quiet one goes before a signaling one, then the larger significand, then the positive one.
    """
    nans = [
        (kind is Kind.QUIET, a & SIGNIFICAND, not a & SIGN, a)
        for a, kind in zip(operands, kinds, strict=True)
        if kind in NANS
    ]
    return max(nans)[3] | QUIET_BIT


Body = Callable[[], None]
Binder = Callable[[Cpu, Fpu, Insn], Body]


class Control(Handler):
    """An x87 control instruction: ``make`` gives, for one vCPU and instruction, what it does after
    ``begin``, one of those of :class:`Fpu`."""

    restartable = True

    def __init__(
        self, make: Binder, mnemonics: tuple[str, ...], begin: Callable[[Fpu], object]
    ) -> None:
        self.make = make
        self.name = _name(make)
        self.mnemonics = mnemonics
        self.begin = begin

    def on_host(self, insn: Insn) -> bool:
        return insn.mnemonic not in _APPROXIMATE

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        fpu = Fpu.of(cpu)
        begin, body, end = self.begin, self.make(cpu, fpu, insn), fpu.end

        def action() -> None:
            begin(fpu)
            try:  # noqa: SIM105 - which costs nothing where nothing is raised
                body()
            except Stop:
                pass
            end()

        return action


class Instruction(Control):
    """An x87 instruction that computes or moves data."""

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        fpu = Fpu.of(cpu)
        begin, body, end = self.begin, self.make(cpu, fpu, insn), fpu.end
        point = fpu.bind_pointers(insn)

        def action() -> None:
            begin(fpu)
            try:  # noqa: SIM105 - which costs nothing where nothing is raised
                body()
            except Stop:
                pass
            point()
            end()

        return action


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__.removeprefix('handlers.')}.{function.__name__}"


def instruction(
    *mnemonics: str, begin: Callable[[Fpu], object] = Fpu.begin
) -> Callable[[Binder], Instruction]:
    """Make the handler of ``mnemonics`` of a function that binds their body."""

    def decorate(make: Binder) -> Instruction:
        return Instruction(make, mnemonics, begin)

    return decorate


def control(*mnemonics: str, begin: Callable[[Fpu], object]) -> Callable[[Binder], Control]:
    """As :func:`instruction`, for control instructions."""

    def decorate(make: Binder) -> Control:
        return Control(make, mnemonics, begin)

    return decorate


def simple(*mnemonics: str) -> Callable[[Callable[[Fpu], None]], Instruction]:
    """As :func:`instruction`, for those that have no operand but the stack."""

    def decorate(function: Callable[[Fpu], None]) -> Instruction:
        def make(_cpu: Cpu, fpu: Fpu, _insn: Insn) -> Body:
            return partial(function, fpu)

        found = Instruction(make, mnemonics, Fpu.begin)
        found.name = _name(function)
        return found

    return decorate


def fop_of(insn: Insn) -> int:
    """The 11 bits of FOP: the low bits of the opcode, and the ModRM byte (SDM Vol. 1, 8.1.9)."""
    at = next((n for n, byte in enumerate(insn.raw) if byte & 0xF8 == 0xD8), None)
    if at is None or at + 1 >= insn.length:
        return 0
    return (insn.raw[at] & 7) << 8 | insn.raw[at + 1]


def has_memory(insn: Insn) -> bool:
    """Whether an operand is in memory."""
    return insn.iced.memory_size != 0
