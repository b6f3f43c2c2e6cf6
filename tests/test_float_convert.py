"""Conversions of floating-point numbers against the host CPU."""

from __future__ import annotations

import pytest

from handlers import fenv, float_convert
from tests.differential import sweep
from tests.float_sweep import forms


def test_all_forms_equal_the_host() -> None:
    sweep(float_convert, forms=forms(float_convert), cases=10)


def test_all_forms_equal_the_host_without_its_floating_point_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fenv, "_host", None)
    sweep(float_convert, forms=forms(float_convert), cases=2, seed=1)
