"""Bitwise logic: PAND POR PXOR PANDN and the same on PS/PD. SDM Vol. 2, by mnemonic."""

from __future__ import annotations

import numpy as np

from handlers.operands import Form, Lanes, Step
from handlers.vector import lanewise, operation

AND = lanewise("pand andps andpd", "u8,u8->u8", np.bitwise_and)
OR = lanewise("por orps orpd", "u8,u8->u8", np.bitwise_or)
XOR = lanewise("pxor xorps xorpd", "u8,u8->u8", np.bitwise_xor)


@operation("pandn andnps andnpd", "u8,u8->u8")
def and_not(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    inverted = np.empty_like(a)

    def step() -> None:
        np.invert(a, inverted)
        np.bitwise_and(inverted, b, out)

    return step
