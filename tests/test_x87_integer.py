"""x87 integers and packed decimals against the host CPU."""

from __future__ import annotations

import pytest

from handlers import x87_integer
from handlers.softfloat import RZERO
from tests.x87_oracle import assert_same, needs_host

STORES = {
    "fist m16": "df5710", "fist m32": "db5710", "fistp m16": "df5f10", "fistp m32": "db5f10",
    "fistp m64": "df7f10", "fisttp m16": "df4f10", "fisttp m32": "db4f10", "fisttp m64": "dd4f10",
    "fbstp": "df7710",
}  # fmt: skip
LOADS = {"fild m16": "df4710", "fild m32": "db4710", "fild m64": "df6f10", "fbld": "df6710"}


@needs_host
@pytest.mark.parametrize("code", STORES.values(), ids=STORES)
def test_integer_stores_do_what_the_host_cpu_does(code: str) -> None:
    assert_same(code, x87_integer.HANDLERS)


@needs_host
@pytest.mark.parametrize("code", LOADS.values(), ids=LOADS)
def test_integer_loads_do_what_the_host_cpu_does(code: str) -> None:
    assert_same(code, x87_integer.HANDLERS)


def test_decimals_of_the_manual() -> None:
    assert x87_integer.encode_decimal(-123456789012345678, True) == 0x80_123456789012345678
    assert x87_integer.encode_decimal(0, True) == 1 << 79
    assert x87_integer.encode_decimal(10**18, False) is None
    assert x87_integer.decode_decimal(0x80_000000000000000010) == 0xC002_A000000000000000


@pytest.mark.parametrize(
    ("value", "integer"),
    [
        (0x3FFF_8000000000000000, (1, False, False)),
        (0xBFFF_C000000000000000, (-1, True, False)),
        (0xC00E_8000FFFFFFFFFFFF, (-0x8000, True, False)),
        (0x403D_FFFFFFFFFFFFFFFF, ((1 << 63) - 1, True, False)),
        (0x0000_0000000000000001, (0, True, False)),
        (0x7FFF_8000000000000000, None),
        (0x3FFF_0000000000000000, None),
    ],
)
def test_truncation(value: int, integer: tuple[int, bool, bool] | None) -> None:
    assert x87_integer.to_integer(value, RZERO) == integer
