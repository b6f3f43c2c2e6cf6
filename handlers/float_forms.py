"""What the floating-point families share: the packed and scalar forms of one operation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from handlers.fenv import Reference, bind_float, each_lane
from handlers.operands import Form, Lanes, Step
from handlers.softfloat import F16, F32, F64, PE, PM, Format
from handlers.vector import Extent, Operation, Plan, planned

FORMATS: dict[int, Format] = {2: F16, 4: F32, 8: F64}
"""The format of a lane of so many bytes."""

PACKED = (("ps", "f4", Extent.LANEWISE), ("pd", "f8", Extent.LANEWISE))
SCALAR = (("ss", "f4", Extent.SCALAR), ("sd", "f8", Extent.SCALAR))
"""Suffix of the mnemonic, lane type, extent."""

SHORT_WAY = PM | PE
SHORT_WAY_BITS = SHORT_WAY | 0x6000
"""Where MXCSR, under the second, is the first, a scalar operation on normal numbers with a normal
result changes no flag, does not trap and rounds to nearest, as the host does."""


def family(
    name: str,
    arity: int,
    plan: Plan,
    suffixes: tuple[tuple[str, str, Extent], ...] = PACKED + SCALAR,
    *,
    staged: bool = False,
) -> list[Operation]:
    """Declare the forms of one operation of ``arity`` sources: ``addps addpd addss addsd``."""
    return [
        planned(f"{name}{suffix}", f"{','.join([lane] * arity)}->{lane}", plan, extent,
                staged=staged)
        for suffix, lane, extent in suffixes
    ]  # fmt: skip


def by_ufunc(ufunc: Callable[..., Any], reference: Reference) -> Plan:
    """A plan for an operation that a NumPy ufunc does as the CPU does."""

    def plan(form: Form, *views: Lanes) -> Step:
        *sources, out = views
        exact = each_lane(reference, FORMATS[out.itemsize], *sources)
        return bind_float(form.cpu, [partial(ufunc, *sources, out)], exact, out)

    return plan


def items(lanes: Any) -> Any:
    """The lanes as a memoryview: its items are plain Python numbers, read and written fast."""
    return memoryview(lanes)


def normal_range(f: Format) -> tuple[float, float]:
    """The smallest and the largest positive normal number of a format, as Python floats."""
    smallest = 2.0 ** (1 - f.bias)
    return smallest, (2.0 - 2.0 ** (1 - f.precision)) * 2.0**f.bias
