"""The surface that handlers are written against: verdicts, registration, packs.

A handler is bound once per instruction and called each time the instruction is met::

    @handler("movbe")
    def movbe(cpu, insn):
        ...                       # read everything, then write

    @handler(pattern="0f 3f ????")
    def mine(cpu, insn): ...

What it returns is the verdict: ``None`` is :class:`Resume`. What it raises as
:class:`~sandbox.cpu.Fault` is delivered to the guest as that exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from iced_x86 import EncodingKind

if TYPE_CHECKING:
    from sandbox.cpu import Cpu
    from sandbox.decode import Insn
    from sandbox.lowering import Rule


@dataclass(frozen=True, slots=True)
class Resume:
    """The instruction is done; go on after it, or at ``rip`` if given."""

    rip: int | None = None


@dataclass(frozen=True, slots=True)
class Inject:
    """Deliver an exception at this instruction through the guest's own IDT."""

    vector: int
    error_code: int | None = None


@dataclass(frozen=True, slots=True)
class Decline:
    """Not mine: ask the next handler."""


@dataclass(frozen=True, slots=True)
class Exit:
    """Leave ``Vcpu.run()`` with ``exit``; None is the pending emulation_failure exit itself."""

    exit: Any = None


Verdict: TypeAlias = Resume | Inject | Decline | Exit
Action: TypeAlias = Callable[[], "Verdict | None"]
"""A handler bound to one instruction on one vCPU: no arguments, run at each execution."""


class Handler:
    """Something that emulates instructions. ``bind`` is called once per instruction and vCPU.

    ``mnemonics``, ``forms`` and ``patterns`` say for which instructions it is asked;
    a pattern is opcode bytes in hex, ``?`` for a nibble that may be anything.
    ``restartable``: the handler does all reads and checks before its first write, so that the
    dispatcher need not snapshot the registers to undo a partial write when it faults.
    """

    name: str = "?"
    restartable: bool = False
    mnemonics: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()
    patterns: tuple[BytePattern, ...] = ()
    encodings: frozenset[int] = frozenset(
        (EncodingKind.LEGACY, EncodingKind.VEX, EncodingKind.XOP, EncodingKind.D3NOW)
    )
    """Of its mnemonics, the encodings that it emulates: what CPUID tells the guest rests on it."""

    def bind(self, cpu: Cpu, insn: Insn) -> Action | None:
        """Return what to run for ``insn``, or None to decline it for good."""
        raise NotImplementedError

    def lowering(self, insn: Insn) -> Rule | None:
        """How the fast path may do what ``bind`` would, if it may: see :mod:`sandbox.lowering`."""
        return None

    def on_host(self, insn: Insn) -> bool:
        """Whether ``bind`` does what every CPU does, so that the host's own may do it instead."""
        return False


@dataclass(frozen=True, slots=True)
class BytePattern:
    """Opcode bytes with wildcards: ``value`` under ``mask``, both ``length`` bytes big-endian.

    The pattern's length is the instruction's length, unless a longer one is given.
    """

    value: int
    mask: int
    length: int

    @classmethod
    def parse(cls, text: str) -> BytePattern:
        """``"0f 3f ??"`` or ``"0f3f??"``; ValueError says what is wrong."""
        digits = "".join(text.split()).lower()
        if not digits or len(digits) % 2 or len(digits) > 30:
            raise ValueError(f"byte pattern {text!r}: want 1 to 15 whole bytes in hex")
        bad = set(digits) - set("0123456789abcdef?")
        if bad:
            raise ValueError(f"byte pattern {text!r}: {min(bad)!r} is no hex digit or '?'")
        mask = "".join("0" if d == "?" else "f" for d in digits)
        return cls(int(digits.replace("?", "0"), 16), int(mask, 16), len(digits) // 2)

    def matches(self, data: bytes) -> bool:
        """Whether ``data`` starts with this pattern."""
        head = data[: self.length]
        return len(head) == self.length and (int.from_bytes(head, "big") & self.mask == self.value)


class FunctionHandler(Handler):
    """A plain function ``f(cpu, insn) -> Verdict | None`` as a handler."""

    def __init__(
        self,
        function: Callable[[Cpu, Insn], Verdict | None],
        mnemonics: Iterable[str] = (),
        forms: Iterable[str] = (),
        patterns: Iterable[str] = (),
        *,
        restartable: bool = False,
    ) -> None:
        self.function = function
        self.restartable = restartable
        self.name = f"{function.__module__}.{function.__qualname__}"
        self.mnemonics = tuple(mnemonics)
        self.forms = tuple(forms)
        self.patterns = tuple(BytePattern.parse(p) for p in patterns)
        if not (self.mnemonics or self.forms or self.patterns):
            raise ValueError(f"handler {self.name}: give a mnemonic, a form or a byte pattern")

    def bind(self, cpu: Cpu, insn: Insn) -> Action:
        return partial(self.function, cpu, insn)

    def __call__(self, cpu: Cpu, insn: Insn) -> Verdict | None:
        return self.function(cpu, insn)


def handler(
    *mnemonics: str,
    form: str | Iterable[str] = (),
    pattern: str | Iterable[str] = (),
    restartable: bool = False,
) -> Callable[[Callable[[Cpu, Insn], Verdict | None]], FunctionHandler]:
    """Make a function a handler, for mnemonics, exact forms (iced-x86 names) or byte patterns.

    ``restartable``: it writes nothing before its last check has passed (see :class:`Handler`).
    """
    forms = (form,) if isinstance(form, str) else tuple(form)
    patterns = (pattern,) if isinstance(pattern, str) else tuple(pattern)

    def decorate(function: Callable[[Cpu, Insn], Verdict | None]) -> FunctionHandler:
        return FunctionHandler(function, mnemonics, forms, patterns, restartable=restartable)

    return decorate


@dataclass(frozen=True, slots=True)
class Pack:
    """A named set of handlers, installed together, asked in order."""

    name: str
    handlers: tuple[Handler, ...]

    @classmethod
    def of(cls, name: str, *sources: Any) -> Pack:
        """Collect handlers: each source is a Handler, a Pack, a list of these, or a module."""
        return cls(name, tuple(_collect(sources)))


def _collect(sources: Iterable[Any]) -> Iterator[Handler]:
    for source in sources:
        if isinstance(source, Handler):
            yield source
        elif isinstance(source, Pack):
            yield from source.handlers
        elif isinstance(source, (list, tuple)):
            yield from _collect(source)
        else:
            public = (v for n, v in vars(source).items() if not n.startswith("_"))
            yield from _collect(v for v in public if isinstance(v, (Handler, list, tuple, Pack)))
