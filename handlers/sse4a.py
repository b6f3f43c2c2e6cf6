"""AMD's SSE4a: bit fields of the low quadword, and scalar stores (APM Vol. 4).

A length of 0 means 64. What the manual leaves undefined, the high quadword and a field that goes
beyond bit 63, is as on AMD's CPUs: the high quadword becomes zero, the field ends at bit 63.
"""

from __future__ import annotations

from handlers.operands import Form, Lanes, Step
from handlers.vector import Extent, immediate, lanewise, no_immediate, planned

_MASK64 = (1 << 64) - 1


def _field(length: int, index: int) -> tuple[int, int]:
    """The mask of a field as it stands at bit 0, and where it stands."""
    return (1 << ((length & 63) or 64)) - 1, index & 63


def _immediates(form: Form) -> tuple[int, int]:
    iced = form.insn.iced
    return _field(iced.immediate(iced.op_count - 2), iced.immediate(iced.op_count - 1))


def _extract(value: int, mask: int, index: int) -> int:
    return value >> index & mask


def _insert(value: int, source: int, mask: int, index: int) -> int:
    return (value & ~(mask << index) | (source & mask) << index) & _MASK64


def _extract_by_immediate(form: Form, a: Lanes, out: Lanes) -> Step:
    mask, index = _immediates(form)

    def step() -> None:
        out[:] = _extract(int(a[0]), mask, index), 0

    return step


def _extract_by_register(form: Form, a: Lanes, control: memoryview, out: Lanes) -> Step:
    def step() -> None:
        out[:] = _extract(int(a[0]), *_field(control[0], control[1])), 0

    return step


def _insert_by_immediate(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    mask, index = _immediates(form)

    def step() -> None:
        out[:] = _insert(int(a[0]), int(b[0]), mask, index), 0

    return step


def _insert_by_register(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    control = b.view("u1")

    def step() -> None:
        out[:] = _insert(int(a[0]), int(b[0]), *_field(int(control[8]), int(control[9]))), 0

    return step


FIELDS = [
    planned("extrq", "u8->u8", _extract_by_immediate, Extent.WHOLE, accepts=immediate),
    planned("extrq", "u8,b->u8", _extract_by_register, Extent.WHOLE, accepts=no_immediate),
    planned("insertq", "u8,u8->u8", _insert_by_immediate, Extent.WHOLE, accepts=immediate),
    planned("insertq", "u8,u8->u8", _insert_by_register, Extent.WHOLE, accepts=no_immediate),
]


def _copy(a: Lanes, out: Lanes) -> None:
    out[...] = a


STORES = [lanewise("movntss", "u4->u4", _copy), lanewise("movntsd", "u8->u8", _copy)]
