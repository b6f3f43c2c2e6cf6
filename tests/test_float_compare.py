"""Floating-point comparisons, minimum and maximum against the host CPU."""

from __future__ import annotations

import pytest

from handlers import fenv, float_compare
from sandbox.encodings import encode, forms_of
from tests.differential import compare, sweep
from tests.float_sweep import forms


def test_all_forms_equal_the_host() -> None:
    sweep(float_compare, forms=forms(float_compare), cases=10)


def test_all_forms_equal_the_host_without_its_floating_point_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fenv, "_host", None)
    sweep(float_compare, forms=forms(float_compare), cases=2, seed=1)


@pytest.mark.parametrize("suffix", ["ps", "pd", "ss", "sd"])
def test_every_predicate_equals_the_host(suffix: str) -> None:
    mnemonic = f"vcmp{suffix}"
    code = next(c for c in forms_of(mnemonic) if c in forms(float_compare))
    for predicate in range(256):
        raw = encode(code, (1, 2, 3), immediate=predicate)
        compare(raw, float_compare, cases=4, seed=predicate)
