"""Says for each instruction where it would run and why: ``sandbox explain``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from sandbox.decode import MAX_LENGTH, DecodeError, Insn, decode
from sandbox.policy import Policy, Rule, Unhandled

_UNHANDLED: dict[Unhandled, str] = {
    "inject": "none: #UD in the guest",
    "exit": "none: exit to the caller",
    "skip": "none: skipped",
}


@dataclass(frozen=True, slots=True)
class Line:
    """One instruction, or one byte that starts none (``insn`` None).

    ``allow``: the fast path runs it; otherwise ``handlers`` are asked in this order, and
    ``unhandled`` happens if there are none. ``rule`` None: no rule names the instruction.
    ``lowered``: the fast path does what the handler would, in other instructions.
    ``barred`` says why it is trapped whatever the rules say, if it is.
    """

    address: int
    raw: bytes
    insn: Insn | None
    allow: bool
    rule: Rule | None
    handlers: tuple[str, ...]
    unhandled: Unhandled
    barred: str = ""
    lowered: bool = False

    @property
    def text(self) -> str:
        """Disassembly for people."""
        return self.insn.text(self.address) if self.insn else "(no instruction)"

    @property
    def features(self) -> tuple[str, ...]:
        """CPUID features that the instruction needs."""
        return self.insn.features if self.insn else ()

    @property
    def where(self) -> str:
        """Which tier takes it."""
        return "fast path" if self.allow else "lowered" if self.lowered else "trap"

    @property
    def taker(self) -> str:
        """Who emulates a trapped instruction, or one that is lowered and faults; empty on the fast
        path."""
        if self.allow:
            return ""
        return ", ".join(self.handlers) or _UNHANDLED[self.unhandled]

    @property
    def why(self) -> str:
        """The rule that decided: file, line and its comment."""
        if self.insn is None:
            return "bytes that do not decode are never allowed"
        if self.barred:
            return self.barred
        if self.rule is None:
            return "no rule allows it"
        return f"{self.rule} {self.rule.comment}".rstrip()


def plain_decode(data: bytes, bitness: int) -> Insn | None:
    """The instruction that ``data`` begins with; None if it begins with none."""
    try:
        return decode(data, bitness)
    except DecodeError:
        return None


def explain(
    data: bytes,
    bitness: int,
    policy: Policy,
    resolve: Callable[[Insn], Iterable[str]],
    address: int = 0,
    *,
    decode: Callable[[bytes, int], Insn | None] = plain_decode,
    bar: Callable[[Insn], str] = lambda _insn: "",
    lowers: Callable[[Insn], bool] = lambda _insn: False,
) -> Iterator[Line]:
    """Go through ``data`` instruction by instruction, as if it stood at ``address``.

    ``resolve`` gives the names of the handlers of an instruction, ``bar`` why it is trapped
    whatever the rules say ("" if they decide), ``decode`` the instruction that bytes begin with,
    ``lowers`` whether a trapped one is lowered.
    Where nothing decodes, one byte is shown and skipped.
    """
    at = 0
    while at < len(data):
        insn = decode(data[at : at + MAX_LENGTH], bitness)
        if insn is None:
            raw = data[at : at + 1]
            yield Line(address + at, raw, None, False, None, (), policy.unhandled)
        else:
            raw, decision, barred = insn.raw, policy.decide(insn), bar(insn)
            allow = decision.allow and not barred
            handlers = () if allow else tuple(resolve(insn))
            lowered = not allow and lowers(insn)
            yield Line(
                address + at, raw, insn, allow, decision.rule, handlers, policy.unhandled, barred,
                lowered,
            )  # fmt: skip
        at += len(raw)


def parse_hex(text: str) -> bytes:
    """``"c5 f5 fe c2"``, ``"c5f5fec2"``, ``"0xc5,0xf5"`` or ``"\\xc5\\xf5"`` as bytes.

    ValueError says what is wrong.
    """
    digits = text.lower().replace("0x", " ").replace("\\x", " ").replace(",", " ")
    try:
        data = bytes.fromhex(digits)
    except ValueError:
        raise ValueError(f"{text!r} is neither a file nor bytes in hex") from None
    if not data:
        raise ValueError("no bytes to explain")
    return data


_TITLES = ("address", "bytes", "len", "instruction", "feature", "runs on", "handler", "why")


def table(lines: Iterable[Line]) -> Iterator[str]:
    """The lines as a table for people, a title first."""
    rows = [_TITLES, *(_row(line) for line in lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()


def _row(line: Line) -> tuple[str, ...]:
    return (
        f"{line.address:#x}",
        line.raw.hex(" "),
        str(len(line.raw)),
        line.text,
        "+".join(line.features),
        line.where,
        line.taker,
        line.why,
    )
