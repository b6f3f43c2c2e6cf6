"""Fused multiply-add: the 96 forms of VFMADD, VFMSUB, VFNMADD, VFNMSUB, VFMADDSUB, VFMSUBADD.

SDM Vol. 2, VFMADD132PD ... VFNMSUB231SS. NumPy has no fused multiply-add; the C library's ``fma``
and ``fmaf`` are called per lane inside the guest's environment where they prove to be exact with
all flags (they are one instruction on a host that has FMA3); else, and for NaNs, every lane goes
through :func:`handlers.softfloat.fma`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import product
from typing import Any

import numpy as np

from handlers import float_forms
from handlers import softfloat as soft
from handlers.fenv import Exact, bind_exact, bind_mxcsr, bits_of, bracket, collect, is_available
from handlers.float_forms import (
    FORMATS,
    SHORT_WAY,
    SHORT_WAY_BITS,
    family,
    items,
    normal_range,
)
from handlers.operands import Form, Lanes, Step
from handlers.softfloat import DAZ, FTZ, MASKS, Format
from handlers.vector import Plan


class _Single(ctypes.c_float):
    """A subclass, so that ctypes hands over the raw result: a Python float would touch flags."""


class _Double(ctypes.c_double):
    """See :class:`_Single`."""


_C_TYPES: dict[int, tuple[str, type[Any]]] = {4: ("fmaf", _Single), 8: ("fma", _Double)}


def _library_function(size: int) -> Any:
    name, c_type = _C_TYPES[size]
    function: Any = getattr(ctypes.PyDLL("libm.so.6"), name)
    function.restype = c_type
    return function


def _arguments(lanes: Lanes) -> list[Any]:
    """The lanes as arguments for the library, which see what the lanes hold at the call."""
    size = lanes.itemsize
    return [_C_TYPES[size][1].from_buffer(lanes, i * size) for i in range(len(lanes))]


def _bind_lanes(x: Lanes, y: Lanes, z: Lanes, out: memoryview) -> Step:
    """A step that puts ``fma(x, y, z)`` of all lanes into ``out``, a buffer of its own."""
    function = _library_function(x.itemsize)
    xs, ys, zs = _arguments(x), _arguments(y), _arguments(z)
    join = b"".join

    def compute() -> None:
        out[:] = join(map(function, xs, ys, zs))

    return compute


def _probes(f: Format) -> Iterator[tuple[int, int, int]]:
    one = f.bias << (f.precision - 1)
    edges = (3, f.min_normal, one - 1, one + 1 | f.sign, f.infinity - 1)
    yield from product(edges, edges, (0, *edges))
    yield from product((one + 1, one + 1 | f.sign), (one + 1,), (one + 2, one + 2 | f.sign))


@lru_cache(maxsize=2)
def library_is_exact(size: int) -> bool:
    """Whether the C library's function equals the integer one, flags included, on this host."""
    f = FORMATS[size]
    x, y, z = (np.zeros(1, f"f{size}") for _ in range(3))
    out = bytearray(size)
    run = bracket(_bind_lanes(x, y, z, memoryview(out))) if is_available() else None
    if run is None:
        return False
    for number, operands in enumerate(_probes(f)):
        mxcsr = MASKS | (number & 3) << 13 | (0, DAZ, FTZ)[number % 3]
        for view, bits in zip((x, y, z), operands, strict=True):
            bits_of(view)[0] = bits
        flags = run(mxcsr)
        if (int.from_bytes(out, "little"), flags) != soft.fma(f, *operands, mxcsr):
            return False
    return True


def fused(product_sign: int, addend_signs: tuple[int, int], order: str) -> Plan:
    """A plan for one operation; ``addend_signs`` of even and odd lanes, 1 for negated.

    ``order`` are the digits of the mnemonic: the two factors and the addend among the operands.
    """

    def plan(form: Form, *views: Lanes) -> Step:
        *operands, out = views
        x, y, z = (operands[int(digit) - 1] for digit in order)
        negate_z = [addend_signs[i & 1] for i in range(len(out))]
        careful = bind_exact(form.cpu, _bind_integers(x, y, z, product_sign, negate_z), out)
        read, write = bind_mxcsr(form.cpu), form.cpu.registers.bank.write
        if not library_is_exact(out.itemsize):
            return lambda: careful(read())
        x, flip_x = _negated(x, [product_sign] * len(out))
        z, flip_z = _negated(z, negate_z)
        run = bracket(_bind_lanes(x, y, z, items(out).cast("B")))
        assert run is not None
        has_nan = _bind_nan_search(out)

        def step() -> None:
            mxcsr = read()
            flip_x()
            flip_z()
            flags = run(mxcsr)
            if has_nan() or mxcsr & MASKS != MASKS:
                careful(mxcsr)
            elif flags & ~mxcsr:
                write("mxcsr", mxcsr | flags)

        if len(out) == 1:
            return _short_way(form, (x, y, z), (flip_x, flip_z), out, step)
        return step

    return plan


