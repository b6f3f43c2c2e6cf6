"""The header of an assembly guest: comment lines that say how to start it and what to expect.

; mode: real | protected | long        how the machine starts it (default long)
; base: 0x1000                         where it is loaded
; expect: rax=0x2a rbx=0x0             registers at its final HLT
; output: 0x3f8 "text"                 bytes that it writes to a port
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from sandbox.errors import GuestImageError

BITNESS = {"real": 16, "protected": 32, "long": 64}
"""Modes that a guest can start in, and the bitness of their code."""

_FIELD = re.compile(r";\s*(mode|base|expect|output):\s*(.*?)\s*")
_REGISTER = re.compile(r"(r[a-z0-9]+)=(0x[0-9a-fA-F]+|\d+)")
_OUTPUT = re.compile(r'(0x[0-9a-fA-F]+|\d+)\s+"(.*)"')


@dataclass(frozen=True)
class Header:
    """What the header of an assembly guest declares."""

    mode: str = "long"
    base: int = 0x1000
    expect: dict[str, int] = field(default_factory=dict)
    output: dict[int, bytes] = field(default_factory=dict)

    @property
    def bitness(self) -> int:
        """Bits of the code that the guest begins with."""
        return BITNESS[self.mode]


def read_header(source: str, filename: str = "<asm>") -> Header:
    """The header of ``source``; what it does not declare keeps its default."""
    mode, base = "long", 0x1000
    expect: dict[str, int] = {}
    output: dict[int, bytes] = {}
    for number, line in enumerate(source.splitlines(), 1):
        if not line.startswith(";"):
            break
        match = _FIELD.fullmatch(line)
        if match is None:
            continue
        name, text = match.groups()
        try:
            if name == "mode":
                BITNESS[text]
                mode = text
            elif name == "base":
                base = int(text, 0)
            elif name == "expect":
                expect |= {reg: int(value, 0) for reg, value in map(_register, text.split())}
            else:
                port, string = _matched(_OUTPUT, text)
                output[int(port, 0)] = string.encode().decode("unicode_escape").encode("latin-1")
        except (KeyError, ValueError):
            raise GuestImageError(f"{filename}:{number}: cannot read `{line}`") from None
    return Header(mode, base, expect, output)


def _register(text: str) -> tuple[str, str]:
    return _matched(_REGISTER, text)


def _matched(pattern: re.Pattern[str], text: str) -> tuple[str, str]:
    match = pattern.fullmatch(text)
    if match is None:
        raise ValueError(text)
    return match[1], match[2]
