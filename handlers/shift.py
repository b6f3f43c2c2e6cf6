"""Shifts of lanes by an immediate, by one count for all lanes, and by a count of each lane.

NumPy defines shifts by the width and more as the hardware does: zero, or all sign bits.
SDM Vol. 2: PSLL* PSRL* PSRA* VPSLLV* VPSRLV* VPSRAV*.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from handlers.operands import Form, Lanes, Step
from handlers.vector import Extent, Plan, immediate, lanewise, no_immediate, planned

_KINDS: tuple[tuple[str, str, Callable[..., Any], str], ...] = (
    ("psll", "u", np.left_shift, "wdq"),
    ("psrl", "u", np.right_shift, "wdq"),
    ("psra", "i", np.right_shift, "wd"),
)
_SIZE = {"w": 2, "d": 4, "q": 8}


def _by_immediate(ufunc: Callable[..., Any]) -> Plan:
    def plan(form: Form, a: Lanes, out: Lanes) -> Step:
        count = np.array(min(form.imm, 8 * a.itemsize), a.dtype)
        return partial(ufunc, a, count, out)

    return plan


def _by_register(ufunc: Callable[..., Any]) -> Plan:
    def plan(form: Form, a: Lanes, source: memoryview, out: Lanes) -> Step:
        """All 64 low bits of the source are the count."""
        whole_count, width = source.cast("Q"), 8 * a.itemsize
        count = np.array(0, a.dtype)
        item = count.reshape(1).data

        def step() -> None:
            item[0] = min(whole_count[0], width)
            ufunc(a, count, out)

        return step

    return plan


BY_IMMEDIATE = [
    planned(f"{name}{x}", f"{k}{_SIZE[x]}->{k}{_SIZE[x]}", _by_immediate(ufunc), accepts=immediate)
    for name, k, ufunc, letters in _KINDS
    for x in letters
]
BY_REGISTER = [
    planned(
        f"{name}{x}",
        f"{k}{_SIZE[x]},b->{k}{_SIZE[x]}",
        _by_register(ufunc),
        Extent.WHOLE,
        accepts=no_immediate,
    )
    for name, k, ufunc, letters in _KINDS
    for x in letters
]
VARIABLE = [
    lanewise("vpsllvd", "u4,u4->u4", np.left_shift),
    lanewise("vpsllvq", "u8,u8->u8", np.left_shift),
    lanewise("vpsrlvd", "u4,u4->u4", np.right_shift),
    lanewise("vpsrlvq", "u8,u8->u8", np.right_shift),
    lanewise("vpsravd", "i4,i4->i4", np.right_shift),
]
