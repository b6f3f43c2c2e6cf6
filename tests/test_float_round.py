"""Rounding to integral values against the host CPU."""

from __future__ import annotations

import pytest

from handlers import float_round
from sandbox.encodings import encode
from tests.differential import compare, sweep
from tests.float_sweep import forms


def test_all_forms_equal_the_host() -> None:
    sweep(float_round, forms=forms(float_round), cases=10)


@pytest.mark.parametrize("code", forms(float_round))
def test_every_rounding_immediate_equals_the_host(code: int) -> None:
    for immediate in range(16):
        compare(encode(code, (1, 2, 3), immediate=immediate), float_round, cases=8)
