"""The child process of :mod:`sandbox.campaign`: compares the forms it is asked for.

A process of its own, since a form may crash Unicorn. Requests and answers are lines of JSON on
stdin and stdout; the first line in says which handler packs to take, and under which policy.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from iced_x86 import OpKind

from sandbox.cases import Cases
from sandbox.conformance import Outcome, Reconcile, Subject, Verdict, check, not_comparable
from sandbox.decode import FORM_NAMES, DecodeError, Insn, decode
from sandbox.encodings import encodings, info_of, kinds_of
from sandbox.gaps import has_memory_operand, reconcile, reconcile_lowered
from sandbox.golden import PATTERN, Record, make_record, reduced
from sandbox.intercepts import intercepted_forms
from sandbox.native import NativeCpu, State, missing_features
from sandbox.policy import Policy
from sandbox.subjects import FastPath, HandlerTier, Lowered, Stage, without_avx512

LAZY_MXCSR = (0x1F80, 0x3F80, 0x5F80, 0x7F80, 0x1FBF)
"""What the fast path is asked to do right: all exceptions masked, no FTZ, no DAZ; every rounding
mode, flags set before."""
ENOUGH = 64
"""Differences, or refusals and nothing else, after which a form is given up."""
FEW = 16
"""A form with fewer encodings than this, for each kind of operands, gets more states for each."""
_RECONCILE: dict[str, Reconcile] = {
    "fast": reconcile,
    "lowered": reconcile_lowered,
    "host": reconcile_lowered,
}
"""The tiers with gaps; all but host runs, which take any, are tried under :data:`LAZY_MXCSR`."""
SECONDS = 300.0
"""A form that takes longer is given up: the host stands still in each case, it seems."""


@dataclass(slots=True)
class Finding:
    """What the comparison of one form found, for operands in registers or in memory."""

    form: str
    tier: str
    operands: str = ""
    cases: int = 0
    differences: int = 0
    completed: int = 0
    """Cases in which the instruction did not fault on hardware."""
    gaps: dict[str, int] = field(default_factory=dict)
    skipped: str = ""
    declined: int = 0
    """Encodings that no handler takes."""
    first: str = ""
    record: Record | None = None
    """The first case that differed, with the hardware's answer."""


@dataclass(frozen=True, slots=True)
class UnderPolicy:
    """The fast path as far as a policy lets it run."""

    subject: FastPath
    policy: Policy

    def accepts(self, insn: Insn) -> bool:
        allowed = self.policy.allows(insn) and not intercepted_forms()[insn.code]
        return allowed and self.subject.accepts(insn)

    def run(self, insn: Insn, state: State) -> Outcome:
        return self.subject.run(insn, state)


def compare_form(
    subject: Subject, tier: str, code: int, cases: int, seed: int
) -> Iterator[Finding]:
    """A finding for each kind of operands that the form has, or one that says why it is skipped."""
    name = FORM_NAMES[code]
    reason = not_comparable(name)
    if reason:
        yield Finding(name, tier, "", skipped=reason)
        return
    try:
        plan = planned(code, cases)
    except ValueError as error:  # branches, mostly
        yield Finding(name, tier, "", skipped=str(error).split(": ")[-1])
        return
    findings: dict[str, Finding] = {}
    stop = time.monotonic() + SECONDS
    for insn, count in plan:
        operands = operands_of(insn)
        finding = findings.setdefault(operands, Finding(name, tier, operands))
        refused = finding.gaps.get("refused", 0)
        if max(finding.differences, refused == finding.cases and refused) >= ENOUGH:
            continue
        if time.monotonic() > stop:
            continue
        missing = missing_features(insn)
        if missing:
            finding.skipped = f"the host has no {', '.join(missing)}"
        elif not subject.accepts(insn):
            finding.declined += 1
        else:
            _compare(subject, tier, insn, finding, count, seed)
    yield from findings.values()


def operands_of(insn: Insn) -> str:
    """The kind of operands that a finding is about."""
    return "memory" if has_memory_operand(insn) else "register"


