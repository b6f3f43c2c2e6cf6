"""Compare x87 handlers with the host CPU: operands of all kinds, all control words, all stacks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

from sandbox.cases import Cases
from sandbox.conformance import Outcome
from sandbox.decode import Insn, decode
from sandbox.native import NativeCpu, Result, State
from tests.differential import HandlerSubject, native_reason
from tests.test_known_wrong import is_amd

C0, C1, C2, C3 = 0x100, 0x200, 0x400, 0x4000
C023 = C0 | C2 | C3
PE = 0x20
ES_B = 0x8080

BIAS, TOP = 0x3FFF, 0x7FFF
_INTEGER = 1 << 63
ZERO, ONE, INFINITY = 0, BIAS << 64 | _INTEGER, TOP << 64 | _INTEGER
NEGATIVE = 1 << 79
SPECIAL = [
    ZERO, ONE, INFINITY,
    1, _INTEGER - 1, 0x123456789ABCDE,  # denormals
    _INTEGER, _INTEGER | 5,  # pseudo-denormals
    1 << 64 | _INTEGER, 1 << 64 | _INTEGER | 1,
    0x7FFE << 64 | (1 << 64) - 1, 0x7FFE << 64 | _INTEGER,
    TOP << 64 | _INTEGER | 1, TOP << 64 | _INTEGER | 1 << 40,  # signaling NaNs
    TOP << 64 | 3 << 62, TOP << 64 | 3 << 62 | 77, TOP << 64 | (1 << 64) - 1,
    TOP << 64, TOP << 64 | 99, 0x4000 << 64 | 1, 0x1000 << 64,  # unsupported
    ONE + 1, ONE - (1 << 64) | (1 << 64) - 1, ONE + (1 << 64), ONE | 1 << 62,
    0x3FFE << 64 | _INTEGER,
]  # fmt: skip
SPECIAL += [a | NEGATIVE for a in SPECIAL]


def random_value(rng: random.Random) -> int:
    """A register: special, near one, with a short significand, of any exponent."""
    kind = rng.randrange(10)
    if kind < 3:
        return rng.choice(SPECIAL)
    sign = rng.getrandbits(1) << 79
    fraction = rng.getrandbits(63)
    if kind in (4, 7):
        fraction &= -1 << rng.randrange(63)
    exponent = BIAS + rng.randrange(-70, 71)
    if kind == 5:
        exponent = BIAS + rng.randrange(-3, 4)
    if kind == 8:
        exponent = rng.choice((rng.randrange(1, 80), TOP - rng.randrange(1, 80)))
    if kind == 9:
        exponent = rng.randrange(1, TOP)
    return sign | exponent << 64 | _INTEGER | fraction


def full_tags(state: State, empty: int) -> int:
    """The tag word of ``state`` where the physical registers in ``empty`` are empty."""
    word = 0
    for number in range(8):
        word |= (3 if empty >> number & 1 else 0) << 2 * number
    return word


def states(
    insn: Insn, count: int, *, masked: int = 0, seed: int = 0, faults: bool = True
) -> list[State]:
    """Random states of the x87 unit and of the memory operand; ``masked`` exceptions always are."""
    cases = Cases(insn, seed, faults)
    rng = random.Random(f"{insn.raw.hex()} x87 {seed}")
    found = cases.take(count)
    for state in found:
        state.st = [random_value(rng) for _ in range(8)]
        if rng.random() < 0.1:
            state.st[1] = state.st[0] ^ (rng.getrandbits(1) << 79)
        state.fpcw = 0x7F | rng.choice((0, 2, 3)) << 8 | rng.randrange(4) << 10
        if rng.random() < 0.4:
            state.fpcw &= ~rng.getrandbits(6) | 0x40 | masked
        state.fpsw = rng.randrange(8) << 11 | rng.choice(
            (0, 0, 0x4700, C1, rng.getrandbits(3) << 8)
        )
        if rng.random() < 0.2:
            state.fpsw |= rng.getrandbits(7)
            if state.fpsw & ~state.fpcw & 0x3F:
                state.fpsw |= ES_B
        empty = rng.choice((0, 0, 0, 0x80, 1, 0xFF, rng.getrandbits(8), 0x81, 3, 0xFE, 0xFC))
        top = state.fpsw >> 11 & 7
        state.fptag = full_tags(state, (empty << top | empty >> 8 - top) & 0xFF)
    return found


View = dict[str, object]


def view(state: State, fault: Any, mask: int, insn: Insn) -> View:
    """What an x87 instruction may change; of the tags which registers are empty."""
    return {
        "fault": None if fault is None else fault.vector,
        "fpsw": hex(state.fpsw & mask),
        "fpcw": hex(state.fpcw),
        "empty": [state.fptag >> 2 * n & 3 == 3 for n in range(8)],
        "st": [hex(a) for a in state.st],
        "memory": state.memory,
        "gpr": state.gpr,
        "rflags": hex(state.rflags & 0x8D5),
    }


Undefined = Callable[[State], int]


def differences(
    code: str | bytes,
    handlers: Any,
    given: Sequence[State],
    undefined: int | Undefined = 0,
    ulps: int = 0,
) -> list[str]:
    """One text for each state on which handlers and host differ.

    ``undefined``: bits of the status word not to compare. ``ulps``: how far registers may differ.
    """
    insn = decode(bytes.fromhex(code) if isinstance(code, str) else code, 64)
    subject = HandlerSubject(handlers)
    results = NativeCpu.shared().run_batch([(insn.raw, state) for state in given])
    found: list[str] = []
    for state, native in zip(given, results, strict=True):
        ignored = undefined(state) if callable(undefined) else undefined
        ours = subject.run(insn, state)
        for number in range(8):
            a, b = native.state.st[number], ours.state.st[number]
            if (a ^ b) >> 79 == 0 and abs(_ordinal(a) - _ordinal(b)) <= ulps:
                ours.state.st[number] = a
        found += _difference(insn, state, native, ours, ~ignored)
    return found


def _ordinal(a: int) -> int:
    """Magnitudes in a row: without the integer bit."""
    return (a >> 64 & TOP) << 63 | a & _INTEGER - 1


def _difference(
    insn: Insn, before: State, native: Result, ours: Outcome, mask: int
) -> Iterable[str]:
    if native.crashed:
        yield "the native worker crashed"
        return
    want = view(native.state, native.fault, mask, insn)
    got = view(ours.state, ours.fault, mask, insn)
    if want == got:
        return
    text = f"{insn.text()}: st {before.st[0]:020x} {before.st[1]:020x} fpcw {before.fpcw:#x} "
    text += f"fpsw {before.fpsw:#x} tags {before.fptag:#x} rflags {before.rflags:#x}"
    for name in want:
        if want[name] != got[name] and name != "memory":
            text += f"\n  {name}: native {want[name]}\n  {' ' * len(name)}  ours   {got[name]}"
        elif want[name] != got[name]:
            a, b = native.state.memory, ours.state.memory
            at = next(n for n in range(len(a)) if a[n] != b[n]) & ~15
            text += f"\n  memory: native {a[at : at + 32].hex()}\n  ours: {b[at : at + 32].hex()}"
    yield text


def _reason() -> str:
    """Why the host is no oracle: beside what the manual defines, states are compared in what it
    leaves open (undefined condition codes, out-of-range operands, steps of FPREM), where the
    handlers do as AMD's processors do."""
    if native_reason():
        return native_reason()
    return "" if is_amd() else "what the manual leaves open differs between processors"


needs_host = pytest.mark.skipif(bool(_reason()), reason=_reason())


def assert_same(
    code: str,
    handlers: Any,
    count: int = 400,
    undefined: int | Undefined = 0,
    ulps: int = 0,
    **options: Any,
) -> None:
    """Fail with the first difference between handlers and host."""
    insn = decode(bytes.fromhex(code), 64)
    found = differences(code, handlers, states(insn, count, **options), undefined, ulps)
    assert not found, f"{len(found)} of {count} differ:\n{found[0]}"
