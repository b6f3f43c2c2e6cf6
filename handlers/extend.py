"""Changes of lane size: sign and zero extension, saturating packs.

SDM Vol. 2: PMOVSX* PMOVZX* PACKSS* PACKUS*.
"""

from __future__ import annotations

import numpy as np

from handlers.arithmetic import saturate_into
from handlers.operands import Form, Lanes, Step
from handlers.vector import Extent, planned

_SIZE = {"b": 1, "w": 2, "d": 4, "q": 8}


def _extend(form: Form, a: Lanes, out: Lanes) -> Step:
    def step() -> None:
        out[...] = a

    return step


EXTEND = [
    planned(
        f"pmov{name}x{narrow}{wide}",
        f"{kind}{_SIZE[narrow]}->{kind}{_SIZE[wide]}",
        _extend,
        staged=True,
    )
    for name, kind in (("s", "i"), ("z", "u"))
    for narrow, wide in ("bw", "bd", "bq", "wd", "wq", "dq")
]


def _pack(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    """In each block the lanes of ``a`` below those of ``b``."""
    blocks, lanes = a.shape
    pool = np.empty((blocks, 2, lanes), a.dtype)
    low, high = pool[:, 0], pool[:, 1]
    store = saturate_into(pool.reshape(-1), out)

    def step() -> None:
        low[...] = a
        high[...] = b
        store()

    return step


PACK_LANES = [
    planned("packsswb", "i2x8,i2x8->i1", _pack, Extent.WHOLE),
    planned("packuswb", "i2x8,i2x8->u1", _pack, Extent.WHOLE),
    planned("packssdw", "i4x4,i4x4->i2", _pack, Extent.WHOLE),
    planned("packusdw", "i4x4,i4x4->u2", _pack, Extent.WHOLE),
]
