"""Compare handlers with the host CPU. For all handler tests::

    from tests.differential import compare, sweep

    compare("c5f5fec2", ADDITIONS)                # hex, bytes or an Insn; 64 random states
    compare(insn, PACK, cases=500, flags=CF | ZF, faults=False, mxcsr=[0x1F80])
    sweep(PACK, "vpaddd", "vpsubd")               # all forms and encodings of the mnemonics
    sweep(PACK, "vpaddd", features=["AVX", "AVX2"])    # only the forms of these features

Both fail the test with the first difference: what differs, the instruction's bytes and text, and
the registers and memory that went in. They skip it, with the reason, where the host cannot run
the instruction. ``handlers`` is a Handler, a Pack, a list of these, or a module.

The random states (:mod:`sandbox.cases`) include operands in memory that fault, and, for float
instructions, all rounding modes, FTZ, DAZ and unmasked exceptions; ``faults=False`` and ``mxcsr=``
leave that out. Flags that the manual leaves undefined are not compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from sandbox.cases import Cases
from sandbox.conformance import Outcome, Verdict, check, not_comparable
from sandbox.conformance import sweep as _sweep
from sandbox.cpu import Cpu, Fault, is_canonical
from sandbox.decode import Insn, decode
from sandbox.encodings import features_of, forms_of
from sandbox.handler import Action, Decline, Handler, Inject, Pack
from sandbox.native import (
    CODE,
    READONLY,
    REGION,
    REGION_SIZE,
    NativeCpu,
    State,
    missing_features,
)
from sandbox.registers import Segment
from sandbox.xsave import full_tags
from tests.doubles import DictBank, FlatMemory, make_cpu


def native_reason() -> str:
    """Why the host CPU is no oracle here, or an empty string."""
    return NativeCpu.available() or ""


def resolve(handlers: Any, cpu: Cpu, insn: Insn) -> tuple[Handler, Action] | None:
    """The handler for ``insn``, as the dispatcher finds it: those for its exact form are asked
    first, then those for its mnemonic, then those whose byte pattern matches; the first one that
    does not decline at bind time is taken."""
    pack = Pack.of("tested", handlers)
    by_form = [h for h in pack.handlers if insn.form in h.forms]
    by_mnemonic = [h for h in pack.handlers if insn.mnemonic in h.mnemonics]
    by_pattern = [h for h in pack.handlers if any(p.matches(insn.raw) for p in h.patterns)]
    for handler in (*by_form, *by_mnemonic, *by_pattern):
        action = handler.bind(cpu, insn)
        if action is not None:
            return handler, action
    return None


class X87Bank(DictBank):
    """The x87 registers by physical number: ST is relative to TOP, MM their low 64 bits."""

    def __init__(self, bitness: int = 64, cpl: int = 0) -> None:
        super().__init__(bitness, cpl)
        self.values["cr0"] |= 0x20  # NE: errors of the x87 unit are #MF
        self.physical = [0] * 8

    def read(self, name: str) -> int:
        if name[:2] == "mm":
            return self.physical[int(name[2:])] & 0xFFFF_FFFF_FFFF_FFFF
        if name[:2] == "st" and name[2:].isdigit():
            return self.physical[self._at(name)]
        return super().read(name)

    def write(self, name: str, value: int) -> None:
        if name[:2] == "mm":
            self.physical[int(name[2:])] = 0xFFFF << 64 | value
        elif name[:2] == "st" and name[2:].isdigit():
            self.physical[self._at(name)] = value
        else:
            super().write(name, value)

    def _at(self, name: str) -> int:
        return (self.values.get("fpsw", 0) >> 11) + int(name[2:]) & 7


class UserMemory(FlatMemory):
    """The test memory as a program at CPL 3 sees it."""

    def __init__(self) -> None:
        super().__init__(REGION, REGION_SIZE)
        self.readonly = READONLY

    def _at(self, address: int, size: int, error_code: int) -> int:
        if not (is_canonical(address) and is_canonical(address + size - 1)):
            raise Fault(13, 0)
        return super()._at(address, size, error_code)


class HandlerSubject:
    """A set of handlers on a stand-in vCPU, as a :class:`sandbox.conformance.Subject`."""

    def __init__(self, handlers: Any) -> None:
        self.handlers = handlers
        self.memory = UserMemory()
        self.cpu = make_cpu(64, 3, self.memory)
        self.bank = X87Bank(64, 3)
        self.cpu.registers.bank = self.bank
        self.bank.segments |= {"cs": Segment(0x33), "ss": Segment(0x2B)}
        self.cpu.registers.xcr0 = 0xE7
        self.cpu.registers.rip = CODE
        self._bound: dict[bytes, tuple[Handler, Action] | None] = {}

    def bind(self, insn: Insn) -> tuple[Handler, Action] | None:
        if insn.raw not in self._bound:
            self._bound[insn.raw] = resolve(self.handlers, self.cpu, insn)
        return self._bound[insn.raw]

    def accepts(self, insn: Insn) -> bool:
        return self.bind(insn) is not None

    def run(self, insn: Insn, state: State) -> Outcome:
        bound = self.bind(insn)
        if bound is None:
            raise LookupError(f"no handler takes {insn!r}")
        handler, action = bound
        self._load(state)
        fault = None
        try:
            verdict = action()
        except Fault as raised:
            fault = raised
        else:
            if isinstance(verdict, Decline):
                raise LookupError(f"{handler.name} declined {insn!r} while it ran")
            if isinstance(verdict, Inject):
                fault = Fault(verdict.vector, verdict.error_code)
        if fault is not None and not handler.restartable:
            return Outcome(state, fault)  # the dispatcher would undo what was written
        return Outcome(self._store(state), fault)

    def _load(self, state: State) -> None:
        cpu, values = self.cpu, self.bank.values
        if self.bank.segments["gs"].base != state.gs_base:
            self.bank.segments["gs"] = Segment(base=state.gs_base)
        for number in range(16):
            cpu.gpr[number] = state.gpr[number]
        for number in range(8):
            cpu.opmask[number] = state.opmask[number]
        cpu.vec.raw[:] = state.vectors
        self.memory.data[:] = state.memory
        values.update(rflags=state.rflags, mxcsr=state.mxcsr)
        values.update(fpcw=state.fpcw, fpsw=state.fpsw, fptag=state.fptag)
        for number in range(8):
            self.bank.write(f"st{number}", state.st[number])

    def _store(self, before: State) -> State:
        cpu, values = self.cpu, self.bank.values
        memory: bytes = before.memory
        if self.memory.data != memory:
            memory = bytes(self.memory.data)
        stack = [self.bank.read(f"st{n}") for n in range(8)]
        tags = values["fptag"]
        if not tags:  # as MMX instructions leave it; the native worker tells what is in each
            tags = full_tags(0xFF, values["fpsw"] >> 11 & 7, stack)
        return State(
            gpr=cpu.gpr.tolist(),
            rflags=values["rflags"],
            mxcsr=values["mxcsr"],
            vectors=cpu.vec.raw.tobytes(),
            opmask=cpu.opmask.tolist(),
            st=stack,
            fpcw=values["fpcw"],
            fpsw=values["fpsw"],
            fptag=tags,
            gs_base=before.gs_base,
            memory=memory,
        )


def compare(
    insn: Insn | bytes | str,
    handlers: Any,
    *,
    cases: int = 64,
    flags: int | None = None,
    states: Sequence[State] | None = None,
    seed: int = 0,
    faults: bool = True,
    mxcsr: Sequence[int] | None = None,
) -> None:
    """Fail unless the handlers do to all states what the host CPU does. See the module's text.

    ``states`` replaces the random ones; ``flags`` are the RFLAGS bits to compare.
    """
    if isinstance(insn, str):
        insn = bytes.fromhex(insn)
    if isinstance(insn, bytes):
        insn = decode(insn, 64)
    _skip_unless_native()
    missing = missing_features(insn)
    if missing:
        pytest.skip(f"the host has no {', '.join(missing)}")
    reason = not_comparable(insn.form)
    assert reason is None, f"{insn.form}: {reason}"
    subject = handlers if isinstance(handlers, HandlerSubject) else HandlerSubject(handlers)
    assert subject.accepts(insn), f"no handler takes {insn!r}"
    if states is None:
        states = Cases(insn, seed, faults, mxcsr).take(cases)
    _require_equal(check(subject, insn, states, flags))


def sweep(
    handlers: Any,
    *mnemonics: str,
    forms: Iterable[int] = (),
    features: Iterable[str] | None = None,
    cases: int = 16,
    seed: int = 0,
    faults: bool = True,
    mxcsr: Sequence[int] | None = None,
) -> None:
    """Compare all encodings of the forms of ``mnemonics``, and of ``forms``; see the module's text.

    ``features`` leaves out the forms that need another CPUID feature. Every form must be taken
    by a handler; forms that the host lacks are passed over, and the test skips if none is left.
    """
    _skip_unless_native()
    allowed = None if features is None else set(features)
    chosen = [*(forms_of(*mnemonics) if mnemonics else ()), *forms]
    chosen = [c for c in chosen if allowed is None or features_of(c) <= allowed]
    assert chosen, "no form is left to compare"
    verdicts = list(_sweep(HandlerSubject(handlers), chosen, cases, seed, faults, mxcsr))
    ran = [v for v in verdicts if not v.skipped]
    for verdict in ran:
        assert not verdict.declined, f"no handler takes {verdict.form}: {min(verdict.declined)}"
        _require_equal(verdict)
    if not ran:
        pytest.skip(verdicts[0].skipped)


def _skip_unless_native() -> None:
    if native_reason():
        pytest.skip(native_reason())


def _require_equal(verdict: Verdict) -> None:
    if verdict.differences:
        counts = f"{verdict.form}: {verdict.differences} of {verdict.cases} cases differ"
        pytest.fail(f"{counts}\n{verdict.first}", pytrace=False)
