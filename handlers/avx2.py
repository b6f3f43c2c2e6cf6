"""The pack ``avx2``: what x86-64-v3 adds, by family of operation, with the SSE twins of all forms.

AVX, AVX2, AES, PCLMULQDQ, VAES, VPCLMULQDQ, FMA, F16C, BMI1, BMI2, LZCNT, MOVBE, and FISTTP, for
without all of SSE3 CPUID does not offer AVX. And what later came to registers of 256 bits: GFNI,
SHA, SHA512, SM3, SM4, AVX-VNNI and its INT8 and INT16, AVX-IFMA, AVX-NE-CONVERT.
"""

from __future__ import annotations

from handlers import (
    arithmetic,
    compare,
    crypto,
    dot_product,
    extend,
    float_approximate,
    float_arithmetic,
    float_compare,
    float_control,
    float_convert,
    float_fma,
    float_horizontal,
    float_no_exceptions,
    float_round,
    galois,
    gather,
    integer_pack,
    logic,
    masked,
    move,
    sha,
    shift,
    shuffle,
    sm,
    strings,
    x87_integer,
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
    galois,
    sha,
    sm,
    dot_product,
    float_approximate,
    float_arithmetic,
    float_compare,
    float_control,
    float_convert,
    float_fma,
    float_horizontal,
    float_no_exceptions,
    float_round,
    GENERAL,
    x87_integer.fisttp,
)
