"""The pack ``avx2``: AVX, AVX2 and their SSE twins, by family of operation."""

from __future__ import annotations

from handlers import arithmetic, compare, extend, logic, move, shift, shuffle
from sandbox.handler import Pack

PACK = Pack.of("avx2", move, logic, arithmetic, compare, shift, shuffle, extend)
