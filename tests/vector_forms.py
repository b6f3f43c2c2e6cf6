"""Which vector instruction forms there are, and which of them a set of handlers takes."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType

from iced_x86 import EncodingKind

from sandbox.cpu import Cpu
from sandbox.decode import FORM_NAMES, Insn, decode
from sandbox.encodings import all_forms, encodings, features_of, info_of, kinds_of, mnemonic_of
from sandbox.handler import Handler, Pack
from tests.doubles import make_cpu

_ENCODINGS = frozenset((EncodingKind.VEX, EncodingKind.LEGACY))
_NOT_VECTOR = ("MM_", "ES_", "SEG_")
"""Operand kinds of MMX forms and of the string instructions MOVSD and CMPSD."""


def is_vector_form(code: int) -> bool:
    """Whether the form is VEX or legacy SSE, and no MMX or string form of the same mnemonic."""
    return info_of(code).encoding in _ENCODINGS and not any(
        kind.startswith(_NOT_VECTOR) and kind != "SEG_RDI" for kind in kinds_of(code)
    )


def handlers_of(*sources: ModuleType | Handler | Pack) -> tuple[Handler, ...]:
    """All handlers in modules and packs, as a pack collects them."""
    return Pack.of("tested", *sources).handlers


def forms_of_handlers(handlers: Iterable[Handler]) -> list[int]:
    """The vector forms of all mnemonics that the handlers name."""
    names = {name for handler in handlers for name in handler.mnemonics}
    return [c for c in all_forms() if mnemonic_of(c) in names and is_vector_form(c)]


def vex_forms(*features: str) -> list[int]:
    """The VEX forms whose first CPUID feature is one of these, in iced's order."""
    wanted = set(features)
    return [
        code
        for code in all_forms()
        if info_of(code).encoding == EncodingKind.VEX and features_of(code) & wanted
    ]


def takes(handlers: Iterable[Handler], cpu: Cpu, insn: Insn) -> bool:
    """Whether one of the handlers binds the instruction."""
    return any(
        insn.mnemonic in handler.mnemonics and handler.bind(cpu, insn) is not None
        for handler in handlers
    )


def unhandled(handlers: Iterable[Handler], codes: Iterable[int]) -> list[str]:
    """Names of the forms of which some encoding is taken by none of the handlers."""
    asked, cpu = tuple(handlers), make_cpu()
    return [
        FORM_NAMES[code]
        for code in codes
        if not all(takes(asked, cpu, insn) for insn in encodings(code, (0, 1)))
    ]


DATA = 0x10100
"""A writable, 64-byte aligned address of :func:`small_cpu`; RAX points there."""


def small_cpu(bitness: int = 64, **vectors: bytes) -> Cpu:
    """A vCPU with AVX enabled; ``v1=bytes`` sets the low bytes of a vector register, the bytes
    above are all ones."""
    cpu = make_cpu(bitness)
    cpu.registers.xcr0 = 7
    cpu.gpr[0] = DATA
    for number in range(16):
        cpu.vec.write(number, b"\xff" * 64)
    for name, data in vectors.items():
        cpu.vec.write(int(name[1:]), data)
    return cpu


def execute(handlers: Iterable[Handler], cpu: Cpu, code: str) -> None:
    """Run one instruction, given as hex, by the first handler that takes it."""
    insn = decode(bytes.fromhex(code), cpu.bitness)
    for handler in handlers:
        action = handler.bind(cpu, insn) if insn.mnemonic in handler.mnemonics else None
        if action is not None:
            action()
            return
    raise LookupError(f"no handler takes {insn!r}")
