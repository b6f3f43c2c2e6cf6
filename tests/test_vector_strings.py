"""SSE4.2 string comparisons."""

from __future__ import annotations

import random

import pytest

from handlers import strings
from sandbox.native import State
from sandbox.registers import AF, CF, PF, SF, ZF
from tests.differential import HandlerSubject, compare, sweep
from tests.vector_forms import execute, forms_of_handlers, handlers_of, small_cpu

HANDLERS = handlers_of(strings)


def test_all_forms_do_what_the_host_cpu_does() -> None:
    sweep(HANDLERS, forms=forms_of_handlers(HANDLERS), cases=3)


def pad(text: bytes) -> bytes:
    return text.ljust(16, b"\0")


@pytest.mark.parametrize(
    ("first", "second", "imm", "index"),
    [
        (b"aeiou", b"xyzzy, ok", 0x00, 7),  # equal any: strpbrk
        (b"aeiou", b"xyzzy", 0x00, 16),
        (b"az", b"ABCdEF", 0x04, 3),  # ranges
        (b"azAZ", b"abc1", 0x14, 3),  # negated
        (b"same", b"sane", 0x18, 2),  # equal each, negated: strcmp
        (b"same", b"same", 0x18, 16),
        (b"nee", b"a needle", 0x0C, 2),  # equal ordered: strstr
        (b"zz", b"0123456789abcdez", 0x0C, 15),  # begins at the last byte
        (b"", b"anything", 0x0C, 0),
        (b"aeiou", b"ae", 0x30, 16),  # negated where valid: nothing is left
        (b"aeiou", b"ae", 0x10, 2),
        (b"x", b"xaxaxa", 0x40, 4),  # the last one
    ],
)
def test_index_of_implicit_strings(first: bytes, second: bytes, imm: int, index: int) -> None:
    cpu = small_cpu(v1=pad(first), v2=pad(second))
    cpu.gpr[1] = (1 << 64) - 1
    execute(HANDLERS, cpu, f"660f3a63ca{imm:02x}")  # pcmpistri xmm1, xmm2, imm
    assert cpu.gpr[1] == index
    assert bool(cpu.rflags & CF) == (index < 16)
    assert bool(cpu.rflags & ZF) == (len(second) < 16)
    assert bool(cpu.rflags & SF) == (len(first) < 16)
    assert cpu.rflags & (AF | PF) == 0


def test_explicit_lengths_count_by_their_absolute_value() -> None:
    cpu = small_cpu(v1=b"ab" * 8, v2=b"ab" * 8)
    cpu.gpr[0], cpu.gpr[2] = 0xFFFFFFFF_FFFFFFFE, 3  # EAX = -2
    execute(HANDLERS, cpu, "660f3a61ca0c")  # pcmpestri xmm1, xmm2, 0Ch
    assert cpu.gpr[1] == 0
    cpu.gpr[0] = 16  # longer than string 2, which has "aba"
    execute(HANDLERS, cpu, "660f3a61ca18")  # equal each, negated: where they differ
    assert cpu.gpr[1] == 3
    assert cpu.rflags & (SF | ZF) == ZF


def test_mask_result_as_bits_and_as_elements() -> None:
    cpu = small_cpu(v1=pad(b"a"), v2=pad(b"banana"))
    execute(HANDLERS, cpu, "c4e37962ca00")  # vpcmpistrm xmm1, xmm2, 0
    assert cpu.vec.read(0) == bytes([0b101010]) + bytes(63)
    execute(HANDLERS, cpu, "660f3a62ca40")  # pcmpistrm xmm1, xmm2, 40h
    assert cpu.vec.read(0) == b"\0\xff\0\xff\0\xff" + bytes(58)


def test_words_may_be_signed() -> None:
    cpu = small_cpu(v1=b"\xfe\xff\x02\0" + bytes(12), v2=b"\x05\0\xff\xff\x01\0" + bytes(10))
    execute(HANDLERS, cpu, "660f3a63ca07")  # ranges of signed words: -2 to 2
    assert cpu.gpr[1] == 1
    execute(HANDLERS, cpu, "660f3a63ca05")  # unsigned: FFFEh to 2 is empty
    assert cpu.gpr[1] == 8


@pytest.mark.parametrize("opcode", ["60", "61", "62", "63"])
def test_all_control_bytes_on_short_texts_of_few_letters(opcode: str) -> None:
    """Random registers seldom hold a match; texts over three letters, ends included, do."""
    subject = HandlerSubject(HANDLERS)
    rng = random.Random(opcode)
    for imm in range(0x80):
        states = []
        for _ in range(6):
            state = State()
            first, second = (
                bytes(rng.choices((0x7E, 0x80, 0x81, 0), (4, 4, 4, 1), k=16)) for _ in "ab"
            )
            at = rng.randrange(14)
            first = rng.choice((first, second[at:].ljust(16, b"\0"), second))
            state.set_vector(1, first)
            state.set_vector(2, second)
            state.gpr[0] = rng.choice((rng.randrange(-18, 18) & (1 << 64) - 1, rng.randrange(20)))
            state.gpr[2] = rng.choice((rng.randrange(-18, 18) & 0xFFFFFFFF, rng.randrange(20)))
            states.append(state)
        compare(f"660f3a{opcode}ca{imm:02x}", subject, states=states)
