"""The assembly language of guests: Intel syntax, one statement a line, parsed before keystone.

Keystone guesses where it does not understand (an unclosed bracket, ``(N+1)*4`` in an address) and
crashes on some input, so this parser decides what a line means; :mod:`guests.verify` then
compares that meaning with the bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from iced_x86 import Register

from guests.expression import NAME, Expression, SyntaxFault

REGISTERS: dict[str, int] = {
    name.lower(): value
    for name, value in vars(Register).items()
    if not name.startswith(("_", "DONTUSE", "NONE"))
}
"""Every register name and its iced-x86 number."""
SIZES = {"byte": 1, "word": 2, "dword": 4, "fword": 6, "qword": 8, "tbyte": 10, "xword": 10}
SIZES |= {"oword": 16, "xmmword": 16, "ymmword": 32, "zmmword": 64}
PREFIXES = ("lock", "rep", "repe", "repz", "repne", "repnz")


@dataclass(frozen=True)
class Memory:
    """``size ptr segment:[base + index*scale + displacement]``; ``size`` in bytes or None."""

    size: int | None
    segment: str | None
    base: str | None
    index: str | None
    scale: int
    displacement: Expression | None


@dataclass(frozen=True)
class Operand:
    """A register name, a memory reference or an expression, with its ``{...}`` decorators."""

    value: str | Memory | Expression
    decorators: tuple[str, ...] = ()

    def keystone(self, constants: Mapping[str, int]) -> str:
        """The operand in the plain form that keystone reads best."""
        decorators = "".join(f"{{{d}}}" for d in self.decorators)
        match self.value:
            case str(register):
                return re.sub(r"^st([0-7])$", r"st(\1)", register) + decorators
            case Expression() as expression:
                return expression.folded(constants) + decorators
            case Memory() as memory:
                return _memory_text(memory, constants) + decorators


def _memory_text(memory: Memory, constants: Mapping[str, int]) -> str:
    terms = [memory.base] if memory.base else []
    if memory.index:
        terms.append(f"{memory.index}*{memory.scale}" if memory.scale != 1 else memory.index)
    text = "+".join(terms)
    if memory.displacement:
        displacement = memory.displacement.folded(constants)
        text += displacement if displacement[0] == "-" or not text else f"+{displacement}"
    size = next((f"{name} ptr " for name, size in SIZES.items() if size == memory.size), "")
    return f"{size}{memory.segment + ':' if memory.segment else ''}[{text}]"


@dataclass(frozen=True)
class Statement:
    """One line: labels, then nothing, an assignment, a directive, or an instruction."""

    line: int
    text: str
    labels: tuple[str, ...] = ()
    assigns: tuple[str, Expression] | None = None
    directive: str = ""
    arguments: str = ""
    prefixes: tuple[str, ...] = ()
    mnemonic: str = ""
    operands: tuple[Operand, ...] = ()


_LABEL = re.compile(rf"\s*({NAME}|\d+)\s*:")
_ASSIGNMENT = re.compile(rf"({NAME})\s*(?:=|\s(?:equ|EQU)\s)\s*(.+)")
_WORD = re.compile(r"(\.?[A-Za-z][\w.]*)(?:\s+|$)")
_DIRECTIVE_NAMES = {"db": ".byte", "dw": ".word", "dd": ".long", "dq": ".quad", "align": ".balign"}


def parse_line(number: int, raw: str) -> Statement:
    """Parse one source line; raises :class:`SyntaxFault`."""
    text = strip_comment(raw)
    labels: list[str] = []
    while match := _LABEL.match(text):
        labels.append(_new_name(match[1]))
        text = text[match.end() :]
    text = text.strip()
    start = Statement(number, raw.strip(), tuple(labels))
    if not text:
        return start
    if match := _ASSIGNMENT.fullmatch(text):
        return replace(start, assigns=(_new_name(match[1]), Expression(match[2])))
    match = _WORD.match(text)
    if match is None:
        raise SyntaxFault("no instruction or directive begins like this")
    word, rest = match[1].lower(), text[match.end() :]
    word = _DIRECTIVE_NAMES.get(word, word)
    if word in (".set", ".equ"):
        name, comma, value = rest.partition(",")
        if not comma:
            raise SyntaxFault(f"{word} wants a name, a comma and a value")
        return replace(start, assigns=(_new_name(name.strip()), Expression(value)))
    if word[0] == ".":
        return replace(start, directive=word, arguments=rest)
    return _parse_instruction(start, word, rest)


def _parse_instruction(start: Statement, word: str, rest: str) -> Statement:
    prefixes: list[str] = []
    while word in PREFIXES:
        prefixes.append(word)
        match = _WORD.match(rest)
        if match is None:
            raise SyntaxFault(f"prefix {word} stands alone; write it before its instruction")
        word, rest = match[1].lower(), rest[match.end() :]
    operands = tuple(parse_operand(part) for part in split(rest)) if rest else ()
    return replace(start, prefixes=tuple(prefixes), mnemonic=word, operands=operands)


def _new_name(name: str) -> str:
    if name.isdigit():
        raise SyntaxFault(f"label {name}: numeric labels do not exist here; use a name")
    if name.lower() in REGISTERS or name in (".", "$") or not re.fullmatch(NAME, name):
        raise SyntaxFault(f"{name!r} cannot be the name of a label or constant")
    return name


def strip_comment(raw: str) -> str:
    """The line without its comment: from ``;``, ``#`` or ``//`` on, outside of quotes."""
    quote, at = "", 0
    while at < len(raw):
        char = raw[at]
        if quote:
            if char == "\\" and quote == '"':
                at += 1
            elif char == quote:
                quote = ""
        elif char in "\"'":
            quote = char
        elif char in ";#" or raw.startswith("//", at):
            return raw[:at]
        at += 1
    if quote:
        raise SyntaxFault(f"a quote {quote} is not closed")
    return raw


