"""Decimal adjustment: the manual's examples and its rules over all bytes."""

from __future__ import annotations

import pytest

from handlers.integer_decimal import aaa, aad, aam, aas, daa, das
from sandbox.cpu import DE, Fault
from sandbox.decode import decode
from sandbox.registers import AF, CF, PF, RAX, SF, ZF
from tests.doubles import make_cpu
from tests.integer_cases import bind


@pytest.mark.parametrize(
    ("code", "ax", "flags", "result", "after"),
    [
        ("27", 0xAE, 0, 0x14, AF | CF | PF),  # SDM Vol. 2, DAA: ADD 79H, 35H; DAA
        ("27", 0x2E, AF | CF, 0x94, AF | CF | SF),  # DAA after SUB 35H, 47H
        ("2f", 0xEE, AF | CF, 0x88, AF | CF | SF | PF),  # SDM Vol. 2, DAS: SUB 35H, 47H; DAS
        ("37", 0x000F, 0, 0x0105, AF | CF),
        ("3f", 0x02FF, AF, 0x0109, AF | CF),
        ("d40a", 0x0048, 0, 0x0702, 0),  # 72 = 7 * 10 + 2
        ("d50a", 0x0702, 0, 0x0048, PF),
        ("d410", 0x00FF, 0, 0x0F0F, PF),
        ("d50a", 0x1900, 0, 0x00FA, SF | PF),
    ],
)
def test_examples(code: str, ax: int, flags: int, result: int, after: int) -> None:
    cpu = make_cpu(32)
    cpu.gpr[RAX], cpu.rflags = 0xABCD_0000 | ax, 2 | flags
    bind(cpu, decode(bytes.fromhex(code), 32))()
    assert cpu.gpr[RAX] == 0xABCD_0000 | result
    defined = {"37": AF | CF, "3f": AF | CF, "d4": SF | ZF | PF, "d5": SF | ZF | PF}
    compared = defined.get(code[:2], AF | CF | SF | ZF | PF)
    assert cpu.rflags & compared == after


def packed(number: int) -> int:
    return number // 10 << 4 | number % 10


def test_daa_and_das_are_decimal_addition_and_subtraction() -> None:
    for a in range(100):
        for b in range(100):
            x, y = packed(a), packed(b)
            half = AF if (x & 15) + (y & 15) > 15 else 0
            result, flags = daa((x + y) & 0xFF, half | (CF if x + y > 255 else 0), 0)
            assert (result, bool(flags & CF)) == (packed((a + b) % 100), a + b > 99)
            half = AF if (x & 15) < (y & 15) else 0
            result, flags = das((x - y) & 0xFF, half | (CF if x < y else 0), 0)
            assert (result, bool(flags & CF)) == (packed((a - b) % 100), a < b)


def test_aaa_and_aas_are_unpacked_addition_and_subtraction() -> None:
    for a in range(10):
        for b in range(10):
            half = AF if a + b > 15 else 0
            assert aaa(0x0300 | a + b, half, 0)[0] == (3 + (a + b) // 10) << 8 | (a + b) % 10
            half = AF if a < b else 0
            result = aas(0x0300 | (a - b) & 0xFF, half, 0)[0]
            assert result == (3 - (a < b)) << 8 | (a - b) % 10


def test_aam_and_aad_are_inverse_in_every_base() -> None:
    for base in range(1, 256):
        for value in range(0, 256, 7):
            ax, _flags = aam(value, 0, base)
            assert divmod(value, base) == (ax >> 8, ax & 0xFF)
            assert aad(ax, 0, base)[0] == value


def test_aam_by_zero_is_a_divide_error() -> None:
    with pytest.raises(Fault) as caught:
        bind(make_cpu(32), decode(b"\xd4\x00", 32))()
    assert caught.value.vector == DE
