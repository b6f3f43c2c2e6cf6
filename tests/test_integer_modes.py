"""16- and 32-bit code: random encodings of the base ISA, compared with Unicorn."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from iced_x86 import OpKind

from handlers.integer import REGISTERS
from sandbox.cpu import Cpu, Fault
from sandbox.decode import DecodeError, Insn, decode
from sandbox.handler import Resume
from sandbox.registers import DF, RCX, RDI, RSI, RSP, Segment
from tests.doubles import FlatMemory, make_cpu
from tests.integer_cases import SPECIAL, bind, is_handled
from tests.undefined_flags import STATUS, operand_bits, shift_count, undefined_flags
from tests.unicorn_oracle import SELECTORS, SIZE, UnicornCpu

CASES = 1500

ONE_BYTE = [
    *(op for row in range(0, 0x40, 8) for op in range(row, row + 6)),
    *(0x27, 0x2F, 0x37, 0x3F, 0xD4, 0xD5, 0xD6, 0xD7, 0x98, 0x99, 0x9C, 0x9E, 0x9F),
    *range(0x40, 0x60),
    *(0x60, 0x61, 0x68, 0x69, 0x6A, 0x6B),
    *range(0x70, 0x8C),
    *(0x8D, 0x8F, *range(0x91, 0x98), *range(0xA0, 0xC2), 0xC3, 0xC6, 0xC7, 0xC8, 0xC9),
    *(0xD0, 0xD1, 0xD2, 0xD3, *range(0xE0, 0xE4), 0xE8, 0xE9, 0xEB),
    *(0xF5, 0xF6, 0xF7, 0xF8, 0xF9, 0xFC, 0xFD, 0xFE, 0xFF),
]
TWO_BYTES = [
    *(*range(0x40, 0x50), *range(0x80, 0xA0), 0xA3, 0xA4, 0xA5, 0xAB, 0xAC, 0xAD, 0xAF),
    *(0xB0, 0xB1, 0xB3, *range(0xB6, 0xB8), *range(0xBA, 0xC2), 0xC7, *range(0xC8, 0xD0)),
]
PREFIXES = ("", "", "", "66", "67", "6667", "f3", "2e", "26", "36")


def random_insns(rng: random.Random, bitness: int, count: int) -> Iterator[Insn]:
    while count:
        prefix = bytes.fromhex(rng.choice(PREFIXES))
        opcode = bytes([rng.choice(ONE_BYTE)])
        if rng.random() < 0.3:
            opcode = bytes([0x0F, rng.choice(TWO_BYTES)])
        small = bytes([rng.randrange(256), *rng.choice(((0x24,), ())), rng.randrange(256)])
        tail = small + bytes([rng.randrange(256), rng.choice((0, 1)), 0, 0, rng.randrange(256)])
        try:
            insn = decode(prefix + opcode + tail + bytes(4), bitness)
        except DecodeError:
            continue
        if is_comparable(insn):
            count -= 1
            yield insn


UNLIKE_HARDWARE = ("TEST_RM8_IMM8_F6R1", "TEST_RM16_IMM16_F7R1", "TEST_RM32_IMM32_F7R1")
"""Forms that Unicorn does not know."""
WIDE_FRAME = "ENTERW_IMM16_IMM8"
"""Sets all of EBP in Unicorn if the stack is 32 bits wide; BP alone on the host CPU."""


def is_comparable(insn: Insn) -> bool:
    """Handled, known to Unicorn, and neither undefined (BSWAP r16) nor about segments."""
    iced = insn.iced
    kinds = [iced.op_kind(n) for n in range(iced.op_count)]
    registers = [iced.op_register(n) for n, kind in enumerate(kinds) if kind == OpKind.REGISTER]
    if any(register not in REGISTERS for register in registers) or not is_handled(insn):
        return False
    if insn.form in UNLIKE_HARDWARE or (insn.form == WIDE_FRAME and insn.bitness == 32):
        return False
    return not (insn.mnemonic == "bswap" and operand_bits(insn) == 16)


def make_machine(bitness: int) -> tuple[Cpu, FlatMemory]:
    memory = FlatMemory(0, SIZE)
    cpu = make_cpu(bitness, 0, memory)
    for name, selector in SELECTORS.items():
        segment = Segment(selector, selector << 4) if bitness == 16 else Segment(db=1)
        if name == "cs":  # Unicorn checks no limit
            segment = Segment(limit=0xFFFF_FFFF, db=segment.db)
        cpu.registers.bank.write_segment(name, segment)
    return cpu, memory


def random_registers(rng: random.Random, insn: Insn, bitness: int) -> list[int]:
    """Memory operands and the stack lie in memory, repeat counts and quotients are small."""
    gpr = [rng.choice((rng.choice(SPECIAL), rng.getrandbits(32))) & 0xFFFF_FFFF for _ in range(8)]
    flat = 0x38000 if bitness == 32 else 0
    for number in (RSI, RDI):
        gpr[number] = rng.randrange(0x1000, 0x8000) + flat
    gpr[RSP] = 0x4000 + flat
    if insn.iced.is_string_instruction:
        gpr[RCX] = rng.randrange(20)
    iced = insn.iced
    kinds = [iced.op_kind(n) for n in range(iced.op_count)]
    if OpKind.MEMORY in kinds and insn.mnemonic != "lea":
        base, index = REGISTERS.get(iced.memory_base), REGISTERS.get(iced.memory_index)
        if index is not None:
            gpr[index[0]] = rng.randrange(0x100)
        if base is not None and base[0] != RSP:
            gpr[base[0]] = rng.randrange(0x1000, 0x8000) + flat
    if insn.mnemonic in ("div", "idiv"):
        gpr[2] = 0
    return gpr


@pytest.mark.parametrize("bitness", [16, 32])
@pytest.mark.parametrize("seed", range(3))
def test_random_instructions_agree_with_unicorn(bitness: int, seed: int) -> None:
    rng = random.Random(1000 * bitness + seed)
    oracle, ip = UnicornCpu(bitness), 0x100
    cpu, memory = make_machine(bitness)
    seen: set[str] = set()
    for insn in random_insns(rng, bitness, CASES):
        gpr = random_registers(rng, insn, bitness)
        shift = insn.mnemonic in ("shld", "shrd") and shift_count(insn, gpr) > operand_bits(insn)
        if shift:  # undefined
            continue
        ip += 16
        flags = 0x202 | rng.getrandbits(12) & (STATUS | DF)
        words = [rng.choice(SPECIAL).to_bytes(8, "little") for _ in range(64)]
        data = bytearray(b"".join(words) * (SIZE // 512))
        data[ip : ip + insn.length] = insn.raw
        before = bytes(data)
        repeat = 30 if insn.iced.is_string_instruction else 1
        theirs = oracle.run(ip, gpr, flags, before, repeat)
        for number, value in enumerate(gpr):
            cpu.gpr[number] = value
        cpu.registers.rip, cpu.rflags, memory.data = ip, flags, data
        what = f"{insn} {insn.raw.hex()} at {ip:#x} on {[hex(v) for v in gpr]} flags {flags:#x}"
        try:
            verdict = bind(cpu, insn)()
        except Fault as fault:  # Unicorn reports it, or stays there
            assert theirs is None or theirs.ip == ip, f"{what}: {fault!r}, Unicorn runs it"
            assert list(cpu.gpr[:8]) == gpr or insn.iced.has_rep_prefix
            continue
        after = verdict.rip if isinstance(verdict, Resume) else ip + insn.length
        assert after is not None
        if after >= SIZE:  # a jump out of its memory, which Unicorn reports at once
            continue
        assert theirs is not None, f"{what}: runs, Unicorn raises an exception"
        assert after == theirs.ip, what
        ours = [value & 0xFFFF_FFFF for value in cpu.gpr[:8]]
        assert ours == theirs.gpr, (
            f"{what}: {[hex(v) for v in ours]} {[hex(v) for v in theirs.gpr]}"
        )
        compared = (STATUS | DF) & ~undefined_flags(insn, gpr)
        assert not (cpu.rflags ^ theirs.rflags) & compared, (
            f"{what}: {cpu.rflags:#x} {theirs.rflags:#x}"
        )
        assert memory.data == theirs.memory, what
        seen.add(insn.mnemonic)
    assert len(seen) > 90