def _short_way(
    form: Form,
    operands: tuple[Lanes, Lanes, Lanes],
    flips: tuple[Step, Step],
    out: Lanes,
    take_full_way: Step,
) -> Step:
    """One lane where no flag can change, as in :mod:`handlers.float_arithmetic`."""
    low, high = normal_range(FORMATS[out.itemsize])
    function = _library_function(out.itemsize)
    (x_argument,), (y_argument,), (z_argument,) = map(_arguments, operands)
    x_items, y_items, z_items = map(items, operands)
    read, target = bind_mxcsr(form.cpu), items(out)
    flip_x, flip_z = flips

    def step() -> None:
        if read() & SHORT_WAY_BITS == SHORT_WAY:
            flip_x()
            flip_z()
            z = z_items[0]
            if (
                low <= abs(x_items[0]) <= high
                and low <= abs(y_items[0]) <= high
                and (low <= abs(z) <= high or z == 0)
            ):
                result = function(x_argument, y_argument, z_argument).value
                if low <= abs(result) <= high:
                    target[0] = result
                    return
        take_full_way()

    return step


def _bind_nan_search(lanes: Lanes) -> Callable[[], object]:
    """A function whose answer is true if a lane is a NaN."""
    if len(lanes) == 1:
        only = items(lanes)
        return lambda: only[0] != only[0]
    nans = bytearray(8)
    find = partial(np.isnan, lanes, np.frombuffer(nans, np.bool_, len(lanes)))
    found = memoryview(nans).cast("Q")

    def has_nan() -> int:
        find()
        return found[0]

    return has_nan


def _nothing() -> None:
    pass


def _negated(lanes: Lanes, signs: Sequence[int]) -> tuple[Lanes, Step]:
    """A view where the lanes stand negated by ``signs`` after the step, which may be nothing."""
    if not any(signs):
        return lanes, _nothing
    copy = np.zeros_like(lanes)
    if len(lanes) == 1:
        return copy, _bind_scalar_negation(items(lanes), items(copy))
    mask = np.array([FORMATS[lanes.itemsize].sign * s for s in signs], bits_of(lanes).dtype)
    return copy, partial(np.bitwise_xor, bits_of(lanes), mask, bits_of(copy))


def _bind_scalar_negation(source: Any, copy: Any) -> Step:
    def negate() -> None:
        copy[0] = -source[0]

    return negate


def _bind_integers(
    x: Lanes, y: Lanes, z: Lanes, product_sign: int, negate_z: Sequence[int]
) -> Exact:
    f = FORMATS[x.itemsize]
    views = [bits_of(view) for view in (x, y, z)]

    def exact(mxcsr: int) -> tuple[list[int], int]:
        lanes = zip(*(view.tolist() for view in views), negate_z, strict=True)
        return collect(
            (soft.fma(f, a, b, c, mxcsr, bool(product_sign), bool(n)) for a, b, c, n in lanes),
            mxcsr,
        )

    return exact


ALL: dict[str, tuple[int, tuple[int, int]]] = {
    "vfmadd": (0, (0, 0)),
    "vfmsub": (0, (1, 1)),
    "vfnmadd": (1, (0, 0)),
    "vfnmsub": (1, (1, 1)),
}
ALTERNATING: dict[str, tuple[int, tuple[int, int]]] = {
    "vfmaddsub": (0, (1, 0)),
    "vfmsubadd": (0, (0, 1)),
}
_ORDERS = ("132", "213", "231")

FUSED = [
    operation
    for order in _ORDERS
    for name, signs in ALL.items()
    for operation in family(f"{name}{order}", 3, fused(*signs, order), staged=True)
]
FUSED_ALTERNATING = [
    operation
    for order in _ORDERS
    for name, signs in ALTERNATING.items()
    for operation in family(
        f"{name}{order}", 3, fused(*signs, order), float_forms.PACKED, staged=True
    )
]
