"""Rounding to integral values: ROUNDPS, ROUNDPD, ROUNDSS, ROUNDSD (SDM Vol. 2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from handlers import softfloat as soft
from handlers.fenv import bind_exact, bind_mxcsr, each_lane, quietly
from handlers.float_forms import FORMATS, family
from handlers.operands import Form, Lanes, Step
from handlers.softfloat import DAZ, MASKS, PE, Format, Result

_FROM_MXCSR, _NO_INEXACT = 4, 8
"""Bits of the immediate: MXCSR's rounding mode instead of its own; PE is not raised."""

_ROUNDERS: dict[int, Callable[..., Any]] = {
    soft.RNE: np.rint,
    soft.RDOWN: np.floor,
    soft.RUP: np.ceil,
    soft.RZERO: np.trunc,
}


def _reference(imm: int) -> Callable[[Format, int, int], Result]:
    def reference(f: Format, bits: int, mxcsr: int) -> Result:
        if not imm & _FROM_MXCSR:
            mxcsr = mxcsr & ~0x6000 | (imm & 3) << 13
        value, flags = soft.round_integral(f, bits, mxcsr)
        return value, flags & ~PE if imm & _NO_INEXACT else flags

    return reference


def _round(form: Form, a: Lanes, out: Lanes) -> Step:
    imm = form.imm
    read, write = bind_mxcsr(form.cpu), form.cpu.registers.bank.write
    exact = each_lane(_reference(imm), FORMATS[a.itemsize], a)
    careful = bind_exact(form.cpu, exact, out)
    steps = [quietly(partial(_ROUNDERS[mode], a, out)) for mode in range(4)]
    inexact, ordered = bytearray(8), bytearray(8)
    compare = partial(np.not_equal, a, out, np.frombuffer(inexact, np.bool_, len(a)))
    order = partial(np.equal, out, out, np.frombuffer(ordered, np.bool_, len(a)))
    is_inexact, is_ordered = memoryview(inexact).cast("Q"), memoryview(ordered).cast("Q")
    every = int.from_bytes(b"\1" * len(a), "little")

    def step() -> None:
        mxcsr = read()
        if mxcsr & (MASKS | DAZ) != MASKS:
            careful(mxcsr)
            return
        steps[(mxcsr >> 13 if imm & _FROM_MXCSR else imm) & 3]()
        compare()
        if not is_inexact[0]:
            return
        order()
        if is_ordered[0] != every:
            careful(mxcsr)
        elif not imm & _NO_INEXACT and not mxcsr & PE:
            write("mxcsr", mxcsr | PE)

    return step


ROUNDING = family("round", 1, _round, staged=True)
