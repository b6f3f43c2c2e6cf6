"""Integer expressions of the assembly language: numbers, characters, symbols and C's operators."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping

NAME = r"[A-Za-z_.$?@][\w.$?@]*"
HERE = "."
"""The name of the address of the statement itself; ``$`` is the same."""


class SyntaxFault(Exception):
    """What is wrong with a line; the assembler adds file, line and text."""


_LONGEST = 400
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]+|0[bB][01]+|0[oO][0-7]+|[0-9][0-9a-fA-F]*[hH]|[0-9]+")
_TOKEN = re.compile(
    rf"\s*(?:({_NUMBER.pattern})(?![\w.])|('[^'\\]')|({NAME})|(<<|>>|[-+*/%&|^~()]))"
)
_DOLLAR = re.compile(r"(?<![\w.$?@])\$(?![\w.$?@])")
_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.LShift: lambda a, b: a << min(b, 128),
    ast.RShift: lambda a, b: a >> min(b, 128),
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_UNARY: dict[type[ast.unaryop], Callable[[int], int]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Invert: operator.invert,
}


class Expression:
    """An integer expression over numbers, ``'c'``, symbols and ``.``, read as Python reads it."""

    def __init__(self, text: str) -> None:
        self.text = text.strip()
        self.symbols: list[str] = []
        python: list[str] = []
        at = 0
        if len(self.text) > _LONGEST:
            raise SyntaxFault(f"an expression longer than {_LONGEST} characters")
        while at < len(self.text):
            match = _TOKEN.match(self.text, at)
            if match is None:
                raise SyntaxFault(f"cannot read {self.text[at:].strip()!r}")
            number, character, name, sign = match.groups()
            if number:
                python.append(str(parse_number(number)))
            elif character:
                python.append(str(ord(character[1])))
            elif name:
                python.append(f"_{len(self.symbols)}")
                self.symbols.append(HERE if name == "$" else name)
            else:
                python.append({"/": "//"}.get(sign, sign))
            at = match.end()
        try:
            self._tree = ast.parse(" ".join(python), mode="eval").body
        except (SyntaxError, RecursionError, MemoryError):
            raise SyntaxFault(f"{self.text!r} is no expression") from None

    def value(self, symbols: Mapping[str, int]) -> int:
        """The value under ``symbols``; KeyError names a symbol that is not among them."""
        value = self._value(self._tree, symbols)
        if abs(value) >> 128:
            raise SyntaxFault(f"{self.text!r} is out of all range")
        return value

    def _value(self, node: ast.expr, symbols: Mapping[str, int]) -> int:
        match node:
            case ast.Constant(value=int(value)):
                return value
            case ast.Name(id=name):
                return symbols[self.symbols[int(name[1:])]]
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                return _UNARY[type(op)](self._value(operand, symbols))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                a, b = self._value(left, symbols), self._value(right, symbols)
                try:
                    return _BINARY[type(op)](a, b)
                except (ZeroDivisionError, ValueError):
                    raise SyntaxFault(f"{self.text!r} has no value") from None
        raise SyntaxFault(f"{self.text!r} is no expression")

    def folded(self, constants: Mapping[str, int]) -> str:
        """Text for keystone: a number or ``label+number`` if it can be put so, else as written."""
        unknown = [name for name in self.symbols if name not in constants]
        if not unknown:
            return str(self.value(constants))
        if len(unknown) == 1:
            at_zero, at_one, far = (
                self.value({**constants, unknown[0]: probe}) for probe in (0, 1, 1 << 20)
            )
            if at_one - at_zero == 1 and far - at_zero == 1 << 20:
                return f"{unknown[0]}{at_zero:+d}" if at_zero else unknown[0]
        return _DOLLAR.sub(HERE, self.text)


def parse_number(text: str) -> int:
    """``10``, ``0x1f``, ``0b11``, ``0o17``, ``1fh``; a leading zero alone (``010``) is refused."""
    if text[-1] in "hH":
        return int(text[:-1], 16)
    if len(text) > 1 and text[0] == "0" and text[1].isdigit():
        raise SyntaxFault(f"{text}: a leading zero is ambiguous; write 0o{text[1:]} or no zero")
    return int(text, 0)
