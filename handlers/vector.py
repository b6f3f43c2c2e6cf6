"""How vector instructions are declared: once per operation, all forms from the decoder.

An operation has names, a *signature* and a function on NumPy lanes. The function writes its
result into ``out``; the binder supplies the views::

    PADD = lanewise("paddd", "u4,u4->u4", np.add)

This one line serves ``paddd xmm, xmm/m128`` (upper lanes kept), ``vpaddd xmm, xmm, xmm/m128`` and
``vpaddd ymm, ymm, ymm/m256`` (zeroed above). A name with a leading ``v`` has no legacy form.

The signature names the lane type of each source operand and of the destination, in Intel order:
``u i f`` and the bytes per lane, ``*`` for "as wide as the operand", ``x4`` to get the lanes in
rows of four, ``b`` for a plain ``memoryview`` of bytes. The sources are the *last* operands of
the instruction, so a legacy two-operand form has its destination as first source, and so has a
three-operand FMA. ``->flags``: the function returns the new status flags (CF PF AF ZF SF OF).

What the views span is the operation's extent:

- :func:`lanewise`: lane i of the result comes from lane i of the sources; as many lanes as the
  shortest operand has (``vpmovzxbw ymm, xmm``; ``vcvtpd2ps xmm, ymm``), the rest is zeroed.
- :func:`scalar`: lane 0 only; the lanes above it, to bit 127, are those of the first source
  register.
- :func:`whole`: each operand entire.

When the immediate or another fact of the form matters, or views have to be cut, the
:func:`operation` decorator declares a function that is called at bind time with the
:class:`~handlers.operands.Form` and the views, and returns the function to run each time. A whole
instruction of AVX-VNNI::

    @operation("vpdpbusd", "i4,u1,i1->i4", Extent.WHOLE)
    def vpdpbusd(form, total, a, b, out):
        def step():
            products = a.astype("i4") * b
            np.add(total, products.reshape(-1, 4).sum(1), out)

        return step

``out`` may be the very memory of a source (NumPy's ufuncs cope with that). With ``staged`` it is
a buffer of its own, which is copied to the destination afterwards; nothing is written if the
function raises. :func:`whole` operations and all stores are staged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from typing import Any

from iced_x86 import EncodingKind

from handlers.lowered import rule_of
from handlers.operands import Form, Place, Step, UnsupportedFormError, scratch
from handlers.signature import LaneType, Signature
from sandbox.cpu import Cpu
from sandbox.decode import Insn
from sandbox.handler import Action, Handler
from sandbox.lowering import Rule
from sandbox.registers import AF, CF, OF, PF, SF, VECTOR_BYTES, ZF

STATUS_FLAGS = CF | PF | AF | ZF | SF | OF
_SERVED = frozenset((EncodingKind.LEGACY, EncodingKind.VEX, EncodingKind.XOP))

Plan = Callable[..., Step]
"""``plan(form, *source_views, out) -> step``, called at bind time (no ``out`` for flags)."""


class Extent(Enum):
    """How much of each operand the function sees; see the module's text."""

    LANEWISE = auto()
    SCALAR = auto()
    WHOLE = auto()


