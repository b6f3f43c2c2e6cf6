"""The MMX register forms of MMX, SSE, SSE2 and SSSE3: the same operations on 64 bits.

Most are the vector operations of the other families, declared again for eight bytes. The MMX
registers are the significands of the x87 registers: every instruction that has one as operand
marks all of them as in use and puts the top of the stack at 0 (SDM Vol. 1, 9.5 and 9.6).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from iced_x86 import EncodingKind, Register, RegisterExt

from handlers import arithmetic, compare, extend, float_convert, logic, shift
from handlers.masked import bind_rdi, selected_runs
from handlers.operands import (
    Form,
    Lanes,
    Place,
    Step,
    UnsupportedFormError,
    bind_sse_guard,
    scratch,
)
from handlers.shuffle import permute
from handlers.signature import LaneType, Signature
from handlers.vector import Extent, Operation, planned
from sandbox.cpu import MF, NM, UD, XM, Cpu, Fault
from sandbox.decode import Insn
from sandbox.handler import Action, Handler, Pack

_EM, _TS, _NE = 4, 8, 0x20
_ES, _TOP = 0x80, 0x3800
_EMPTY = 0xFFFF
_EXPONENT = 0xFFFF << 64
_SERVED = frozenset((EncodingKind.LEGACY, EncodingKind.D3NOW))


def bind_mmx_guard(cpu: Cpu) -> Step:
    """#UD if CR0.EM; #NM if CR0.TS; #MF if an x87 exception is pending."""
    read = cpu.registers.bank.read

    def guard() -> None:
        cr0 = read("cr0")
        if cr0 & _EM:
            raise Fault(UD)
        if cr0 & _TS:
            raise Fault(NM)
        if cr0 & _NE and read("fpsw") & _ES:
            raise Fault(MF)

    return guard


class MmxForm(Form):
    """A form with MMX registers: each is a place in a buffer, filled before the operation."""

    def __init__(self, cpu: Cpu, insn: Insn) -> None:
        self.registers: dict[int, Place] = {}
        super().__init__(cpu, insn)
        self.legacy = True
        self._touches_sse = any(place.raw is cpu.vec.raw for place in self.places)

    def _register(self, register: Any, limit: int) -> Place:
        if not RegisterExt.is_mm(register):
            return super()._register(register, limit)
        size = min(8, limit) if limit else 8
        return self.registers.setdefault(register - Register.MM0, scratch(used=size))

    def bind_guard(self) -> Step:
        """Checks, then the registers' values."""
        guard, read = bind_mmx_guard(self.cpu), self.cpu.registers.bank.read
        guards = [bind_sse_guard(self.cpu), guard] if self._touches_sse else [guard]
        loads = [(place.raw.cast("Q"), f"mm{n}") for n, place in self.registers.items()]

        def check_and_load() -> None:
            for check in guards:
                check()
            for items, name in loads:
                items[0] = read(name)

        return check_and_load

    def bind_finish(self) -> Step:
        """The state of the x87 unit afterwards, and the result if it goes to an MMX register."""
        enter = bind_transition(self.cpu)
        number = next((n for n, p in self.registers.items() if p is self.places[0]), None)
        if number is None:
            return enter
        value, name = self.places[0].raw.cast("Q"), f"st{number}"
        write = self.cpu.registers.bank.write

        def finish() -> None:
            enter()
            write(name, _EXPONENT | value[0])

        return finish


def bind_transition(cpu: Cpu) -> Step:
    """All x87 registers in use, the top of the stack at 0: STn is MMn from then on."""
    read, write = cpu.registers.bank.read, cpu.registers.bank.write

    def enter() -> None:
        status = read("fpsw")
        if status & _TOP:
            write("fpsw", status & ~_TOP)
        if read("fptag"):
            write("fptag", 0)

    return enter


def mmx_form_of(cpu: Cpu, insn: Insn) -> MmxForm | None:
    """The form of ``insn``; None if it is none with MMX registers."""
    if insn.iced.encoding not in _SERVED:
        return None
    try:
        form = MmxForm(cpu, insn)
    except UnsupportedFormError:
        return None
    return form if form.registers else None


