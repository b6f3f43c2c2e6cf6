"""The dispatch of the handler tier: from a trapped instruction to what its handlers say.

Instructions are bound once: :class:`Tier` keeps, by the instruction's bytes, a single action that
tries the handlers in the order of their packs. What an action costs beyond the handler itself is
one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeAlias

from iced_x86 import Instruction, OpCodeInfo

from sandbox.cpu import Cpu
from sandbox.decode import FORM_NAMES, MNEMONIC_NAMES, DecodeError, Insn, decode
from sandbox.errors import HandlerError, HandlerTimeoutError
from sandbox.handler import Action, Decline, Handler, Pack, Verdict
from sandbox.lowering import Lowering


class HandlerTimeout(BaseException):
    """Raised inside a handler that has run past the deadline. Not an Exception, so that a
    handler's own ``except Exception`` does not swallow it."""


def handler_error(handlers: tuple[Handler, ...], insn: Insn, error: BaseException) -> HandlerError:
    """The report of an error that a handler had no right to raise."""
    names = " or ".join(handler.name for handler in handlers)
    what = f"'{insn.text()}' ({insn.raw.hex(' ')})"
    reason = " ".join(f"{type(error).__name__}: {error}".split())  # one line
    return HandlerError(f"handler {names} failed on {what}: {reason}")


def timeout_error(handlers: tuple[Handler, ...], insn: Insn) -> HandlerTimeoutError:
    """The report of a handler that had to be interrupted."""
    names = " or ".join(handler.name for handler in handlers)
    what = f"'{insn.text()}' ({insn.raw.hex(' ')})"
    return HandlerTimeoutError(f"handler {names} was still running on {what} after the timeout")


def lowering_of(handler: Handler, insn: Insn, *, host: bool) -> Lowering | None:
    """How ``insn`` may be done without ``handler``, which emulates it. ``host``: whether the host's
    CPU may be used at all."""
    rule, on_host = handler.lowering(insn), host and handler.on_host(insn)
    return Lowering(rule, on_host) if rule is not None or on_host else None


@dataclass(slots=True)
class Tally:
    """What the tier did with one mnemonic."""

    count: int = 0
    handler: str = ""


@dataclass(frozen=True, slots=True)
class Bound:
    """An instruction with its handlers: ``run`` gives a verdict, Decline if there is none."""

    insn: Insn
    run: Action
    handlers: tuple[Handler, ...]
    tally: Tally
    rip_mask: int


_Rank: TypeAlias = tuple[int, int]
"""Number of the pack, and of the handler in it."""


