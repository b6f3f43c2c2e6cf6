"""Plain code: recognised by a regular expression, not decoded.

Most blocks hold nothing but integer instructions that a policy allows whatever their operands. To
decode such a block costs a third of what Unicorn takes to translate it, to match it a tenth. The
expression is made from the opcode map (SDM Vol. 2, appendix A): of each opcode below it takes the
encodings whose form, by our decoder, is allowed. What it does not match may still be allowed; that
is for the decoder to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from mmap import mmap
from typing import Final

from iced_x86 import Decoder

from sandbox.memory import PAGE_SIZE
from sandbox.policy import ALLOW

BLOCKS_BEFORE = 1000
"""So many blocks are decoded first: to make the expression takes as long as two thousand."""

_TOGETHER = 3
_FILLER = b"\x50"  # push rax
_LONGEST, _MOST = 64, 1024


def _expected(count: int) -> tuple[bytes, list[bytes]]:
    if not 0 < count < _LONGEST:
        return b"", []
    return _FILLER * (-count % _TOGETHER), [b""] * (1 - -count // _TOGETHER)


EXPECTED: Final = tuple(map(_expected, range(_MOST)))
"""By the number of instructions in a block (Unicorn makes none with more than 512): what fills it
up to a multiple of three, and what :attr:`PlainCode.split` leaves of both if it is plain. Blocks
that are too long to be recognised leave something."""

_REX = b"[\x40-\x4f]"
_REGISTER, _MEMORY = 0xC0, 0
"""ModRM with and without a register as its operand."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """Opcodes of 64-bit code that are encoded alike; REX may stand before them."""

    opcodes: str
    """Their last bytes, hexadecimal, with ranges."""
    modrm: bool = False
    immediate: int = 0
    """Its bytes."""
    prefix: bytes = b""
    """A prefix, before REX."""
    escape: bytes = b""
    wide: bool = True
    """Whether they are encoded so with REX.W, too."""
    fields: range = range(1)
    """The values of ModRM.reg to look at one by one, as they are part of the opcode. Else it names
    a register, and 0 stands for all."""

    def bytes(self) -> Iterator[int]:
        for item in self.opcodes.split():
            first, _, last = item.partition("-")
            yield from range(int(first, 16), int(last or first, 16) + 1)


_ALL = range(8)
_SHAPES = (
    _Shape("00-03 08-0b 10-13 18-1b 20-23 28-2b 30-33 38-3b 63 84-8b 8d", modrm=True),
    _Shape("70-7f eb 04 0c 14 1c 24 2c 34 3c 6a a8 b0-b7", immediate=1),
    _Shape("50-5f 91-99 c3 c9"),
    _Shape("80 83 c0 c1 c6", modrm=True, immediate=1, fields=_ALL),
    _Shape("05 0d 15 1d 25 2d 35 3d 68 a9 e8 e9", immediate=4),
    _Shape("b8-bf", immediate=4, wide=False),
    _Shape("80-8f", immediate=4, escape=b"\x0f"),
    _Shape("81 c7", modrm=True, immediate=4, fields=_ALL),
    _Shape("40-4f 90-9f a3 ab af b3 b6 b7 bb be bf", modrm=True, escape=b"\x0f"),
    _Shape("d1 d3 fe ff", modrm=True, fields=_ALL),
    _Shape("f6", modrm=True, immediate=1, fields=range(2)),
    _Shape("03 2b 33 3b 89 8b", modrm=True, prefix=b"\x64"),
)
"""The common ones, and of these the most common first: so they are tried."""


class PlainCode:
    """What it takes to recognise plain blocks. The engine's callback uses it directly: calls would
    cost as much again.

    The code of a block at ``start``, if it lies in the page at hand, is at ``start + shift`` in
    ``host``, all of it between ``first`` and ``end``. With its filler it is split at every three
    instructions; if nothing is left between and behind them, and they are as many as Unicorn found,
    then both agree about the block, and all of it is allowed.
    """

    __slots__ = ("_marks", "_pages", "_to_see", "control", "end", "first", "host", "shift", "split")

    def __init__(self) -> None:
        self._marks = b""
        self._to_see = 0
        self._pages: dict[int, tuple[mmap, int]] = {}
        self.split: Callable[[bytes], list[bytes]] = _whole
        self.first = self.end = self.shift = 0
        """The page at hand: where it lies in ``host``, and what to add to a linear address."""
        self.host: mmap | bytes = b""
        self.control: bytes | None = None
        """The control state for which the pages hold; None while a block needs another look."""

    def set_marks(self, marks: bytes) -> None:
        """What is plain: instructions whose form (iced-x86 ``Code``) ``marks`` allows."""
        self._marks, self._to_see, self.split = marks, BLOCKS_BEFORE, _whole
        self.forget()

    def forget(self) -> None:
        """Forget the pages: they may be elsewhere, or other things be allowed there."""
        self._pages.clear()
        self.first = self.end = 0

    def saw(self, start: int, host: mmap, page: int) -> None:
        """A block at ``start`` was decoded and found harmless; its page lies at ``host[page]``."""
        if self._to_see:
            self._to_see -= 1
            if not self._to_see:
                self.split = splitter(self._marks)
        if self.split is not _whole:
            self._pages[start // PAGE_SIZE] = host, page

    def move(self, start: int, size: int) -> int:
        """Take the page of ``start`` at hand. Where the block lies in ``host``; -1 if that is not
        known, or it is not in one page."""
        found = self._pages.get(start // PAGE_SIZE)
        if found is None:
            return -1
        self.host, self.first = found
        self.end = self.first + PAGE_SIZE
        at = self.first + start % PAGE_SIZE
        self.shift = at - start
        return at if at + size <= self.end else -1


def _whole(code: bytes) -> list[bytes]:
    return [code]


@lru_cache(maxsize=16)
def splitter(marks: bytes) -> Callable[[bytes], list[bytes]]:
    """Splits 64-bit code wherever three plain instructions in a row stand, left to right."""
    plain = instruction(marks)
    if not plain:
        return _whole
    return re.compile(b"(?:%s){%d}+" % (plain, _TOGETHER), re.DOTALL).split


def instruction(marks: bytes) -> bytes:
    """The expression for a plain instruction; empty if there is none.

    It matches an instruction as a whole and no beginning of one, so that code has one reading.
    """
    rules = b"|".join(rule for shape in _SHAPES for rule in _rules(shape, marks))
    return rules and _REX + b"?+(?:" + rules + b")"


def _rules(shape: _Shape, marks: bytes) -> Iterator[bytes]:
    """Expressions for the allowed ones, those together that are allowed with the same ModRM."""
    start = b"" if shape.wide else b"(?<![\x48-\x4f])"
    if shape.prefix:
        start = b"(?<!" + _REX + b")" + shape.prefix + _REX + b"?+"
    alike: dict[tuple[int, ...], list[int]] = {}
    for opcode in shape.bytes():
        alike.setdefault(tuple(_allowed(shape, opcode, marks)), []).append(opcode)
    for modrm, opcodes in alike.items():
        if modrm:
            rest = _modrm(modrm) if shape.modrm else b""
            yield start + shape.escape + _set(opcodes) + rest + b"." * shape.immediate


def _allowed(shape: _Shape, opcode: int, marks: bytes) -> Iterator[int]:
    """ModRM, with 0 for R/M, where the forms of an opcode are allowed, with REX.W and without."""
    head = shape.escape + bytes([opcode])
    heads = [shape.prefix + rex + head for rex in ((b"", b"\x48") if shape.wide else (b"",))]
    for mode in (_MEMORY, _REGISTER) if shape.modrm else (_MEMORY,):
        for field in shape.fields:
            tail = bytes([mode | field << 3]) + bytes(8)
            if all(marks[Decoder(64, head + tail).decode().code] == ALLOW for head in heads):
                fields = (field,) if len(shape.fields) > 1 else _ALL
                yield from (mode | reg << 3 for reg in fields)


def _modrm(allowed: Iterable[int]) -> bytes:
    """An expression for ModRM with SIB and displacement (SDM Vol. 2, tables 2-2 and 2-3)."""
    memory = [value for value in allowed if value < _REGISTER]
    registers = [value | rm for value in allowed if value >= _REGISTER for rm in _ALL]

    def of(mode: int, *rms: int) -> list[int]:
        return [value | mode << 6 | rm for value in memory for rm in rms]

    alternatives = (
        (registers + of(0, 0, 1, 2, 3, 6, 7), b""),
        (of(1, 0, 1, 2, 3, 5, 6, 7), b"."),
        (of(2, 0, 1, 2, 3, 5, 6, 7) + of(0, 5), b"...."),
        (of(1, 4), b".."),
        (of(0, 4), _set(sib for sib in range(256) if sib & 7 != 5)),
        (of(0, 4), _set(sib for sib in range(256) if sib & 7 == 5) + b"...."),
        (of(2, 4), b"....."),
    )
    return b"(?:" + b"|".join(_set(first) + rest for first, rest in alternatives if first) + b")"


def _set(values: Iterable[int]) -> bytes:
    """An expression for one byte of several values."""
    members = bytearray(257)
    for value in values:
        members[value] = 1
    found, end = b"[", 0
    while (start := members.find(1, end)) >= 0:
        end = members.find(0, start)
        found += _member(start) + (b"-" + _member(end - 1) if end - start > 1 else b"")
    return found + b"]"


def _member(value: int) -> bytes:
    """A byte in a set: as it is where it may be, since that is what parses fast."""
    special = 0x20 < value < 0x7F and not chr(value).isalnum()
    return b"\\" + bytes([value]) if special else bytes([value])
