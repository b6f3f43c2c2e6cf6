"""The pack ``amd``: what only AMD's processors had or have: SSE4a, XOP, FMA4, TBM and 3DNow!."""

from __future__ import annotations

from handlers import fma4, integer_tbm, sse4a, three_d_now, xop
from sandbox.handler import Pack

PACK = Pack.of("amd", sse4a, xop, fma4, integer_tbm, three_d_now)
