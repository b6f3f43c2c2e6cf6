"""AMD's floating point with a destination of its own: FMA4, and VFRCZ of XOP.

APM Vol. 4: VFMADDPS ... VFNMSUBSD, VFRCZPS ... VFRCZSD. Unlike FMA3's, the scalar forms zero what
lies above the result.
"""

from __future__ import annotations

from handlers import softfloat as soft
from handlers.fenv import bind_exact, bind_mxcsr, each_lane
from handlers.float_fma import ALL, ALTERNATING, fused
from handlers.float_forms import FORMATS
from handlers.operands import Form, Lanes, Step
from handlers.softfloat import FLAGS, MASKS, RZERO, Format, Result
from handlers.vector import planned

_SUFFIXES = (("ps", "f4"), ("pd", "f8"), ("ss", "f4"), ("sd", "f8"))
_TO_ZERO = RZERO << 13

FUSED = [
    planned(f"{name}{suffix}", f"{lane},{lane},{lane}->{lane}", fused(*signs, "123"), staged=True)
    for name, signs in (*ALL.items(), *ALTERNATING.items())
    for suffix, lane in (_SUFFIXES if name in ALL else _SUFFIXES[:2])
]


def _fraction(f: Format, a: int, mxcsr: int) -> Result:
    """``a`` less its integral part: the subtraction decides about signs and exceptions."""
    integral, _inexact = soft.round_integral(f, a, mxcsr & ~FLAGS | _TO_ZERO | MASKS)
    return soft.sub(f, a, integral, mxcsr)


def _fractions(form: Form, a: Lanes, out: Lanes) -> Step:
    careful = bind_exact(form.cpu, each_lane(_fraction, FORMATS[out.itemsize], a), out)
    read = bind_mxcsr(form.cpu)
    return lambda: careful(read())


FRACTIONS = [
    planned(f"vfrcz{suffix}", f"{lane}->{lane}", _fractions, staged=True)
    for suffix, lane in _SUFFIXES
]
