"""Where Unicorn keeps the x87 unit in its CPU state: found and verified as the rest of it.

The stack is eight registers by physical number, 16 bytes apart, with a byte each that says whether
it is empty; TOP is a number of its own. Rounding and precision control are kept a second time, as
the arithmetic wants them.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Final

from sandbox.engine.unicorn_layout import Prober, layout
from sandbox.engine.unicorn_library import library, x86
from sandbox.errors import EngineError
from sandbox.registers import X87View

REGISTER_BYTES: Final = 16
"""From one register to the next."""
_SIZE: Final = 10
_NO_MASKS: Final = 0x340
_BLOCK: Final = 64


@dataclass(frozen=True, slots=True)
class X87Layout:
    """Offsets in bytes, from the CPU state on."""

    top: int
    """32 bits, 0 to 7."""
    status: int
    """The status word without TOP."""
    control: int
    tags: int
    """Eight bytes: 1 if the register is empty, else 0."""
    registers: int
    opcode: int
    instruction: int
    operand: int
    """FOP; FIP and FDP, 64 bits each."""
    rounding: int
    """A byte that has rounding control."""
    precision: int
    """A byte for precision control."""
    precisions: tuple[int, int, int, int]
    """What it is for each."""


class _X87Prober(Prober):
    """The same with the names of x87 registers."""

    def place(self, name: str, size: int) -> int:
        """Where a register is as it is written."""
        number = getattr(x86, f"UC_X86_REG_{name}")
        return self.find(name, number, random.randbytes(size), random.randbytes(size))

    def put(self, name: str, value: int) -> bytes:
        """The state with a 16-bit register as it is then."""
        self.write(getattr(x86, f"UC_X86_REG_{name}"), struct.pack("<H", value))
        return self.state()

    def changed(self, name: str, before: int, after: int) -> dict[int, int]:
        """Offsets of the bytes that differ between two values, and what they become."""
        old, new = self.put(name, before), self.put(name, after)
        blocks = (
            n for n in range(0, len(old), _BLOCK) if old[n : n + _BLOCK] != new[n : n + _BLOCK]
        )
        return {at: new[at] for n in blocks for at in range(n, n + _BLOCK) if old[at] != new[at]}


def _discover() -> X87Layout | None:
    probe = _X87Prober(library())
    try:
        probe.write(x86.UC_X86_REG_CR3, bytes(8))  # the state is there from the first write on
        probe.use(layout().cpu, layout().state)
        places = [probe.place(f"FP{n}", _SIZE) for n in range(8)]
        registers = places[0]
        if places != [registers + REGISTER_BYTES * n for n in range(8)]:
            return None
        words = _words(probe)
        arithmetic = _arithmetic(probe, words[2]) if words else None
        if words is None or arithmetic is None:
            return None
        pointers = [probe.place(name, size) for name, size in (("FOP", 2), ("FIP", 8), ("FDP", 8))]
    finally:
        probe.close()
    opcode, instruction, operand = pointers
    return X87Layout(*words, registers, opcode, instruction, operand, *arithmetic)


def _words(probe: _X87Prober) -> tuple[int, int, int, int] | None:
    """Offsets of TOP, status word, control word and tags, if they are as expected."""
    tops = [probe.changed("FPSW", 0, top << 11) for top in range(1, 8)]
    top = min(tops[0], default=-1)
    flags = probe.changed("FPSW", 0, 0xC7FF)
    status = min(flags, default=-1)
    control = min(probe.changed("FPCW", _NO_MASKS, _NO_MASKS | 0x3F), default=-1)
    tags = [probe.changed("FPTAG", 0, 3 << 2 * n) for n in range(8)]
    first = min(tags[0], default=-1)
    is_known = (
        tops == [{top: n} for n in range(1, 8)]
        and flags == {status: 0xFF, status + 1: 0xC7}
        and probe.changed("FPCW", _NO_MASKS, _NO_MASKS | 0x3F) == {control: 0x7F}
        and tags == [{first + n: 1} for n in range(8)]
    )
    return (top, status, control, first) if is_known else None


def _arithmetic(
    probe: _X87Prober, control: int
) -> tuple[int, int, tuple[int, int, int, int]] | None:
    """Offsets of rounding and precision, and the values of the latter."""
    roundings = [probe.changed("FPCW", 0x37F, 0x37F | n << 10) for n in (1, 2, 3)]
    rounding = min(roundings[0].keys() - {control + 1}, default=-1)
    single = probe.changed("FPCW", 0x37F, 0x07F).keys()
    precision = min(single - {control + 1}, default=-1)
    is_known = (
        roundings == [{control + 1: 3 | n << 2, rounding: n} for n in (1, 2, 3)]
        and single == {control + 1, precision}
        and not probe.put("FPCW", 0x37F)[rounding]
    )
    if not is_known:
        return None
    values = [probe.put("FPCW", 0x07F | n << 8)[precision] for n in range(4)]
    return rounding, precision, (values[0], values[1], values[2], values[3])


@lru_cache(maxsize=1)
def x87_layout() -> X87Layout | None:
    """The layout of the installed Unicorn's x87 unit, None if it is not as expected."""
    for _attempt in range(2):  # a random value may by chance stand in two places
        try:
            return _discover()
        except EngineError:
            continue
    return None