@dataclass(eq=False)
class Operation(Handler):
    """A vector instruction, all its forms; see the module's text."""

    names: tuple[str, ...]
    signature: Signature
    plan: Plan
    extent: Extent
    staged: bool
    accepts: Callable[[Form], bool]

    def __post_init__(self) -> None:
        self.name = f"vector.{self.names[0]}"
        self.mnemonics = mnemonics_of(self.names)
        self.restartable = True

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        form = form_of(cpu, insn)
        if form is None or not self.accepts(form):
            return None
        sources = self._sources(form)
        if self.signature.destination is None:
            return self._bind_flags(form, sources)
        return self._bind_result(form, sources, self.signature.destination)

    def lowering(self, insn: Insn) -> Rule | None:
        return rule_of(insn)

    def on_host(self, insn: Insn) -> bool:
        return True

    def _sources(self, form: Form) -> list[Place]:
        """The last operands; ``pblendvb`` and its like have XMM0 as one that is not spelled."""
        arity = len(self.signature.sources)
        places = [*form.places, form.vector(0, 16)] if form.legacy else form.places
        first = max(0, len(form.places) - arity)
        return places[first : first + arity]

    def _bind_flags(self, form: Form, sources: list[Place]) -> Action:
        counts = self._counts(list(zip(self.signature.sources, sources, strict=True)))
        compute = self.plan(form, *self._views(sources, counts))
        cpu, guard = form.cpu, form.bind_guard()
        load = form.bind_load() if form.memory else _nothing

        def action() -> None:
            guard()
            load()
            cpu.rflags = cpu.rflags & ~STATUS_FLAGS | compute()

        return action

    def _bind_result(self, form: Form, sources: list[Place], lane: LaneType) -> Action:
        target = form.places[0]
        pairs = [*zip(self.signature.sources, sources, strict=True), (lane, target)]
        counts = self._counts(pairs)
        direct = not (self.staged or target.is_memory or target.is_gpr)
        out = target if direct else scratch(VECTOR_BYTES, target.size)
        views = self._views(sources, counts)
        compute = self.plan(form, *views, lane.view(out, counts[-1]))
        written = counts[-1] * lane.width(target)
        guard = form.bind_guard()
        load = form.bind_load() if form.memory and not target.is_memory else None
        if target.is_memory:
            return _storing(form, guard, compute, out.bytes(form.memory_size))
        if self.extent is Extent.SCALAR and not target.is_gpr:
            merges = not form.legacy and len(form.places) > len(sources)
            upper = form.places[1] if merges else target
            return _merging(form, guard, load, compute, out, upper, written)
        if direct:
            return _zeroing(form, guard, load, compute, written)
        return _committing(form, guard, load, compute, out)

    def _counts(self, pairs: Sequence[tuple[LaneType, Place]]) -> list[int]:
        """How many lanes of each operand the function sees."""
        if self.extent is Extent.SCALAR:
            return [1] * len(pairs)
        counts = [place.size // lane.width(place) for lane, place in pairs]
        return [min(counts)] * len(counts) if self.extent is Extent.LANEWISE else counts

    def _views(self, sources: list[Place], counts: list[int]) -> list[Any]:
        items = zip(self.signature.sources, sources, counts, strict=False)
        return [lane.view(place, count) for lane, place, count in items]


def form_of(cpu: Cpu, insn: Insn) -> Form | None:
    """The form of ``insn``; None if its encoding or its operands are none of ours."""
    if insn.iced.encoding not in _SERVED:
        return None
    try:
        return Form(cpu, insn)
    except UnsupportedFormError:
        return None


def mnemonics_of(names: Sequence[str]) -> tuple[str, ...]:
    """``paddd`` stands for ``paddd`` and ``vpaddd``; ``vpsllvd`` for itself."""
    return tuple(m for n in names for m in ((n,) if n.startswith("v") else (n, f"v{n}")))


def end_of_write(form: Form) -> int:
    """Bytes of the destination register that the form defines: zeroed beyond its result."""
    if form.places[0].is_gpr:
        return 8
    return 16 if form.legacy else VECTOR_BYTES


def _nothing() -> None:
    pass


def _zeroing(form: Form, guard: Step, load: Step | None, compute: Step, written: int) -> Action:
    """The result is computed in the register itself; zero what lies above."""
    target, end = form.places[0], end_of_write(form)
    raw, above = target.raw, slice(target.offset + written, target.offset + end)
    zeros = bytes(end - written)
    if load is None:

        def action() -> None:
            guard()
            compute()
            raw[above] = zeros

        return action

    def action_load() -> None:
        guard()
        load()
        compute()
        raw[above] = zeros

    return action_load


def _committing(form: Form, guard: Step, load: Step | None, compute: Step, out: Place) -> Action:
    """The result is computed in ``out``, whose upper bytes stay zero; copy it all."""
    target, end = form.places[0], end_of_write(form)
    raw, span = target.raw, slice(target.offset, target.offset + end)
    staged = out.bytes(end)
    if load is None:

        def action() -> None:
            guard()
            compute()
            raw[span] = staged

        return action

    def action_load() -> None:
        guard()
        load()
        compute()
        raw[span] = staged

    return action_load


def _merging(
    form: Form,
    guard: Step,
    load: Step | None,
    compute: Step,
    out: Place,
    upper: Place,
    written: int,
) -> Action:
    """Lane 0 is computed; the bytes above it to bit 127 come from ``upper``."""
    target, end = form.places[0], end_of_write(form)
    first = load or _nothing
    rest = slice(target.offset + written, target.offset + 16)
    source = upper.raw[upper.offset + written : upper.offset + 16]
    above, zeros = slice(target.offset + 16, target.offset + end), bytes(end - 16)
    raw = target.raw
    if out is target:

        def action() -> None:
            guard()
            first()
            compute()
            raw[rest] = source
            raw[above] = zeros

        return action
    low, staged = slice(target.offset, target.offset + written), out.bytes(written)

    def action_staged() -> None:
        guard()
        first()
        compute()
        raw[low] = staged
        raw[rest] = source
        raw[above] = zeros

    return action_staged


def _storing(form: Form, guard: Step, compute: Step, staged: memoryview) -> Action:
    """The result goes to memory; the write is checked before the function runs."""
    address, write, check_write = form.bind_address(), form.cpu.write, form.cpu.check_write
    size = len(staged)

    def action() -> None:
        guard()
        at = address()
        check_write(at, size)
        compute()
        write(at, bytes(staged))

    return action


def applied(function: Callable[..., Any]) -> Plan:
    """The plan that calls ``function(*sources, out)``."""
    return lambda form, *views: partial(function, *views)


def any_form(form: Form) -> bool:
    """All forms (for ``accepts``)."""
    return True


def lanewise(
    names: str, signature: str, function: Callable[..., Any], *, staged: bool = False
) -> Operation:
    """Declare an operation on corresponding lanes: ``function(*sources, out)``."""
    return _declare(names, signature, applied(function), Extent.LANEWISE, staged)


def scalar(
    names: str, signature: str, function: Callable[..., Any], *, staged: bool = False
) -> Operation:
    """Declare an operation on lane 0; the views have shape (1,)."""
    return _declare(names, signature, applied(function), Extent.SCALAR, staged)


def whole(names: str, signature: str, function: Callable[..., Any]) -> Operation:
    """Declare an operation on entire operands; ``out`` is a buffer of its own."""
    return _declare(names, signature, applied(function), Extent.WHOLE, True)


def operation(
    names: str,
    signature: str,
    extent: Extent = Extent.LANEWISE,
    *,
    staged: bool = False,
    accepts: Callable[[Form], bool] = any_form,
) -> Callable[[Plan], Operation]:
    """Declare an operation by its plan: ``plan(form, *sources, out) -> step``, at bind time."""

    def decorate(plan: Plan) -> Operation:
        return _declare(names, signature, plan, extent, staged, accepts)

    return decorate


def planned(
    names: str,
    signature: str,
    plan: Plan,
    extent: Extent = Extent.LANEWISE,
    *,
    staged: bool = False,
    accepts: Callable[[Form], bool] = any_form,
) -> Operation:
    """:func:`operation` as a plain call, for tables of operations that share a plan."""
    return _declare(names, signature, plan, extent, staged, accepts)


def _declare(
    names: str,
    signature: str,
    plan: Plan,
    extent: Extent,
    staged: bool,
    accepts: Callable[[Form], bool] = any_form,
) -> Operation:
    return Operation(
        tuple(names.split()),
        Signature.parse(signature),
        plan,
        extent,
        staged or extent is Extent.WHOLE,
        accepts,
    )


def has_memory(form: Form) -> bool:
    """Whether the form has a memory operand (for ``accepts``)."""
    return form.memory is not None


def registers_only(form: Form) -> bool:
    """Whether the form has no memory operand (for ``accepts``)."""
    return form.memory is None


def stores(form: Form) -> bool:
    """Whether the destination is memory (for ``accepts``)."""
    return form.memory_is_destination


def loads(form: Form) -> bool:
    """Whether the form has a memory operand that is not the destination (for ``accepts``)."""
    return form.memory is not None and not form.memory_is_destination


def immediate(form: Form) -> bool:
    """Whether the form has an immediate byte (for ``accepts``)."""
    return form.has_immediate


def no_immediate(form: Form) -> bool:
    """Whether the form has no immediate byte (for ``accepts``)."""
    return not form.has_immediate