def split(text: str) -> Iterator[str]:
    """The parts of ``text`` between the commas that stand in no quotes and no brackets."""
    depth, quote, start = 0, "", 0
    for at, char in enumerate(text):
        if quote:
            quote = "" if char == quote and text[at - 1] != "\\" else quote
        elif char in "\"'":
            quote = char
        elif char in "[({":
            depth += 1
        elif char in "])}":
            depth -= 1
        elif char == "," and not depth:
            yield text[start:at].strip()
            start = at + 1
    yield text[start:].strip()


_DECORATOR = re.compile(r"\s*\{\s*([\w-]+)\s*\}\s*$")
_SIZE = re.compile(rf"({'|'.join(SIZES)})\b\s*(?:ptr\b\s*)?", re.IGNORECASE)
_SEGMENT = re.compile(r"([ecsdfg]s)\s*:\s*", re.IGNORECASE)
_STACK = re.compile(r"st(?:\(([0-7])\))?", re.IGNORECASE)


def parse_operand(text: str) -> Operand:
    """One operand: ``rax``, ``dword ptr fs:[rbx+rcx*4+N]``, ``label+8``, ``zmm1{k1}{z}``."""
    decorators: list[str] = []
    whole = text
    while match := _DECORATOR.search(text):
        decorators.insert(0, match[1].lower())
        text = text[: match.start()]
    text = text.strip()
    value: str | Memory | Expression
    if match := _STACK.fullmatch(text):
        value = f"st{match[1] or 0}"
    elif text.lower() in REGISTERS:
        value = text.lower()
    elif "[" in text:
        value = _parse_memory(text)
    elif text:
        if _SIZE.match(text):
            raise SyntaxFault(f"{whole!r}: a memory operand needs brackets: [...]")
        value = Expression(text)
        _refuse_registers(value)
    elif decorators:
        value = ""
    else:
        raise SyntaxFault("an operand is missing")
    return Operand(value, tuple(decorators))


def _parse_memory(text: str) -> Memory:
    size = segment = None
    rest = text
    if match := _SIZE.match(rest):
        size, rest = SIZES[match[1].lower()], rest[match.end() :]
    if match := _SEGMENT.match(rest):
        segment, rest = match[1].lower(), rest[match.end() :]
    if not (rest.startswith("[") and rest.endswith("]")) or "[" in rest[1:] or "]" in rest[:-1]:
        raise SyntaxFault(
            f"{text!r} is no memory operand; write size ptr segment:[base+index*scale+n]"
        )
    rest = rest[1:-1].strip()
    if match := _SEGMENT.match(rest):
        segment, rest = match[1].lower(), rest[match.end() :]
    registers: list[tuple[str, int]] = []
    constant = ""
    for sign, term in _terms(rest):
        found = _register_term(term)
        if found is None:
            constant += f"{sign}{term}"
        elif sign == "-":
            raise SyntaxFault(f"{text!r} subtracts a register")
        else:
            registers.append(found)
    base, index, scale = _roles(text, registers)
    displacement = Expression(constant.removeprefix("+")) if constant else None
    if displacement:
        _refuse_registers(displacement)
    return Memory(size, segment, base, index, scale, displacement)


def _terms(text: str) -> Iterator[tuple[str, str]]:
    """The signed terms of an address, split at + and - outside of parentheses."""
    for match in re.finditer(
        r"([+-]?)\s*((?:\([^()]*(?:\([^()]*\)[^()]*)*\)|'.'|[^-+()])+)|(.)", text
    ):
        sign, term, stray = match.groups()
        if stray and not stray.isspace():
            raise SyntaxFault(f"cannot read {text!r} at {stray!r}")
        if term and term.strip():
            yield sign or "+", term.strip()


def _register_term(term: str) -> tuple[str, int] | None:
    """Register and scale of ``rax``, ``rax*4`` or ``4*rax``; None if there is no register."""
    left, star, right = (part.strip().lower() for part in term.partition("*"))
    if right in REGISTERS:
        left, right = right, left
    if left not in REGISTERS:
        return None
    if star and right not in ("1", "2", "4", "8"):
        raise SyntaxFault(f"{term!r}: a scale is 1, 2, 4 or 8")
    return left, int(right) if star else 0


def _roles(text: str, registers: list[tuple[str, int]]) -> tuple[str | None, str | None, int]:
    """Base, index and scale: a register written with a scale is the index."""
    scaled = [r for r in registers if r[1]]
    plain = [r for r in registers if not r[1]]
    if len(registers) > 2 or len(scaled) > 1:
        raise SyntaxFault(f"{text!r} has too many registers")
    if not scaled and len(plain) == 2:
        scaled = [(plain.pop()[0], 1)]
    index, scale = scaled[0] if scaled else (None, 1)
    return plain[0][0] if plain else None, index, scale


def _refuse_registers(expression: Expression) -> None:
    for name in expression.symbols:
        if name.lower() in REGISTERS:
            raise SyntaxFault(f"{expression.text!r} has a register where a number must stand")
