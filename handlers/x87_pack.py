"""The pack ``x87``: the instructions of the floating-point unit (SDM Vol. 1, chapter 8)."""

from __future__ import annotations

from handlers import (
    x87_angle,
    x87_arithmetic,
    x87_compare,
    x87_control,
    x87_integer,
    x87_logarithm,
    x87_move,
    x87_remainder,
)
from sandbox.handler import Pack

PACK = Pack.of(
    "x87",
    x87_move.HANDLERS,
    x87_integer.HANDLERS,
    x87_arithmetic.HANDLERS,
    x87_compare.HANDLERS,
    x87_remainder.HANDLERS,
    x87_logarithm.HANDLERS,
    x87_angle.HANDLERS,
    x87_control.HANDLERS,
)
