"""Floating-point handlers against answers recorded from a CPU, for hosts that cannot be asked.

``python -m tests.test_float_golden`` records them anew (AMD Zen 4 when this was written). A line
is: instruction, MXCSR and XMM1-3 before (RAX is the low half of XMM3); RAX, RFLAGS, MXCSR, XMM1
after, and the vector of the exception or a dash; all hexadecimal.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

from sandbox.cases import Cases
from sandbox.decode import FORM_NAMES, decode
from sandbox.encodings import encode, kinds_of
from sandbox.native import NativeCpu, State
from sandbox.registers import AF, CF, OF, PF, RAX, SF, ZF
from tests.differential import HandlerSubject
from tests.float_sweep import FAMILIES, forms

GOLDEN = Path(__file__).parent / "data" / "float_golden.txt"
STATUS = CF | PF | AF | ZF | SF | OF
MODULES = [importlib.import_module(f"handlers.float_{family}") for family in FAMILIES]


def state_of(mxcsr: str, *registers: str) -> State:
    state = State(mxcsr=int(mxcsr, 16))
    for number, data in enumerate(registers, 1):
        state.set_vector(number, bytes.fromhex(data))
    state.gpr[RAX] = int.from_bytes(state.vector(3, 8), "little")
    return state


def answer(state: State, fault: int | None) -> str:
    after = f"{state.gpr[RAX]:x} {state.rflags & STATUS:x} {state.mxcsr:x}"
    return f"{after} {state.vector(1, 16).hex()} {'-' if fault is None else f'{fault:x}'}"


def lines() -> list[str]:
    return GOLDEN.read_text().splitlines()


def test_handlers_give_the_recorded_answers() -> None:
    subject = HandlerSubject(MODULES)
    for line in lines():
        code, mxcsr, *registers = line.split()[:5]
        outcome = subject.run(decode(bytes.fromhex(code), 64), state_of(mxcsr, *registers))
        got = answer(outcome.state, outcome.fault.vector if outcome.fault else None)
        assert line == f"{code} {mxcsr} {' '.join(registers)} {got}"


def record(inputs: list[list[str]]) -> Iterator[str]:
    cases = [(bytes.fromhex(code), state_of(*rest)) for code, *rest in inputs]
    for words, result in zip(inputs, NativeCpu.shared().run_batch(cases), strict=True):
        fault = result.fault.vector if result.fault else None
        yield f"{' '.join(words)} {answer(result.state, fault)}"


def new_inputs() -> Iterator[list[str]]:
    """Three states for each VEX.128 form on registers."""
    for module in MODULES:
        for code in forms(module):
            kinds = kinds_of(code)
            if not FORM_NAMES[code].startswith("VEX") or any("YMM" in k for k in kinds):
                continue
            gpr_first = kinds[0].startswith("R")
            registers = (0, 3) if gpr_first else (1, 2, 3) if len(kinds) > 2 else (1, 3)
            if kinds[-1].startswith("R"):
                registers = (1, 2, 0)
            for immediate in (0x31, 0xF2, 0x0D):
                raw = encode(code, registers, immediate=immediate)
                state = Cases(decode(raw, 64), immediate, faults=False).state()
                yield [
                    raw.hex(),
                    f"{state.mxcsr:x}",
                    *(state.vector(n, 16).hex() for n in (1, 2, 3)),
                ]


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text("".join(f"{line}\n" for line in record(list(new_inputs()))))
