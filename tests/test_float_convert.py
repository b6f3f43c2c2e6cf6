"""Conversions of floating-point numbers against the host CPU."""

from __future__ import annotations

import pytest

from handlers import fenv, float_convert
from tests.differential import compare, sweep
from tests.float_sweep import forms


def test_all_forms_equal_the_host() -> None:
    sweep(float_convert, forms=forms(float_convert), cases=10)


def test_all_forms_equal_the_host_without_its_floating_point_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fenv, "_host", None)
    sweep(float_convert, forms=forms(float_convert), cases=2, seed=1)


@pytest.mark.parametrize("code", ["c4e37d1dd100", "c4e3791dd104"])  # vcvtps2ph, to nearest
def test_narrowing_to_nearest_equals_the_host(code: str) -> None:
    compare(code, float_convert, cases=300, mxcsr=[0x1F80, 0x1FC0, 0x9F80])
