"""Floating-point comparisons, minimum and maximum.

SDM Vol. 2: CMPPS ... CMPSD, COMISS ... UCOMISD, MINPS ... MAXSD. A NaN anywhere, or a denormal in
a scalar form, takes the way through integers; all else is decided by the host's comparisons,
which are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from handlers import float_forms
from handlers import softfloat as soft
from handlers.fenv import (
    Reference,
    bind_exact,
    bind_mxcsr,
    bits_of,
    bracket,
    each_lane,
    raise_flags,
)
from handlers.float_forms import FORMATS, family, items, normal_range
from handlers.operands import Form, Lanes, Step
from handlers.softfloat import EQUAL, GREATER, LESS, MASKS, UNORDERED, Format, Result
from handlers.vector import planned
from sandbox.registers import CF, PF, ZF


class _Order:
    """How the lanes of two vectors stand to each other: ``a <= b`` and ``a >= b`` as bytes."""

    def __init__(self, a: Lanes, b: Lanes) -> None:
        count = len(a)
        buffer = bytearray(16)
        less_equal = np.frombuffer(buffer, np.bool_, count, 0)
        greater_equal = np.frombuffer(buffer, np.bool_, count, 8)
        self.less_equal, self.greater_equal = less_equal, greater_equal
        self.words = memoryview(buffer).cast("Q")
        """``less_equal`` and ``greater_equal``, each as one integer of a byte per lane."""
        self.all = int.from_bytes(b"\1" * count, "little")

        def compute() -> None:
            np.less_equal(a, b, less_equal)
            np.greater_equal(a, b, greater_equal)

        self.compute: Step = compute


class _Expansion(dict[int, bytes]):
    """From one byte per lane, as an integer, to lanes of all ones and all zeros."""

    def __init__(self, count: int, lane_size: int) -> None:
        super().__init__()
        self.count, self.lane_size = count, lane_size

    def __missing__(self, key: int) -> bytes:
        lanes = key.to_bytes(self.count, "little")
        value = b"".join(bytes((255 * lane,)) * self.lane_size for lane in lanes)
        self[key] = value
        return value


def _predicate(form: Form) -> int:
    """The immediate has three bits in legacy forms, five in VEX."""
    return form.imm & (7 if form.legacy else 31)


def _comparison(predicate: int, ones: int) -> Reference:
    """The reference for one lane of CMPPS: ``ones`` or zero."""

    def reference(f: Format, a: int, b: int, mxcsr: int) -> Result:
        holds, flags = soft.compare_predicate(f, a, b, predicate, mxcsr)
        return ones if holds else 0, flags

    return reference


def _compare_packed(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    f, predicate = FORMATS[a.itemsize], _predicate(form)
    ones = (1 << 8 * a.itemsize) - 1
    read, write = bind_mxcsr(form.cpu), form.cpu.registers.bank.write
    careful = bind_exact(form.cpu, each_lane(_comparison(predicate, ones), f, a, b), out)
    order = _Order(a, b)
    run = bracket(order.compute)
    if run is None:
        return lambda: careful(read())
    wanted = soft.PREDICATES[predicate]
    # the lanes for which the predicate holds, from the two masks of ordered lanes
    less = order.all if wanted & LESS else 0
    equal = order.all if wanted & EQUAL else 0
    greater = order.all if wanted & GREATER else 0
    words, every, raw = order.words, order.all, items(out).cast("B")
    lanes = _Expansion(len(a), a.itemsize)

    def step() -> None:
        mxcsr = read()
        flags = run(mxcsr)
        below, above = words
        if below | above != every or mxcsr & MASKS != MASKS:
            careful(mxcsr)
            return
        raw[:] = lanes[less & ~above | equal & below & above | greater & ~below]
        if flags & ~mxcsr:
            write("mxcsr", mxcsr | flags)

    return step


def _compare_scalar(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    predicate, ones = _predicate(form), (1 << 8 * a.itemsize) - 1
    reference = each_lane(_comparison(predicate, ones), FORMATS[a.itemsize], a, b)
    careful = bind_exact(form.cpu, reference, out)
    results = {r: ones if soft.PREDICATES[predicate] & r else 0 for r in (LESS, EQUAL, GREATER)}
    relation, target = _bind_relation(a, b), items(bits_of(out))

    def step() -> None:
        found = relation()
        if found:
            target[0] = results[found]
        else:
            careful(form.cpu.mxcsr)

    return step


def _bind_relation(a: Lanes, b: Lanes) -> Step:
    """A function that gives LESS, EQUAL or GREATER, or 0 if a NaN or a denormal needs a look."""
    left, right = items(a), items(b)
    smallest, _largest = normal_range(FORMATS[a.itemsize])
    negative = -smallest

    def relation() -> int:
        x, y = left[0], right[0]
        if (negative < x < smallest and x) or (negative < y < smallest and y):
            return 0
        if x < y:
            return LESS
        if x > y:
            return GREATER
        return EQUAL if x == y else 0

    return relation


_STATUS = {UNORDERED: ZF | PF | CF, LESS: CF, EQUAL: ZF, GREATER: 0}


def _to_flags(form: Form, a: Lanes, b: Lanes) -> Step:
    """COMISS and its like; the unordered comparison, UCOMISS, lets quiet NaNs pass."""
    signaling = "u" not in form.insn.mnemonic
    f, cpu = FORMATS[a.itemsize], form.cpu
    left, right = bits_of(a), bits_of(b)
    relation = _bind_relation(a, b)

    def step() -> int:
        found = relation()
        if not found:
            mxcsr = cpu.mxcsr
            found, flags = soft.compare(f, int(left[0]), int(right[0]), mxcsr, signaling)
            raise_flags(cpu, mxcsr, flags)
        return _STATUS[found]

    return step


def _select_packed(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    """MINPS, MAXPS: the first operand where it is less (greater), else the second."""
    cpu, maximum = form.cpu, "max" in form.insn.mnemonic
    careful = _careful_select(form, a, b, out)
    order = _Order(a, b)
    chosen = np.zeros(len(a), np.bool_)
    run = bracket(order.compute)
    flush = bracket(partial(np.multiply, out, np.ones_like(out), out))
    read, write, putmask = bind_mxcsr(cpu), cpu.registers.bank.write, np.putmask
    if run is None or flush is None:
        return lambda: careful(read())
    # a < b is not (a >= b), a > b is not (a <= b), where nothing is unordered
    refused = order.less_equal if maximum else order.greater_equal
    words, every = order.words, order.all
    choose = partial(np.logical_not, refused, chosen)
    second, raw = items(b).cast("B"), items(out).cast("B")
    numpys_own = partial(np.maximum if maximum else np.minimum, a, b, out=out)

    def step() -> None:
        mxcsr = read()
        flags = run(mxcsr)
        if words[0] | words[1] != every or mxcsr & MASKS != MASKS:
            careful(mxcsr)
            return
        if words[0] & words[1]:  # equal operands may be zeros of two signs
            raw[:] = second
            choose()
            putmask(out, chosen, a)
        else:
            numpys_own()
        if mxcsr & soft.DAZ:
            flush(mxcsr)  # what was a denormal operand comes out as zero
        if flags & ~mxcsr:
            write("mxcsr", mxcsr | flags)

    return step


def _careful_select(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Callable[[int], None]:
    reference = soft.maximum if "max" in form.insn.mnemonic else soft.minimum
    return bind_exact(form.cpu, each_lane(reference, FORMATS[a.itemsize], a, b), out)


def _select_scalar(form: Form, a: Lanes, b: Lanes, out: Lanes) -> Step:
    wanted = GREATER if "max" in form.insn.mnemonic else LESS
    careful, relation = _careful_select(form, a, b, out), _bind_relation(a, b)
    left, right, target = (items(bits_of(x)) for x in (a, b, out))

    def step() -> None:
        found = relation()
        if not found:
            careful(form.cpu.mxcsr)
        elif found == wanted:
            target[0] = left[0]
        else:
            target[0] = right[0]

    return step


COMPARISONS = [
    *family("cmp", 2, _compare_packed, float_forms.PACKED),
    *family("cmp", 2, _compare_scalar, float_forms.SCALAR),
    *(planned(f"{name}{suffix}", f"{lane},{lane}->flags", _to_flags, extent)
      for suffix, lane, extent in float_forms.SCALAR for name in ("comi", "ucomi")),
]  # fmt: skip

SELECTIONS = [
    operation
    for name in ("min", "max")
    for operation in (
        *family(name, 2, _select_packed, float_forms.PACKED, staged=True),
        *family(name, 2, _select_scalar, float_forms.SCALAR),
    )
]
