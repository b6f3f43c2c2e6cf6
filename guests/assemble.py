"""Assembly to bytes: Intel syntax through keystone, with every encoding checked by iced-x86.

The language: one statement a line, ``label:`` before it, comments from ``;``, ``#`` or ``//``.
Constants: ``N = 5``, ``N equ 5``, ``.set N, 5``. Numbers: ``16``, ``0x10``, ``10h``, ``0b1``,
``'c'``; ``.`` or ``$`` is the address of the statement. A label is its address:
``mov rax, label`` loads it, ``mov rax, [rip+label]`` reads memory there.
Data: ``.byte``/``db``, ``.word``/``dw`` (2 bytes), ``.long``/``dd``, ``.quad``/``dq``, ``.octa``,
``.float``, ``.double``, ``.ascii``, ``.asciz`` (strings in ``"..."`` with C's escapes),
``.space N[, BYTE]``, ``.fill N, SIZE, VALUE``, ``.align N`` (bytes).
Modes: ``.code16``, ``.code32``, ``.code64``.
Instructions that keystone does not know or gets wrong are refused: write them as ``.byte``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from guests import data, verify
from guests.expression import HERE, SyntaxFault
from guests.load import read_file
from guests.syntax import Statement, parse_line
from sandbox.errors import GuestImageError

_MARK = "__end_of_"
"""Labels of our own: one after each statement, listed in a table after the program."""
_SPELLINGS = {
    (32, "iret"): "iretd",
    (32, "pushf"): "pushfd",
    (32, "popf"): "popfd",
    (64, "pushf"): "pushfq",
    (64, "popf"): "popfq",
}
"""Mnemonics without a size, for which keystone takes 16 bits instead of the mode's own size."""
_ENCODINGS = {(16, "ret"): ".byte 0xc3", (16, "retf"): ".byte 0xcb"}
"""Instructions that keystone cannot be made to encode in their mode's own size."""


_SHORT_BRANCHES = ("loop", "jcxz", "jecxz", "jrcxz")


@dataclass(frozen=True)
class _Unit:
    """A statement, the mode it stands in, and its text for keystone."""

    statement: Statement
    bitness: int
    text: str

    @property
    def skeleton(self) -> str:
        """What the rest of the program needs of it: its symbols and mode, but no bytes."""
        kept = self.statement.assigns or self.statement.directive.startswith(".code")
        labels = "".join(f"{name}:\n" for name in self.statement.labels)
        return self.text if kept else labels


def assemble(
    source: str, address: int = 0x1000, bitness: int = 64, filename: str = "<asm>"
) -> bytes:
    """Assemble ``source`` to run at ``address``, beginning in 16-, 32- or 64-bit mode.

    Raises :class:`GuestImageError`, beginning with ``file:line:``, for a syntax error and for an
    instruction that keystone encodes wrongly.
    """
    if bitness not in (16, 32, 64) or not 0 <= address < 1 << bitness:
        raise GuestImageError(f"{filename}: no address {address:#x} in {bitness}-bit mode")
    statements = list(_parse(source, filename))
    constants = _constants(statements, filename)
    units = list(_units(statements, bitness, constants, filename))
    table = "".join(f".quad {_MARK}{i}\n" for i in range(len(units)))
    marked = "".join(f"{unit.text}{_MARK}{i}:\n" for i, unit in enumerate(units))
    output = _keystone(marked + table, address, bitness)
    if isinstance(output, str):
        raise _blame(units, address, bitness, filename, output)
    image, ends = _take_table(output, len(units), address)
    _verify(units, image, ends, address, constants, filename)
    return image


def assemble_file(path: str | Path, address: int = 0x1000, bitness: int = 64) -> bytes:
    """Assemble a file (UTF-8); raises :class:`GuestImageError` also if it cannot be read."""
    try:
        source = read_file(path).decode()
    except UnicodeDecodeError as error:
        raise GuestImageError(f"{path}: not UTF-8 text at byte {error.start}") from None
    return assemble(source, address, bitness, str(path))


def _error(filename: str, statement: Statement, reason: str) -> GuestImageError:
    return GuestImageError(f"{filename}:{statement.line}: {reason}: `{statement.text}`")


def _parse(source: str, filename: str) -> Iterator[Statement]:
    known: dict[str, int] = {}
    for number, raw in enumerate(source.replace("\r\n", "\n").split("\n"), 1):
        try:
            statement = parse_line(number, raw)
        except SyntaxFault as reason:
            raise _error(filename, Statement(number, raw.strip()), str(reason)) from None
        names = list(statement.labels) + ([statement.assigns[0]] if statement.assigns else [])
        for name in names:
            if name in known or name.startswith(_MARK):
                where = f"in line {known[name]}" if name in known else "by the assembler"
                raise _error(filename, statement, f"{name} is already defined {where}")
            known[name] = number
        if statement.labels or statement.assigns or statement.directive or statement.mnemonic:
            yield statement


def _constants(statements: list[Statement], filename: str) -> dict[str, int]:
    """Symbols that depend on numbers alone, not on addresses."""
    constants: dict[str, int] = {}
    for statement in statements:
        if statement.assigns:
            name, expression = statement.assigns
            try:
                constants[name] = expression.value(constants)
            except KeyError:
                continue  # depends on a label: keystone and _verify see to it
            except SyntaxFault as reason:
                raise _error(filename, statement, str(reason)) from None
    return constants


