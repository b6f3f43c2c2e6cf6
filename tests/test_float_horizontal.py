"""Sums across lanes and dot products against the host CPU."""

from __future__ import annotations

import pytest

from handlers import fenv, float_horizontal
from tests.differential import sweep
from tests.float_sweep import forms


def test_all_forms_equal_the_host() -> None:
    sweep(float_horizontal, forms=forms(float_horizontal), cases=10)


def test_all_forms_equal_the_host_without_its_floating_point_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fenv, "_host", None)
    sweep(float_horizontal, forms=forms(float_horizontal), cases=2, seed=1)
