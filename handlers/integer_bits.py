"""Bit tests, scans, counts, fields and CRC32 (SDM Vol. 1, 7.3.7; BMI1, BMI2, LZCNT, POPCNT).

Flags that the SDM leaves undefined stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from iced_x86 import OpKind

from handlers.flags import MASK, STATUS, of_result
from handlers.integer import (
    Operand,
    Operation,
    bind_memory,
    bind_moved_address,
    bind_operands,
)
from handlers.integer_shift import signed
from sandbox.handler import Action, Handler
from sandbox.registers import CF, OF, SF, ZF

if TYPE_CHECKING:
    from sandbox.cpu import Cpu
    from sandbox.decode import Insn


def tzcnt(bits: int, a: int) -> tuple[int, int]:
    result = (a & -a).bit_length() - 1 if a else bits
    return result, (0 if a else CF) | (0 if result else ZF)


def lzcnt(bits: int, a: int) -> tuple[int, int]:
    result = bits - a.bit_length()
    return result, (0 if a else CF) | (0 if result else ZF)


def popcnt(_bits: int, a: int) -> tuple[int, int]:
    return a.bit_count(), 0 if a else ZF


def bextr(bits: int, a: int, control: int) -> tuple[int, int]:
    """``control``: first bit in bits 7:0, length in bits 15:8."""
    result = a >> (control & 0xFF) & ((1 << (control >> 8 & 0xFF)) - 1)
    return result, 0 if result else ZF


def bzhi(bits: int, a: int, index: int) -> tuple[int, int]:
    first = index & 0xFF
    result = a & ((1 << first) - 1)
    return result, of_result(bits, result) & (SF | ZF) | (CF if first >= bits else 0)


def blsi(bits: int, a: int) -> tuple[int, int]:
    result = a & -a
    return result, of_result(bits, result) & (SF | ZF) | (CF if a else 0)


def blsr(bits: int, a: int) -> tuple[int, int]:
    result = a & (a - 1)
    return result, of_result(bits, result) & (SF | ZF) | (0 if a else CF)


def blsmsk(bits: int, a: int) -> tuple[int, int]:
    result = (a ^ (a - 1)) & MASK[bits]
    return result, of_result(bits, result) & SF | (0 if a else CF)


@lru_cache(maxsize=4096)
def _fields(mask: int) -> list[tuple[int, int]]:
    """The runs of ones in ``mask``: each moved down next to the one below, and how far it was."""
    fields, packed = [], 0
    while mask:
        start = (mask & -mask).bit_length() - 1
        above = mask + (1 << start)
        length = (above & -above).bit_length() - 1 - start
        fields.append(((1 << length) - 1 << packed, start - packed))
        packed += length
        mask &= above
    return fields


def pdep(_bits: int, a: int, mask: int) -> int:
    result = 0
    for field, distance in _fields(mask):
        result |= (a & field) << distance
    return result


def pext(_bits: int, a: int, mask: int) -> int:
    result = 0
    for field, distance in _fields(mask):
        result |= a >> distance & field
    return result


def _crc32c_table() -> list[int]:
    polynomial = 0x82F63B78  # 0x11EDC6F41 with its bits reversed (SDM Vol. 2, CRC32)
    table = []
    for value in range(256):
        for _bit in range(8):
            value = value >> 1 ^ (polynomial if value & 1 else 0)
        table.append(value)
    return table


_CRC32C = _crc32c_table()


def crc32(bits: int, checksum: int, data: int) -> int:
    """CRC-32C of ``bits`` of data, on from the low half of ``checksum``."""
    checksum &= 0xFFFF_FFFF
    for byte in data.to_bytes(bits // 8, "little"):
        checksum = checksum >> 8 ^ _CRC32C[(checksum ^ byte) & 0xFF]
    return checksum


class BitScan(Handler):
    """BSF and BSR; of zero they leave the destination, all of it, as AMD documents."""

    restartable = True

    def __init__(self, mnemonic: str, scan: Callable[[int], int]) -> None:
        self.name = f"{__name__}.{mnemonic}"
        self.mnemonics = (mnemonic,)
        self.scan = scan

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        bound = bind_operands(cpu, insn, 2)
        if bound is None:
            return None
        write, read, scan, bank = bound[0].write, bound[1].read, self.scan, cpu.registers.bank

        def action() -> None:
            value = read()
            flags = bank.read("rflags")
            if value:
                write(scan(value))
                bank.write("rflags", flags & ~ZF)
            else:
                bank.write("rflags", flags | ZF)

        return action


class BitTest(Handler):
    """BT, BTS, BTR, BTC: ``change(value, bit)`` gives what is written back, if anything."""

    restartable = True

    def __init__(self, mnemonic: str, change: Callable[[int, int], int] | None) -> None:
        self.name = f"{__name__}.{mnemonic}"
        self.mnemonics = (mnemonic,)
        self.change = change

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        bound = bind_operands(cpu, insn, 2)
        if bound is None:
            return None
        target, offset = bound
        in_memory = insn.iced.op_kind(0) == OpKind.MEMORY
        if in_memory and insn.iced.op_kind(1) == OpKind.REGISTER:
            target = _bit_string(cpu, insn, offset)
        if self.change is None:
            return _bind_test(cpu, target, offset)
        return _bind_change(cpu, target, offset, self.change)


def _bind_test(cpu: Cpu, target: Operand, offset: Operand) -> Action:
    bank, last = cpu.registers.bank, target.bits - 1

    def action() -> None:
        carry = target.read() >> (offset.read() & last) & 1
        bank.write("rflags", bank.read("rflags") & ~CF | carry)

    return action


def _bind_change(
    cpu: Cpu, target: Operand, offset: Operand, change: Callable[[int, int], int]
) -> Action:
    bank, last = cpu.registers.bank, target.bits - 1

    def action() -> None:
        value, place = target.modify(), offset.read() & last
        target.write(change(value, 1 << place))
        bank.write("rflags", bank.read("rflags") & ~CF | value >> place & 1)

    return action


def _bit_string(cpu: Cpu, insn: Insn, offset: Operand) -> Operand:
    """The operand-sized piece of memory that holds bit ``offset``, signed, of a bit string."""
    bits, read = offset.bits, offset.read
    size = bits // 8
    address = bind_moved_address(cpu, insn, lambda: signed(bits, read()) // bits * size)
    return bind_memory(cpu, address, size)


HANDLERS = [
    Operation("tzcnt", "wr", tzcnt, CF | ZF),
    Operation("lzcnt", "wr", lzcnt, CF | ZF),
    Operation("popcnt", "wr", popcnt, STATUS),
    Operation("bextr", "wrr", bextr, ZF | CF | OF),
    Operation("bzhi", "wrr", bzhi, SF | ZF | CF | OF),
    Operation("blsi", "wr", blsi, SF | ZF | CF | OF),
    Operation("blsr", "wr", blsr, SF | ZF | CF | OF),
    Operation("blsmsk", "wr", blsmsk, SF | ZF | CF | OF),
    Operation("pdep", "wrr", pdep),
    Operation("pext", "wrr", pext),
    Operation("crc32", "mr", crc32, measure=1),
    BitScan("bsf", lambda value: (value & -value).bit_length() - 1),
    BitScan("bsr", lambda value: value.bit_length() - 1),
    BitTest("bt", None),
    BitTest("bts", lambda value, bit: value | bit),
    BitTest("btr", lambda value, bit: value & ~bit),
    BitTest("btc", lambda value, bit: value ^ bit),
]
