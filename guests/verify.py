"""Does an instruction's encoding mean what its source line says? iced-x86 decides, not keystone.

Keystone 0.9.2 truncates what does not fit (``mov al, 300``), leaves the displacement of EVEX
instructions unscaled, and more. Each instruction is decoded again here and compared
with its parsed source: prefixes, mnemonic, registers, numbers, sizes, decorators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from iced_x86 import (
    Decoder,
    EncodingKind,
    Formatter,
    FormatterSyntax,
    Instruction,
    MemorySizeExt,
    OpKind,
    Register,
    RegisterExt,
    RoundingControl,
)

from guests.expression import HERE, Expression
from guests.syntax import REGISTERS, Memory, Operand, Statement
from sandbox.decode import FORM_NAMES, IMMEDIATE_BITS, MNEMONIC_NAMES

_FORMATTER = Formatter(FormatterSyntax.INTEL)
_CONDITIONS = {"z": "e", "nz": "ne", "c": "b", "nae": "b", "nb": "ae", "nc": "ae", "na": "be"}
_CONDITIONS |= {"nbe": "a", "pe": "p", "po": "np", "nge": "l", "nl": "ge", "ng": "le", "nle": "g"}
_ALIASES = {"movabs": "mov", "sal": "shl", "fwait": "wait", "xlat": "xlatb", "loopz": "loope"}
_ALIASES |= {"loopnz": "loopne", "retn": "ret", "ud2a": "ud2"}
_FORMS = {"retfq": "RETFQ", "sysretq": "SYSRETQ", "sysexitq": "SYSEXITQ"}
"""Mnemonics that iced-x86 tells apart by form alone."""
_SHIFTS = ("shl", "shr", "sar", "rol", "ror", "rcl", "rcr")
_WORD_READERS = ("lldt", "lmsw", "ltr", "verr", "verw")
"""They read 16 bits of a register whatever the operand size, so iced-x86 may name it wider."""
_COMMUTATIVE = ("xchg", "test")
_NEAR_BRANCHES = (OpKind.NEAR_BRANCH16, OpKind.NEAR_BRANCH32, OpKind.NEAR_BRANCH64)
_ROUNDING = {
    "rn-sae": RoundingControl.ROUND_TO_NEAREST,
    "rd-sae": RoundingControl.ROUND_DOWN,
    "ru-sae": RoundingControl.ROUND_UP,
    "rz-sae": RoundingControl.ROUND_TOWARD_ZERO,
}


def fault(
    statement: Statement,
    raw: bytes,
    address: int,
    bitness: int,
    symbols: Mapping[str, int],
    constants: Mapping[str, int],
) -> str:
    """What is wrong with ``raw`` as the encoding of ``statement`` at ``address``; "" if right.

    ``symbols`` holds every label and constant; ``constants`` those that are no addresses.
    """
    decoder = Decoder(bitness, raw, ip=address)
    insn = decoder.decode()
    if insn.is_invalid or insn.len != len(raw):
        return "which is no instruction"
    check = _Check(insn, bitness, {**symbols, HERE: address}, constants)
    if check.prefixes(statement) and check.mnemonic(statement) and check.operands(statement):
        return ""
    reason = f"which is `{_FORMATTER.format(insn)}`"
    if insn.encoding == EncodingKind.EVEX and insn.memory_displ_size == 1:
        reason += " (it does not scale the 8-bit displacements of EVEX instructions)"
    return reason


class _Check:
    def __init__(
        self,
        insn: Instruction,
        bitness: int,
        symbols: Mapping[str, int],
        constants: Mapping[str, int],
    ) -> None:
        self.insn = insn
        self.bitness = bitness
        self.symbols = symbols
        self.constants = constants
        self.name = _canonical(MNEMONIC_NAMES[insn.mnemonic])
        self.printed = _FORMATTER.format_mnemonic(insn).split()[-1]

    def prefixes(self, statement: Statement) -> bool:
        wanted = set(statement.prefixes)
        insn = self.insn
        return (
            insn.has_lock_prefix == ("lock" in wanted)
            and insn.has_rep_prefix == bool(wanted & {"rep", "repe", "repz"})
            and insn.has_repne_prefix == bool(wanted & {"repne", "repnz"})
        )

    def mnemonic(self, statement: Statement) -> bool:
        wanted = statement.mnemonic
        if wanted in _FORMS:
            return FORM_NAMES[self.insn.code] == _FORMS[wanted]
        return _canonical(wanted) in (self.name, self.printed)

    def operands(self, statement: Statement) -> bool:
        insn = self.insn
        wanted = [op for op in statement.operands if op.value != ""]
        if not self._decorators(statement.operands):
            return False
        count = insn.op_count
        for places in combinations(range(count), len(wanted)):
            if all(map(self._operand, wanted, places)) and all(
                self._implied(place, statement) for place in range(count) if place not in places
            ):
                return True
        if self.name in _COMMUTATIVE and len(wanted) == 2:
            return all(map(self._operand, wanted, (1, 0)))
        return False

    def _implied(self, place: int, statement: Statement) -> bool:
        """Whether the source may leave this operand out."""
        insn = self.insn
        kind = insn.op_kind(place)
        if kind == OpKind.REGISTER:
            register = insn.op_register(place)
            doubled = self.name == "imul" and place == 1 and register == insn.op0_register
            return doubled or not statement.operands or register in (Register.ST0, Register.XMM0)
        if kind in IMMEDIATE_BITS:
            pseudo = statement.mnemonic == self.printed != self.name
            return pseudo or (self.name in _SHIFTS and insn.immediate(place) == 1)
        return not statement.operands  # string instructions

    def _operand(self, wanted: Operand, place: int) -> bool:
        kind = self.insn.op_kind(place)
        match wanted.value:
            case str(register):
                return kind == OpKind.REGISTER and self._register(register, place)
            case Memory() as memory:
                return kind == OpKind.MEMORY and self._memory(memory)
            case Expression() as expression:
                return self._number(kind, place, expression.value(self.symbols))

    def _register(self, wanted: str, place: int) -> bool:
        number: Any = REGISTERS[wanted]
        actual: Any = self.insn.op_register(place)
        if self.name in _WORD_READERS and RegisterExt.size(number) == 2:
            return bool(RegisterExt.full_register(actual) == RegisterExt.full_register(number))
        return bool(actual == number)

    def _number(self, kind: int, place: int, value: int) -> bool:
        if kind in _NEAR_BRANCHES:
            return self.insn.near_branch_target == value % (1 << self.bitness)
        bits = IMMEDIATE_BITS.get(kind)
        if bits is None or not -(1 << bits - 1) <= value < 1 << bits:
            return False
        return bool((self.insn.immediate(place) - value) % (1 << bits) == 0)

    def _memory(self, wanted: Memory) -> bool:
        insn = self.insn
        size = MemorySizeExt.size(insn.memory_size)
        return (
            _same_registers(wanted, insn)
            and insn.segment_prefix == (REGISTERS[wanted.segment] if wanted.segment else 0)
            and (wanted.size in (None, size) or not size)
            and self._displacement(wanted)
        )

    def _displacement(self, wanted: Memory) -> bool:
        insn = self.insn
        value = wanted.displacement.value(self.symbols) if wanted.displacement else 0
        names = wanted.displacement.symbols if wanted.displacement else []
        if wanted.base == "rip" and all(name in self.constants for name in names):
            value += insn.next_ip  # a plain number counts from the end of the instruction
        registers: tuple[Any, Any] = (insn.memory_base, insn.memory_index)
        sizes = [RegisterExt.size(r) for r in registers if r and not _is_vector(r)]
        bits = 8 * max(sizes, default=0) or {2: 16, 4: 32, 8: 64}.get(
            insn.memory_displ_size, self.bitness
        )
        in_range = -(1 << bits - 1) <= value < 1 << bits
        return in_range and (insn.memory_displacement - value) % (1 << bits) == 0

    def _decorators(self, operands: Sequence[Operand]) -> bool:
        insn = self.insn
        wanted = {d for operand in operands for d in operand.decorators}
        actual: set[str] = set()
        if insn.op_mask:
            actual.add(f"k{insn.op_mask - Register.K0}")
        if insn.zeroing_masking:
            actual.add("z")
        if insn.is_broadcast:
            vector = max(RegisterExt.size(r) for r in _vectors(insn))
            actual.add(f"1to{vector // MemorySizeExt.size(insn.memory_size)}")
        actual |= {name for name, mode in _ROUNDING.items() if mode == insn.rounding_control}
        if insn.suppress_all_exceptions and not insn.rounding_control:
            actual.add("sae")
        return wanted == actual


def _canonical(mnemonic: str) -> str:
    mnemonic = _ALIASES.get(mnemonic, mnemonic)
    for stem in ("cmov", "set", "j"):
        if mnemonic.startswith(stem) and mnemonic[len(stem) :] in _CONDITIONS:
            return stem + _CONDITIONS[mnemonic[len(stem) :]]
    return mnemonic


def _is_vector(register: Any) -> bool:
    return bool(RegisterExt.is_vector_register(register))


def _vectors(insn: Instruction) -> list[Any]:
    kinds = (place for place in range(insn.op_count) if insn.op_kind(place) == OpKind.REGISTER)
    return [r for r in map(insn.op_register, kinds) if _is_vector(r)] or [Register.XMM0]


def _same_registers(wanted: Memory, insn: Instruction) -> bool:
    base = REGISTERS[wanted.base] if wanted.base else 0
    index = REGISTERS[wanted.index] if wanted.index else 0
    actual = (insn.memory_base, insn.memory_index)
    if not base and not index and actual[0] == Register.RIP:  # the shorter way to an address
        return True
    if wanted.scale == 1:  # base and index may change places
        return sorted((base, index)) == sorted(actual) and insn.memory_index_scale == 1
    return (base, index) == actual and insn.memory_index_scale == wanted.scale