# -- the registers in place -----------------------------------------------------------------------

_TOP: Final = 0x3800
_USED: Final = {
    bytes(not used >> n & 1 for n in range(8)): [n for n in range(8) if used >> n & 1]
    for used in range(256)
}
"""The numbers of the registers in use, by the eight bytes of tags."""
_EMPTY: Final = {
    sum(1 << 2 * n for n in range(8) if n not in used): tags for tags, used in _USED.items()
}
"""The eight bytes, by the tag word with 1 for each empty register and 0 for the others."""


def x87_view(state: memoryview) -> X87View | None:
    """The unit in a CPU state, if it is found there."""
    found = x87_layout()
    if found is None:
        return None
    octets = state.cast("B")
    quads, words, halves = octets.cast("Q"), octets.cast("I"), octets.cast("H")
    low, high = found.registers // 8, found.registers // 2 + 4
    step = REGISTER_BYTES // 8, REGISTER_BYTES // 2

    def one(items: memoryview, offset: int) -> memoryview:
        at = offset // items.itemsize
        return items[at : at + 1]

    return X87View(
        one(words, found.top),
        one(halves, found.status),
        one(halves, found.control),
        one(quads, found.instruction),
        octets[found.tags : found.tags + 8],
        quads[low : low + 8 * step[0] : step[0]],
        halves[high : high + 8 * step[1] : step[1]],
    )


def x87_registers(
    view: X87View,
) -> tuple[dict[str, Callable[[], int]], dict[str, Callable[[int], None]]]:
    """What reads and what writes registers, by name, as Unicorn's API does.

    None are written that Unicorn has a second time: the control word.
    """
    top, status, empty = view.top, view.status, view.empty
    significands, exponents = view.significands, view.exponents

    def read_status() -> int:
        return (status[0] & ~_TOP) | top[0] << 11

    def write_status(value: int) -> None:
        status[0] = value & ~_TOP
        top[0] = value >> 11 & 7

    def read_tags() -> int:
        word = 0xFFFF
        for n in _USED[bytes(empty)]:
            exponent, significand = exponents[n] & 0x7FFF, significands[n]
            if significand >> 63 and 0 < exponent < 0x7FFF:
                kind = 0
            else:
                kind = 2 if significand or exponent else 1
            word ^= (3 - kind) << 2 * n
        return word

    def write_tags(value: int) -> None:
        empty[:] = _EMPTY[value & value >> 1 & 0x5555]

    def reader(i: int) -> Callable[[], int]:
        def read() -> int:
            n = top[0] + i & 7
            return int(significands[n] | exponents[n] << 64)

        return read

    def writer(i: int) -> Callable[[int], None]:
        def write(value: int) -> None:
            n = top[0] + i & 7
            significands[n] = value & (1 << 64) - 1
            exponents[n] = value >> 64

        return write

    readers: dict[str, Callable[[], int]] = {
        "fpsw": read_status, "fptag": read_tags, "fip": partial(view.instruction.__getitem__, 0),
        "fpcw": partial(view.control.__getitem__, 0),
        **{f"st{i}": reader(i) for i in range(8)},
    }  # fmt: skip
    writers: dict[str, Callable[[int], None]] = {
        "fpsw": write_status, "fptag": write_tags,
        "fip": partial(view.instruction.__setitem__, 0),
        **{f"st{i}": writer(i) for i in range(8)},
    }  # fmt: skip
    return readers, writers
