"""The pack ``avx2``: AVX, AVX2 and their SSE twins, by family of operation."""

from __future__ import annotations

from handlers import (
    arithmetic,
    compare,
    crypto,
    extend,
    gather,
    logic,
    masked,
    move,
    shift,
    shuffle,
    strings,
)
from sandbox.handler import Pack

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
)
