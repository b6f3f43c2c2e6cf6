"""Fused multiply-add against the host CPU."""

from __future__ import annotations

import pytest

from handlers import fenv, float_fma
from tests.differential import sweep
from tests.float_sweep import forms


def test_all_96_forms_equal_the_host() -> None:
    found = forms(float_fma)
    assert len(found) == 96
    sweep(float_fma, forms=found, cases=5)


def test_all_forms_equal_the_host_without_its_floating_point_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fenv, "_host", None)
    float_fma.library_is_exact.cache_clear()
    sweep(float_fma, forms=forms(float_fma), cases=1, seed=1)
    float_fma.library_is_exact.cache_clear()
