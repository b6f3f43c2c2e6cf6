"""Fused multiply-add against the host CPU."""

from __future__ import annotations

import pytest

from handlers import fenv, float_fma
from tests.differential import sweep
from tests.float_sweep import FEATURES, forms


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


def test_scalars_equal_the_host_when_inexact_is_set_already() -> None:
    names = [
        f"{name}{order}{suffix}"
        for name in ("vfmadd", "vfmsub", "vfnmadd", "vfnmsub")
        for order in ("132", "213", "231")
        for suffix in ("ss", "sd")
    ]
    sweep(float_fma, *names, features=FEATURES, cases=10, mxcsr=[0x1FA0, 0x9FE0])