class HandlerTable:
    """Handlers of several packs, found by mnemonic, form or bytes, in the order of the packs.

    A pack may be deferred: it is loaded when the first instruction is looked up, since importing
    some hundred handlers is most of the start-up time of a guest that needs none.
    """

    def __init__(self, packs: Iterable[Pack] = ()) -> None:
        self.on_load: Callable[[], None] | None = None
        """Called once deferred packs have been loaded, before any of their handlers is used."""
        self._deferred: list[tuple[int, Callable[[], Pack]]] = []
        self._by_mnemonic: dict[str, list[tuple[_Rank, Handler]]] = {}
        self._by_form: dict[str, list[tuple[_Rank, Handler]]] = {}
        self._by_pattern: list[tuple[_Rank, Handler]] = []
        self._count = 0
        for pack in packs:
            self.add(pack)

    def __bool__(self) -> bool:
        """Whether any pack is installed."""
        return self._count > 0

    def add(self, pack: Pack) -> None:
        """Install ``pack`` after those that are there."""
        self._add(self._count, pack)
        self._count += 1

    def defer(self, load: Callable[[], Pack]) -> None:
        """Install what ``load`` returns after those that are there, when it is needed. It must not
        hold byte patterns or take instructions that stop the machine (HLT, IN, OUT, INT)."""
        self._deferred.append((self._count, load))
        self._count += 1

    @property
    def loaded(self) -> bool:
        """Whether no pack is deferred (any more)."""
        return not self._deferred

    def load(self) -> None:
        """Load the deferred packs now."""
        if self._deferred:
            deferred, self._deferred = self._deferred, []
            for number, load in deferred:
                self._add(number, load())
            if self.on_load is not None:
                self.on_load()

    def _add(self, number: int, pack: Pack) -> None:
        for position, handler in enumerate(pack.handlers):
            entry = ((number, position), handler)
            for mnemonic in handler.mnemonics:
                self._by_mnemonic.setdefault(mnemonic, []).append(entry)
            for form in handler.forms:
                self._by_form.setdefault(form, []).append(entry)
            if handler.patterns:
                self._by_pattern.append(entry)

    def find(self, insn: Insn) -> list[Handler]:
        """The handlers that ask for ``insn``, in order."""
        self.load()
        return self.find_loaded(insn)

    def find_loaded(self, insn: Insn) -> list[Handler]:
        """The same without those of deferred packs."""
        found = [*self._by_mnemonic.get(insn.mnemonic, ()), *self._by_form.get(insn.form, ())]
        found += [
            (rank, handler)
            for rank, handler in self._by_pattern
            if any(pattern.matches(insn.raw) for pattern in handler.patterns)
        ]
        return [handler for _rank, handler in sorted(found, key=lambda entry: entry[0])]

    def takes(self, code: int) -> bool:
        """Whether a handler says that it emulates this form (an iced-x86 ``Code``)."""
        self.load()
        if FORM_NAMES[code] in self._by_form:
            return True
        info = OpCodeInfo(code)  # type: ignore[arg-type]
        asked = self._by_mnemonic.get(MNEMONIC_NAMES[info.mnemonic], ())
        return any(info.encoding in handler.encodings for _rank, handler in asked)

    def pattern_length(self, data: bytes) -> int:
        """Length of the longest byte pattern that ``data`` starts with; 0 if there is none."""
        return max(
            (
                pattern.length
                for _rank, handler in self._by_pattern
                for pattern in handler.patterns
                if pattern.matches(data)
            ),
            default=0,
        )


@dataclass(slots=True)
class Tier:
    """The handlers of one vCPU, bound as instructions are met."""

    cpu: Cpu
    table: HandlerTable
    tallies: dict[str, Tally] = field(default_factory=dict)
    _bound: dict[tuple[bytes, int], Bound] = field(default_factory=dict)

    def bind(self, insn: Insn) -> Bound:
        """``insn`` with its handlers; the same object for the same bytes."""
        key = (insn.raw, insn.bitness)
        found = self._bound.get(key)
        if found is None:
            found = self._bound[key] = self._make(insn)
        return found

    def bound(self, insn: Insn, action: Action) -> Bound:
        """``insn`` with an action of the machine's own."""
        tally = self.tallies.setdefault(insn.mnemonic, Tally())
        return Bound(insn, action, (), tally, (1 << insn.bitness) - 1)

    def _make(self, insn: Insn) -> Bound:
        handlers, actions = [], []
        for handler in self.table.find(insn):
            try:
                action = handler.bind(self.cpu, insn)
            except Exception as error:
                raise handler_error((handler,), insn, error) from error
            if action is not None:
                handlers.append(handler)
                actions.append(action if handler.restartable else self.cpu.transaction(action))
        name = insn.mnemonic if insn.code else insn.raw.hex(" ")
        tally = self.tallies.setdefault(name, Tally())
        if handlers:
            tally.handler = handlers[0].name
        return Bound(insn, _in_turn(actions), tuple(handlers), tally, (1 << insn.bitness) - 1)

    def decode(self, data: bytes, bitness: int) -> Insn | None:
        """Decode ``data``, or make an instruction of the bytes that a handler's pattern matches.

        None if the bytes are neither.
        """
        length = self.table.pattern_length(data)
        insn: Insn | None = None
        with suppress(DecodeError):
            insn = decode(data, bitness)
        if length and (insn is None or insn.length < length):
            return Insn(data[:length], bitness, insn.iced if insn else Instruction())
        return insn


def _in_turn(actions: list[Action]) -> Action:
    """Ask one after the other, until one does not decline."""
    if not actions:
        return Decline
    if len(actions) == 1:
        return actions[0]

    def run() -> Verdict | None:
        for action in actions:
            verdict = action()
            if not isinstance(verdict, Decline):
                return verdict
        return Decline()

    return run