def _units(
    statements: list[Statement], bitness: int, constants: dict[str, int], filename: str
) -> Iterator[_Unit]:
    for statement in statements:
        if statement.directive in (".code16", ".code32", ".code64"):
            bitness = int(statement.directive[5:])
        spelling = _SPELLINGS.get((bitness, statement.mnemonic), statement.mnemonic)
        statement = replace(statement, mnemonic=spelling)
        try:
            body = _body(statement, bitness, constants)
        except SyntaxFault as reason:
            raise _error(filename, statement, str(reason)) from None
        labels = "".join(f"{name}:\n" for name in statement.labels)
        yield _Unit(statement, bitness, f"{labels}{body}\n" if body else labels)


def _body(statement: Statement, bitness: int, constants: dict[str, int]) -> str:
    """The statement without its labels, as text for keystone."""
    if statement.assigns:
        name, expression = statement.assigns
        return f".set {name}, {expression.folded(constants)}"
    if statement.directive.startswith(".code"):
        return statement.directive
    if statement.directive:
        return data.encode(statement.directive, statement.arguments, constants)
    if (bitness, statement.mnemonic) == (64, "iret"):
        raise SyntaxFault("iret has no size; write iretq (or iretd)")
    if not statement.operands and (bitness, statement.mnemonic) in _ENCODINGS:
        return _ENCODINGS[bitness, statement.mnemonic]
    operands = ", ".join(operand.keystone(constants) for operand in statement.operands)
    return " ".join([*statement.prefixes, statement.mnemonic, operands]).strip()


def _keystone(text: str, address: int, bitness: int) -> bytes | str:
    """The bytes, or keystone's reason why there are none."""
    try:
        import keystone
    except ImportError as error:
        raise GuestImageError(
            f"keystone-engine cannot be imported ({error}); pip install 'keystone-engine>=0.9.2'"
        ) from error
    modes = {16: keystone.KS_MODE_16, 32: keystone.KS_MODE_32, 64: keystone.KS_MODE_64}
    try:
        assembler: Any = keystone.Ks(keystone.KS_ARCH_X86, modes[bitness])
        output, _count = assembler.asm(text.encode(), address, as_bytes=True)
    except keystone.KsError as error:
        return str(error).partition(" (KS_")[0]
    return output or b""


def _blame(
    units: list[_Unit], address: int, bitness: int, filename: str, reason: str
) -> GuestImageError:
    """The error, for the line it comes from: bisects, with the rest reduced to its symbols."""
    low, high = 0, len(units)
    while low < high:
        middle = (low + high) // 2
        texts = [unit.text for unit in units[:middle]] + [u.skeleton for u in units[middle:]]
        result = _keystone("".join(texts), address, bitness)
        if isinstance(result, str):
            high, reason = middle, result
        else:
            low = middle + 1
    unit = units[max(high, 1) - 1]
    if "fixup" in reason.lower():
        unit = _short_branch(units, address, bitness) or unit
        reason = "the target is out of reach"
    return _error(filename, unit.statement, f"keystone refuses this: {reason}")


def _short_branch(units: list[_Unit], address: int, bitness: int) -> _Unit | None:
    """The loop or jcxz whose target lies too far, found with all the others replaced."""
    branches = [i for i, u in enumerate(units) if u.statement.mnemonic.startswith(_SHORT_BRANCHES)]
    texts = [unit.text for unit in units]
    for i in branches:
        texts[i] = f"{units[i].skeleton}.space 2\n"
    for i in branches:
        text = "".join([*texts[:i], units[i].text, *texts[i + 1 :]])
        if isinstance(_keystone(text, address, bitness), str):
            return units[i]
    return None


def _take_table(output: bytes, count: int, address: int) -> tuple[bytes, list[int]]:
    """Split keystone's output into the program and the end address of each statement."""
    size = len(output) - 8 * count
    table = output[size:]
    return output[:size], [
        int.from_bytes(table[at : at + 8], "little") - address for at in range(0, 8 * count, 8)
    ]


def _verify(
    units: list[_Unit],
    image: bytes,
    ends: list[int],
    address: int,
    constants: dict[str, int],
    filename: str,
) -> None:
    starts = [0, *ends][: len(ends)]
    symbols = dict(constants)
    for unit, start in zip(units, starts, strict=True):
        symbols |= dict.fromkeys(unit.statement.labels, address + start)
    for unit, start in zip(units, starts, strict=True):
        if unit.statement.assigns and unit.statement.assigns[0] not in constants:
            name, expression = unit.statement.assigns
            try:
                symbols[name] = expression.value({**symbols, HERE: address + start})
            except (KeyError, SyntaxFault) as fault:
                raise _error(filename, unit.statement, f"no value: {fault}") from None
    for unit, start, end in zip(units, starts, ends, strict=True):
        try:
            wrong = _fault(unit, image[start:end], address + start, symbols, constants)
        except KeyError as name:
            wrong = f"and {name.args[0]!r} is not defined"
        except SyntaxFault as fault:
            wrong = f"and {fault}"
        if wrong:
            shown = image[start:end][:15].hex(" ") or "nothing"
            reason = f"keystone assembles this wrongly, to {shown}, {wrong}"
            raise _error(filename, unit.statement, f"{reason}; write its bytes with .byte")


def _fault(
    unit: _Unit, raw: bytes, address: int, symbols: dict[str, int], constants: dict[str, int]
) -> str:
    """What is wrong with the bytes of one statement; "" if nothing."""
    statement = unit.statement
    if statement.mnemonic:
        return verify.fault(statement, raw, address, unit.bitness, symbols, constants)
    if statement.directive:
        return data.fault(statement, raw, address, symbols)
    return "which is not nothing" if raw else ""
