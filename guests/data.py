"""Data directives of the assembly language: to bytes here, through keystone only for addresses."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping

from guests.expression import HERE, Expression, SyntaxFault
from guests.syntax import Statement, split

MAX_FILL = 16 << 20
"""Most bytes that one directive may make."""
IGNORED = (".intel_syntax", ".global", ".globl", ".text")
"""Directives of other assemblers that say what is so here anyway."""
_INTEGERS = {".byte": 1, ".word": 2, ".short": 2, ".long": 4, ".int": 4, ".quad": 8, ".octa": 16}
_RELOCATED = {1: ".byte", 2: ".word", 4: ".long", 8: ".quad"}
_FLOATS = {".float": "<f", ".single": "<f", ".double": "<d"}
_STRINGS = {".ascii": b"", ".asciz": b"\0", ".string": b"\0"}
_SPACES = (".space", ".skip", ".zero")
_ALIGNMENTS = (".align", ".balign")
_KNOWN = [*_INTEGERS, *_FLOATS, *_STRINGS, *_SPACES, *_ALIGNMENTS, ".fill", ".set", ".code64"]
_ESCAPE = re.compile(r"\\(?:([0-7]{1,3})|x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\\": "\\", '"': '"', "'": "'"}


def encode(directive: str, arguments: str, constants: Mapping[str, int]) -> str:
    """The directive as text for keystone: plain bytes, or expressions where addresses come in."""
    if directive in IGNORED:
        return ""
    if directive in _ALIGNMENTS:
        return f".balign {_alignment(arguments, constants)}"
    if directive not in _INTEGERS:
        return _bytes_text(_contents(directive, arguments, constants))
    lines = []
    for item in split(arguments):
        try:
            lines.append(_bytes_text(_integer(directive, item, constants)))
        except KeyError:
            size = _INTEGERS[directive]
            if size not in _RELOCATED:
                raise SyntaxFault(f"{directive} cannot hold an address") from None
            lines.append(f"{_RELOCATED[size]} {Expression(item).folded(constants)}")
    return "\n".join(lines)


def fault(statement: Statement, raw: bytes, address: int, symbols: Mapping[str, int]) -> str:
    """What is wrong with ``raw`` as the contents of a directive at ``address``; "" if right."""
    directive, arguments = statement.directive, statement.arguments
    if directive in IGNORED or directive.startswith(".code"):
        return "which is not nothing" if raw else ""
    symbols = {**symbols, HERE: address}
    if directive in _ALIGNMENTS:
        step = _alignment(arguments, symbols)
        if len(raw) < step and (address + len(raw)) % step == 0:
            return ""
        return f"which ends at {address + len(raw):#x}"
    try:
        wanted = _contents(directive, arguments, symbols)
    except SyntaxFault as reason:
        return str(reason)
    return "" if raw == wanted else f"not to {wanted[:15].hex(' ')}"


def _bytes_text(data: bytes) -> str:
    return ".byte " + ",".join(map(str, data)) if data else ""


def _contents(directive: str, arguments: str, symbols: Mapping[str, int]) -> bytes:
    if directive in _INTEGERS:
        return b"".join(_integer(directive, item, symbols) for item in split(arguments))
    if directive in _FLOATS:
        return b"".join(_float(directive, item) for item in split(arguments))
    if directive in _STRINGS:
        return b"".join(_string(item) + _STRINGS[directive] for item in split(arguments))
    if directive not in (*_SPACES, ".fill"):
        raise SyntaxFault(f"no directive {directive} here; there are {', '.join(_KNOWN)}")
    values = [_value(item, symbols) for item in split(arguments)]
    if directive in _SPACES and len(values) in (1, 2):
        count, unit = values[0], bytes([(values[1:] or [0])[0] & 0xFF])
    elif directive == ".fill" and len(values) == 3 and 0 < values[1] <= 8:
        count, unit = values[0], (values[2] % (1 << 8 * values[1])).to_bytes(values[1], "little")
    else:
        raise SyntaxFault(".space wants N[, BYTE], .fill wants N, SIZE (1 to 8), VALUE")
    if not 0 <= count * len(unit) <= MAX_FILL:
        raise SyntaxFault(f"{count} times {len(unit)} bytes; the limit is {MAX_FILL >> 20} MiB")
    return unit * count


def _value(item: str, symbols: Mapping[str, int]) -> int:
    try:
        return Expression(item).value(symbols)
    except KeyError as name:
        raise SyntaxFault(f"{name.args[0]!r} is no constant known here") from None


def _alignment(arguments: str, symbols: Mapping[str, int]) -> int:
    step = _value(arguments, symbols)
    if not 0 < step <= MAX_FILL or step & (step - 1):
        raise SyntaxFault(f"alignment {step} is no power of two up to 16 MiB")
    return step


def _integer(directive: str, item: str, symbols: Mapping[str, int]) -> bytes:
    """The bytes of one item; KeyError if it depends on an address that is not known yet."""
    size = _INTEGERS[directive]
    if len(item) > 1 and item[0] == '"':
        if size != 1:
            raise SyntaxFault(f"a string in {directive}; write .ascii or .byte")
        return _string(item)
    if not item:
        raise SyntaxFault(f"{directive} wants values, with commas between them")
    value = Expression(item).value(symbols)
    if not -(1 << 8 * size - 1) <= value < 1 << 8 * size:
        raise SyntaxFault(f"{value:#x} does not fit in {size} bytes")
    return (value % (1 << 8 * size)).to_bytes(size, "little")


def _float(directive: str, item: str) -> bytes:
    try:
        return struct.pack(_FLOATS[directive], float(item))
    except (ValueError, OverflowError):
        raise SyntaxFault(f"{item!r} is no number for {directive}") from None


def _string(item: str) -> bytes:
    if len(item) < 2 or item[0] != '"' or item[-1] != '"':
        raise SyntaxFault(f'{item!r} is no string; write "..."')

    def plain(match: re.Match[str]) -> str:
        octal, hexadecimal, char = match.groups()
        if char:
            if char not in _ESCAPES:
                raise SyntaxFault(f"unknown escape \\{char}")
            return _ESCAPES[char]
        code = int(octal, 8) if octal else int(hexadecimal, 16)
        return chr(0xDC00 + code) if code > 0x7F else chr(code)  # see surrogateescape

    return _ESCAPE.sub(plain, item[1:-1]).encode(errors="surrogateescape")