def planned(code: int, cases: int) -> list[tuple[Insn, int]]:
    """The encodings of a form, and the number of states that each is to be tried on.

    ``cases`` for each, more if they are :data:`FEW`; then all immediates of 8 bits, with less.
    ValueError for forms that :func:`~sandbox.encodings.encodings` does not make.
    """
    every = [variant for insn in encodings(code) for variant in _prefixed(insn)]
    kinds = Counter(map(operands_of, every))
    plan = [(insn, max(cases, FEW * cases // kinds[operands_of(insn)])) for insn in every]
    if any(kind.startswith("IMM8") and "CONST" not in kind for kind in kinds_of(code)):
        known = {insn.raw for insn in every}
        more = (insn for insn in encodings(code, range(256)) if insn.raw not in known)
        plan += [(insn, max(cases // FEW, 1)) for insn in more]
    return plan


def _prefixed(insn: Insn) -> Iterator[Insn]:
    """The instruction, and the same with REP, REPNE or LOCK where these mean something."""
    yield insn
    prefixes = b"\xf3\xf2" if insn.iced.is_string_instruction else b""
    if info_of(insn.code).can_use_lock_prefix and insn.iced.op0_kind == OpKind.MEMORY:
        prefixes = b"\xf0"
    for prefix in prefixes:
        with suppress(DecodeError):
            found = decode(bytes([prefix]) + insn.raw, 64)
            if found.code == insn.code:
                yield found


def _compare(
    subject: Subject, tier: str, insn: Insn, finding: Finding, cases: int, seed: int
) -> None:
    gaps = _RECONCILE.get(tier)
    mxcsr = LAZY_MXCSR if gaps and tier != "host" else None
    states = Cases(insn, seed, True, mxcsr).take(cases)
    if tier in ("lowered", "host"):
        states = [without_avx512(state) for state in states]
    verdict = Verdict(insn.form)
    try:
        check(subject, insn, states, verdict=verdict, reconcile=gaps)
    except ValueError as error:  # control transfers and the like
        finding.skipped = str(error).split(": ")[-1]
        return
    finding.cases += verdict.cases
    finding.differences += verdict.differences
    finding.completed += verdict.completed
    for gap, count in verdict.gaps.items():
        finding.gaps[gap] = finding.gaps.get(gap, 0) + count
    if verdict.example and not finding.first:
        finding.first = verdict.first
        finding.record = _record(subject, verdict, gaps or reconcile)


def _record(subject: Subject, verdict: Verdict, reconcile: Reconcile) -> Record:
    """The example, reduced to what matters if it still differs then."""
    assert verdict.example is not None
    insn, state = verdict.example
    cpu = NativeCpu.shared()
    plain_memory = replace(state, memory=PATTERN)
    for candidate in (reduced(insn, state), plain_memory, state):
        again = check(subject, insn, [candidate], reconcile=reconcile)
        if again.differences:
            state = candidate
            break
    return make_record(insn, state, cpu.run(insn.raw, state))


def _lowered(settings: dict[str, Any], *, on_host: bool) -> Lowered:
    policy = Policy.load(settings["policy"] or "verified").with_exactness(host=on_host)
    return Lowered(Stage(settings["packs"], policy))


def main() -> None:
    settings: dict[str, Any] = json.loads(sys.stdin.readline())
    stage = Stage(settings["packs"])
    fast: Subject = FastPath(stage)
    if settings["policy"]:
        fast = UnderPolicy(FastPath(stage), Policy.load(settings["policy"]))
    subjects: dict[str, Subject] = {"fast": fast, "handlers": HandlerTier(stage)}
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        tier = request["tier"]
        if tier not in subjects:
            subjects[tier] = _lowered(settings, on_host=tier == "host")
        found = compare_form(
            subjects[tier], tier, request["code"], request["cases"], request["seed"]
        )
        sys.stdout.write(json.dumps([asdict(finding) for finding in found]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
