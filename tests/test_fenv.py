"""Lending the host's floating-point environment: control bits, flags, and that it comes back."""

from __future__ import annotations

import threading
import warnings
from functools import partial

import numpy as np
import pytest

from handlers import fenv
from handlers.softfloat import DE, IE, OE, PE, UE, ZE

pytestmark = pytest.mark.skipif(
    not fenv.is_available(), reason="the host lends no floating-point environment"
)

ONE, TINY = np.float32(1), np.float32(2**-30)


def flags_of(*stages: partial[object], mxcsr: int = 0x1F80) -> int:
    run = fenv.bracket(*stages)
    assert run is not None
    return run(mxcsr)


def quotient(a: float, b: float) -> partial[object]:
    lanes = np.array([a], "f8"), np.array([b], "f8")
    return partial(np.divide, *lanes, np.zeros(1))


def host_rounds_to_nearest() -> bool:
    ones, tiny = np.full(3, ONE), np.full(3, TINY)
    return bool((ones + tiny == ONE).all()) and 1.0 + 2.0**-60 == 1.0


def failing() -> None:
    raise KeyboardInterrupt


def test_each_flag_is_seen() -> None:
    assert flags_of(quotient(1, 2)) == 0
    assert flags_of(quotient(1, 3)) == PE
    assert flags_of(quotient(1, 0)) == ZE
    assert flags_of(quotient(0, 0)) == IE
    assert flags_of(quotient(1e308, 1e-300)) == OE | PE
    assert flags_of(quotient(3e-308, 3e8)) == UE | PE
    assert flags_of(quotient(5e-324, 1)) == DE


def test_masks_of_the_guest_never_reach_the_host() -> None:
    assert flags_of(quotient(1, 0), mxcsr=0) == ZE  # the process would die of SIGFPE


def test_flags_of_all_stages_are_collected() -> None:
    assert flags_of(quotient(1, 0), quotient(0, 0), quotient(1, 3)) == ZE | IE | PE


def test_earlier_flags_of_host_and_guest_are_not_reported() -> None:
    assert 1.0 / 3.0 < 1  # sets the host's PE
    assert flags_of(quotient(1, 2), mxcsr=0x1FBF) == 0


def test_no_warning_is_raised_inside() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert flags_of(quotient(0, 0)) == IE


def test_the_environment_comes_back_after_an_exception() -> None:
    for stages in ((failing,), (failing, failing)):
        run = fenv.bracket(*stages)
        assert run is not None
        with pytest.raises(KeyboardInterrupt):
            run(0xFFC0)
        assert host_rounds_to_nearest()
        assert np.float64(5e-324) * np.float64(1) > 0  # no DAZ, no FTZ


def test_two_threads_do_not_disturb_each_other() -> None:
    """Each thread has its own MXCSR; a bracket in one leaves the other's rounding alone."""
    wrong: list[str] = []

    def work(mxcsr: int, above: bool) -> None:
        out, ones, tiny = np.zeros(8, "f4"), np.full(8, ONE), np.full(8, TINY)
        run = fenv.bracket(partial(np.add, ones, tiny, out))
        assert run is not None
        for _ in range(3000):
            if run(mxcsr) != PE or bool((out > ONE).all()) != above:
                wrong.append(f"mxcsr {mxcsr:#x}: {out}")

    threads = [threading.Thread(target=work, args=a) for a in ((0x5F80, True), (0x3F80, False))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert host_rounds_to_nearest()
