"""SSE4.2 string comparisons: PCMPISTRI PCMPISTRM PCMPESTRI PCMPESTRM and their VEX forms.

SDM Vol. 2, 4.1 (imm8 control byte). String 1 is the first operand (the set, the ranges, the
needle), string 2 the second operand, from a register or memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from handlers.operands import Form, Lanes, Place
from handlers.vector import STATUS_FLAGS, form_of, mnemonics_of
from sandbox.cpu import Cpu
from sandbox.decode import Insn
from sandbox.handler import Action, Handler
from sandbox.registers import CF, OF, RAX, RCX, RDX, SF, VECTOR_BYTES, ZF

Text = Sequence[int]
Compare = Callable[[Text, Text, int], int]
"""``(string 1, string 2, lanes) -> bits``: both strings cut to their valid elements."""


def _equal_any(first: Text, second: Text, lanes: int) -> int:
    return sum(1 << j for j, item in enumerate(second) if item in first)


def _ranges(first: Text, second: Text, lanes: int) -> int:
    pairs = [(first[i], first[i + 1]) for i in range(0, len(first) - 1, 2)]
    return sum(
        1 << j for j, item in enumerate(second) if any(low <= item <= high for low, high in pairs)
    )


def _equal_each(first: Text, second: Text, lanes: int) -> int:
    """Beyond the end of both strings elements count as equal."""
    same = sum(1 << i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a == b)
    both_end = max(len(first), len(second))
    return same | (1 << lanes) - (1 << both_end)


def _equal_ordered(first: Text, second: Text, lanes: int) -> int:
    """Where string 1 stands in string 2; what sticks out of the register is not compared."""
    return sum(
        1 << j
        for j in range(lanes)
        if all(
            j + i < len(second) and second[j + i] == item
            for i, item in enumerate(first)
            if j + i < lanes
        )
    )


_COMPARE: tuple[Compare, ...] = (_equal_any, _ranges, _equal_each, _equal_ordered)


def compare(first: Text, second: Text, lanes: int, control: int) -> int:
    """IntRes2 for two strings of valid elements."""
    found = _COMPARE[control >> 2 & 3](first, second, lanes)
    if control & 0x10:  # negate: all, or only where string 2 is valid
        found ^= (1 << (len(second) if control & 0x20 else lanes)) - 1
    return found


def _bind_elements(place: Place, control: int) -> Lanes:
    return place.lanes(("u1", "u2", "i1", "i2")[control & 3], 8 if control & 1 else 16)


def _before_null(elements: Lanes) -> list[int]:
    items: list[int] = elements.tolist()
    return items[: items.index(0)] if 0 in items else items


@dataclass(eq=False)
class StringCompare(Handler):
    """One of the four; ``lengths``: in EAX and EDX (RAX and RDX with REX.W), not by a null."""

    names: tuple[str, ...]
    lengths: bool
    index: bool

    def on_host(self, insn: Insn) -> bool:
        return True

    def __post_init__(self) -> None:
        self.name = f"strings.{self.names[0]}"
        self.mnemonics = mnemonics_of(self.names)
        self.restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        form = form_of(cpu, insn)
        if form is None:
            return None
        guard, control = form.bind_guard(), form.imm
        lanes = 8 if control & 1 else 16
        load = form.bind_load() if form.memory else guard
        strings = self._bind_strings(form, lanes)
        store = (_bind_index if self.index else _bind_mask)(form, lanes)

        def action() -> None:
            guard()
            load()
            first, second = strings()
            found = compare(first, second, lanes, control)
            flags = (CF if found else 0) | (OF if found & 1 else 0)
            flags |= (SF if len(first) < lanes else 0) | (ZF if len(second) < lanes else 0)
            cpu.rflags = cpu.rflags & ~STATUS_FLAGS | flags
            store(found)

        return action

    def _bind_strings(self, form: Form, lanes: int) -> Callable[[], tuple[Text, Text]]:
        first, second = (_bind_elements(place, form.imm) for place in form.places)
        if not self.lengths:
            return lambda: (_before_null(first), _before_null(second))
        gpr, bits = form.cpu.gpr, 64 if form.insn.mnemonic.endswith("64") else 32

        def length(register: int) -> int:
            value = gpr[register] & (1 << bits) - 1
            return min(value, (1 << bits) - value, lanes)  # the absolute value, saturated

        return lambda: (first[: length(RAX)].tolist(), second[: length(RDX)].tolist())


def _bind_index(form: Form, lanes: int) -> Callable[[int], None]:
    gpr, highest = form.cpu.gpr, form.imm & 0x40

    def store(found: int) -> None:
        if not found:
            gpr[RCX] = lanes
        elif highest:
            gpr[RCX] = found.bit_length() - 1
        else:
            gpr[RCX] = (found & -found).bit_length() - 1

    return store


def _bind_mask(form: Form, lanes: int) -> Callable[[int], None]:
    raw, end = form.cpu.vec.raw, 16 if form.legacy else VECTOR_BYTES
    expand, lane = form.imm & 0x40, 16 // lanes

    def store(found: int) -> None:
        if expand:
            mask = b"".join(bytes([-(found >> i & 1) & 0xFF]) * lane for i in range(lanes))
        else:
            mask = found.to_bytes(16, "little")
        raw[:end] = mask.ljust(end, b"\0")

    return store


STRING_COMPARES = [
    StringCompare(("pcmpistri",), lengths=False, index=True),
    StringCompare(("pcmpistrm",), lengths=False, index=False),
    StringCompare(("pcmpestri", "pcmpestri64"), lengths=True, index=True),
    StringCompare(("pcmpestrm", "pcmpestrm64"), lengths=True, index=False),
]
