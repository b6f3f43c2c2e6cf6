"""x87 integers and packed decimals against the host CPU."""

from __future__ import annotations

import pytest

from handlers import x87_integer
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