class MmxOperation(Operation):
    """A vector operation on MMX registers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = f"mmx.{self.names[0]}"
        self.mnemonics = self.names

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        form = mmx_form_of(cpu, insn)
        if form is None or not self.accepts(form) or self.signature.destination is None:
            return None
        body = self._bind_result(form, self._sources(form), self.signature.destination)
        finish = form.bind_finish()

        def action() -> None:
            body()
            finish()

        return action


def on_mmx(operation: Operation, kind: type[MmxOperation] = MmxOperation) -> MmxOperation:
    """The same operation on eight bytes: rows of a 128-bit block get half as long."""
    signature = operation.signature
    half = Signature(
        tuple(_halved(lane) for lane in signature.sources),
        None if signature.destination is None else _halved(signature.destination),
    )
    names = tuple(name for name in operation.names if not name.startswith("v"))
    return kind(names, half, operation.plan, operation.extent, operation.staged, operation.accepts)


def _halved(lane: LaneType) -> LaneType:
    return replace(lane, row=lane.row // 2) if lane.row else lane


_NAMES = frozenset(
    """paddb paddw paddd paddq psubb psubw psubd psubq paddsb paddsw paddusb paddusw psubsb psubsw
    psubusb psubusw pmullw pmulhw pmulhuw pmulhrsw pmuludq pmaddwd pmaddubsw pavgb pavgw psadbw
    pminub pminsw pmaxub pmaxsw pabsb pabsw pabsd psignb psignw psignd phaddw phaddd phaddsw phsubw
    phsubd phsubsw pcmpeqb pcmpeqw pcmpeqd pcmpgtb pcmpgtw pcmpgtd pmovmskb packsswb packuswb
    packssdw pand por pxor pandn psllw pslld psllq psrlw psrld psrlq psraw psrad""".split()
)
"""What is the same on 64 and on 128 bits."""

_FAMILIES: tuple[Any, ...] = (
    *(arithmetic.ADD, arithmetic.SUB, arithmetic.MULTIPLY_LOW, arithmetic.MIN_MAX, arithmetic.ABS),
    *(arithmetic.SATURATING, arithmetic.MULTIPLY_HIGH, arithmetic.MULTIPLY_EVEN),
    *(arithmetic.AVERAGE, arithmetic.SIGN, arithmetic.HORIZONTAL),
    [arithmetic.multiply_round_scale, arithmetic.multiply_add_words],
    [arithmetic.multiply_add_bytes, arithmetic.sum_of_differences],
    *(compare.COMPARE, compare.SIGN_MASKS, extend.PACK_LANES),
    [logic.AND, logic.OR, logic.XOR, logic.and_not],
    *(shift.BY_IMMEDIATE, shift.BY_REGISTER),
)
SAME = [
    on_mmx(operation)
    for family in _FAMILIES
    for operation in family
    if not _NAMES.isdisjoint(operation.names)
]


def _interleave(lanes: int, high: bool) -> Callable[[Form], list[int]]:
    start = lanes // 2 if high else 0
    order = [lane for i in range(lanes // 2) for lane in (start + i, lanes + start + i)]
    return lambda form: order


def _align(form: Form) -> list[int]:
    """The first source is the high half of what is shifted; lanes beyond it are zero."""
    return [8 + i if i < 8 else i - 8 if i < 16 else -1 for i in range(form.imm, form.imm + 8)]


SHUFFLES = [
    on_mmx(permute(names, signature, pattern))
    for names, signature, pattern in (
        ("punpcklbw", "u1,u1->u1", _interleave(8, False)),
        ("punpcklwd", "u2,u2->u2", _interleave(4, False)),
        ("punpckldq", "u4,u4->u4", _interleave(2, False)),
        ("punpckhbw", "u1,u1->u1", _interleave(8, True)),
        ("punpckhwd", "u2,u2->u2", _interleave(4, True)),
        ("punpckhdq", "u4,u4->u4", _interleave(2, True)),
        ("palignr", "u1,u1->u1", _align),
        ("pshufw", "u2->u2", lambda form: [form.imm >> 2 * i & 3 for i in range(4)]),
        ("pinsrw", "u2,u2->u2", lambda form: [4 if i == form.imm & 3 else i for i in range(4)]),
        ("pextrw", "u2->u2", lambda form: [form.imm & 3]),
    )
]


def _shuffle_bytes(form: Form, data: memoryview, index: memoryview, out: memoryview) -> Step:
    """Indices 0 to 127 wrap in the eight bytes, others give 0."""
    zeros = bytes(128)

    def step() -> None:
        out[:] = bytes(index).translate(bytes(data) * 16 + zeros)

    return step


SHUFFLE_BYTES = on_mmx(planned("pshufb", "b,b->b", _shuffle_bytes, Extent.WHOLE))


def _copy_first(form: Form, a: Lanes, out: Lanes) -> Step:
    """Lane 0; what lies above it in a wider destination becomes zero."""

    def step() -> None:
        out[0] = a[0]

    return step


MOVES = [
    on_mmx(planned(names, signature, _copy_first, Extent.WHOLE))
    for names, signature in (("movd", "u4->u4"), ("movq movntq movq2dq movdq2q", "u8->u8"))
]

_CONVERSIONS = {
    name: operation.plan
    for operation in (*float_convert.INTEGER_TO_FLOAT, *float_convert.FLOAT_TO_INTEGER)
    for name in operation.names
}


def _integers_to_singles(form: Form, before: Lanes, a: Lanes, out: Lanes) -> Step:
    """CVTPI2PS keeps the two upper lanes."""
    converted = np.zeros(2, "f4")
    convert = _CONVERSIONS["cvtdq2ps"](form, a, converted)

    def step() -> None:
        convert()
        out[2:] = before[2:]
        out[:2] = converted

    return step


class Conversion(MmxOperation):
    """From or to floating point. From memory to XMM is no matter of the x87 unit.

    If an exception is not masked, the x87 state changes all the same, as AMD's CPUs do.
    """

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        convert, enter = super().bind(cpu, insn), bind_transition(cpu)
        if convert is None:
            return Operation.bind(self, cpu, insn)

        def action() -> None:
            try:
                convert()
            except Fault as fault:
                if fault.vector == XM:
                    enter()
                raise

        return action


CONVERSIONS = [
    on_mmx(planned(name, signature, plan, Extent.WHOLE), Conversion)
    for name, signature, plan in (
        ("cvtpi2ps", "f4,i4->f4", _integers_to_singles),
        ("cvtpi2pd", "i4->f8", _CONVERSIONS["cvtdq2pd"]),
        ("cvtps2pi", "f4->i4", _CONVERSIONS["cvtps2dq"]),
        ("cvttps2pi", "f4->i4", _CONVERSIONS["cvttps2dq"]),
        ("cvtpd2pi", "f8->i4", _CONVERSIONS["cvtpd2dq"]),
        ("cvttpd2pi", "f8->i4", _CONVERSIONS["cvttpd2dq"]),
    )
]


class MaskMove(Handler):
    """MASKMOVQ: bytes of the first register under the second's signs, to [rDI].

    The x87 state changes even if the store faults, as AMD's CPUs do.
    """

    name = "mmx.maskmovq"
    mnemonics = ("maskmovq",)
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        source, mask = (
            f"mm{register - Register.MM0}"
            for register in (insn.iced.op1_register, insn.iced.op2_register)
        )
        guard, enter, address = bind_mmx_guard(cpu), bind_transition(cpu), bind_rdi(cpu, insn)
        read, write, check_write = cpu.registers.bank.read, cpu.write, cpu.check_write

        def action() -> None:
            guard()
            at = address()
            enter()
            check_write(at, 8)
            data = read(source).to_bytes(8, "little")
            runs = selected_runs(memoryview(read(mask).to_bytes(8, "little")), 1)
            for first, end in runs:
                write(at + first, data[first:end])

        return action


class EmptyRegisters(Handler):
    """EMMS, FEMMS: all x87 registers are free."""

    name = "mmx.emms"
    mnemonics = ("emms", "femms")
    restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        guard, enter, write = bind_mmx_guard(cpu), bind_transition(cpu), cpu.registers.bank.write

        def action() -> None:
            guard()
            enter()
            write("fptag", _EMPTY)

        return action


MASK_MOVE, EMPTY = MaskMove(), EmptyRegisters()

PACK = Pack.of("mmx", SAME, SHUFFLES, SHUFFLE_BYTES, MOVES, CONVERSIONS, MASK_MOVE, EMPTY)
"""The MMX registers: MMX, and their part of SSE, SSE2 and SSSE3."""
