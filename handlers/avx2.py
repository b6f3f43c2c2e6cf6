"""The pack ``avx2``: what x86-64-v3 adds, by family of operation, with the SSE twins of all forms.

AVX, AVX2, AES, PCLMULQDQ, VAES, VPCLMULQDQ, FMA, F16C, BMI1, BMI2, LZCNT, MOVBE, and FISTTP, for
without all of SSE3 CPUID does not offer AVX.
"""

from __future__ import annotations

from handlers import (
    arithmetic,
    compare,
    crypto,
    extend,
    float_approximate,
    float_arithmetic,
    float_compare,
    float_control,
    float_convert,
    float_fma,
    float_horizontal,
    float_round,
    gather,
    integer_pack,
    logic,
    masked,
    move,
    shift,
    shuffle,
    strings,
    x87_store,
)
from sandbox.handler import Pack

_GENERAL = frozenset(
    "andn bextr blsi blsmsk blsr bzhi lzcnt movbe mulx pdep pext rorx sarx shlx shrx tzcnt".split()
)
GENERAL = [h for h in integer_pack.PACK.handlers if _GENERAL.intersection(h.mnemonics)]
"""The instructions on general registers that came with AVX2."""

PACK = Pack.of(
    "avx2",
    move,
    logic,
    arithmetic,
    compare,
    shift,
    shuffle,
    extend,
    masked,
    gather,
    strings,
    crypto,
    float_approximate,
    float_arithmetic,
    float_compare,
    float_control,
    float_convert,
    float_fma,
    float_horizontal,
    float_round,
    GENERAL,
    x87_store,
)
