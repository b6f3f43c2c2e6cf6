"""FISTTP against the host CPU: value, status word, pop and faults."""

from __future__ import annotations

import pytest

from handlers import x87_store
from handlers.x87_store import SIZES, truncate
from sandbox.cases import Cases
from sandbox.conformance import Outcome
from sandbox.decode import decode
from sandbox.encodings import encode, form
from sandbox.native import NativeCpu, Result, State
from tests.differential import HandlerSubject, native_reason


def fpu_view(state: State, fault: tuple[int, int | None] | None) -> tuple[object, ...]:
    """What FISTTP may change. Of the tags only which registers are empty."""
    empty = [state.fptag >> 2 * n & 3 == 3 for n in range(8)]
    return state.memory, state.fpsw, empty, state.fpcw, fault


def by_host(result: Result) -> tuple[object, ...]:
    trap = result.fault
    return fpu_view(result.state, (trap.vector, trap.address) if trap else None)


def by_handler(outcome: Outcome) -> tuple[object, ...]:
    fault = outcome.fault
    return fpu_view(outcome.state, (fault.vector, fault.address) if fault else None)


@pytest.mark.skipif(bool(native_reason()), reason=native_reason())
@pytest.mark.parametrize("name", SIZES)
def test_fisttp_does_what_the_host_cpu_does(name: str) -> None:
    subject = HandlerSubject(x87_store)
    insn = decode(encode(form(name), memory=None), 64)
    states = Cases(insn).take(600)
    for number, state in enumerate(states):
        size = 8 * SIZES[name]
        near = 0x3FFF + size - 1 - number % 3  # around the largest that fits
        if number % 2:
            significand = 1 << 63 | (state.st[0] >> number % 40 & (1 << 63) - 1)
            state.st[0] = number % 4 // 2 << 79 | near << 64 | significand
        if number % 5 == 0:
            state.fptag = 3 << 2 * (state.fpsw >> 11 & 7)
        if number % 7 == 0:
            state.fpcw &= ~(0x21 if number % 2 else 0x20)
    results = NativeCpu.shared().run_batch([(insn.raw, state) for state in states])
    for state, result in zip(states, results, strict=True):
        assert by_handler(subject.run(insn, state)) == by_host(result), (
            state.st[0].to_bytes(10).hex()
        )


@pytest.mark.parametrize(
    ("value", "size", "want"),
    [
        (0x3FFF_8000000000000000, 2, (1, True)),
        (0xBFFF_C000000000000000, 2, (-1, False)),
        (0xC00E_8000000000000000, 2, (-0x8000, True)),
        (0x400E_8000000000000000, 2, (None, True)),
        (0xC00E_8000FFFFFFFFFFFF, 2, (-0x8000, False)),
        (0xC00E_8001000000000000, 2, (None, True)),
        (0x7FFF_8000000000000000, 8, (None, True)),
        (0x0000_0000000000000001, 8, (0, False)),
        (0x3FFF_0000000000000000, 8, (None, True)),
    ],
)
def test_truncation(value: int, size: int, want: tuple[int | None, bool]) -> None:
    assert truncate(value, size) == want
