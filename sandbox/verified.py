"""From a comparison with hardware to the preset ``verified`` and the list of what is wrong."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from iced_x86 import Code

from sandbox.campaign import Finding
from sandbox.decode import decode
from sandbox.encodings import features_of
from sandbox.gaps import GAPS
from sandbox.intercepts import intercepted_forms
from sandbox.policy import Policy

_GENERAL = frozenset("BMI1 BMI2 X64 INTEL386".split())
"""Features whose VEX forms use general registers only."""
ENOUGH_CASES = 8
"""A form is right only if it completed so often on hardware, without a difference."""


def is_right(finding: Finding) -> bool:
    """Whether the finding shows that the fast path may run the form: often enough it came to a
    result of its own that was compared.

    How often is estimated: cases that fault on hardware are as frequent among those that a gap
    leaves without a result as among the others.
    """
    untold = sum(finding.gaps.get(gap, 0) for gap in ("refused", "x87-stack"))
    results = finding.completed * (finding.cases - untold) / max(finding.cases, 1)
    return not finding.differences and results >= ENOUGH_CASES


def is_wrong(finding: Finding) -> bool:
    """Whether the fast path runs the form, but not as hardware does."""
    return finding.differences > 0


def _sorted(findings: Iterable[Finding]) -> list[str]:
    return sorted({finding.form for finding in findings})


class _Sorting:
    """The forms by what the findings of the fast path say, for each kind of operands."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        fast = [f for f in findings if f.tier == "fast" and not _is_intercepted(f.form)]
        self.wrong = [f for f in fast if is_wrong(f)]
        kinds: dict[str, dict[str, Finding]] = {}
        for finding in fast:
            if finding.operands and not _is_kept_away(finding.form):
                kinds.setdefault(finding.form, {})[finding.operands] = finding
        self.allowed: list[str] = []
        self.partly: dict[str, list[str]] = {"register": [], "memory": []}
        for form, by_kind in sorted(kinds.items()):
            right = [
                kind
                for kind, finding in by_kind.items()
                if is_right(finding) and not _is_kept_from(form, kind)
            ]
            if len(right) == len(by_kind):
                self.allowed.append(form)
            elif right and _is_about_operands(by_kind[right[0]], by_kind.values()):
                self.partly[right[0]].append(form)


def _is_about_operands(right: Finding, every: Iterable[Finding]) -> bool:
    """Whether ``right`` was tried often enough to have shown what the other operands showed."""
    (other,) = (finding for finding in every if finding is not right)
    rate = other.differences / max(other.cases, 1)
    return not other.differences or rate * right.cases >= ENOUGH_CASES


def _is_intercepted(form: str) -> bool:
    return bool(intercepted_forms()[getattr(Code, form)])


@lru_cache(maxsize=1)
def _by_hand() -> Policy:
    return Policy.load("by-hand")


def _is_kept_away(form: str) -> bool:
    """Whether a form may not run on the fast path however right it looks.

    Vectors under VEX and EVEX are #UD unless XCR0 says otherwise, and Unicorn does not know it;
    others are trapped by hand.
    """
    code = getattr(Code, form)
    if form.startswith(("VEX_", "EVEX_")) and features_of(code) - _GENERAL:
        return True
    by_hand = _by_hand()
    return by_hand.deciding(code) >= 0 and not by_hand.allowed[code]


def _is_kept_from(form: str, operands: str) -> bool:
    """Whether a form with operands of a kind is trapped by hand."""
    code = getattr(Code, form)
    rules = (rule for rule in _by_hand().rules if rule.operands == operands and not rule.allow)
    return any(code in rule.forms for rule in rules)


def write_policy(path: Path, data: dict[str, Any], findings: Sequence[Finding]) -> None:
    """Write the policy, and the evidence as ``.json`` beside it."""
    evidence = write_evidence(path.with_suffix(".json"), data, findings)
    path.write_text(policy_text(evidence))


def write_evidence(path: Path, data: dict[str, Any], findings: Sequence[Finding]) -> dict[str, Any]:
    """Write the figures for each form as JSON, and return them."""
    evidence = {key: data[key] for key in ("processor", "unicorn", "date", "seed")}
    evidence["forms"] = _evidence(findings)
    path.write_text(_rows(evidence))
    return evidence


def policy_text(evidence: dict[str, Any]) -> str:
    """The policy that follows from the evidence, as TOML."""
    findings = list(findings_of(evidence))
    return "\n".join(_policy_lines(evidence, _Sorting(findings), findings)) + "\n"


def findings_of(evidence: dict[str, Any]) -> Iterator[Finding]:
    """The findings as far as the evidence keeps them."""
    for form, tiers in evidence["forms"].items():
        for tier, entries in tiers.items():
            for operands, entry in entries.items():
                if operands == "skipped":
                    yield Finding(form, tier, skipped=entry)
                else:
                    cases, completed, differences, gaps = entry
                    kind = "" if operands == "any" else operands
                    yield Finding(form, tier, kind, cases, differences, completed, gaps)


def _rows(evidence: dict[str, Any]) -> str:
    """JSON with a line per form, so that a new run gives a readable difference."""
    forms = evidence["forms"]
    head = json.dumps({k: v for k, v in evidence.items() if k != "forms"})[:-1]
    rows = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(forms.items()))
    return f'{head}, "forms": {{\n' + ",\n".join(rows) + "\n}}\n"


def _evidence(findings: Sequence[Finding]) -> dict[str, Any]:
    """By form, tier and operands: [cases, cases without fault, differences, gaps], or why there
    are none."""
    forms: dict[str, Any] = {}
    for finding in findings:
        tier = forms.setdefault(finding.form, {}).setdefault(finding.tier, {})
        if finding.skipped:
            tier["skipped"] = finding.skipped
        elif finding.cases:
            tier[finding.operands or "any"] = [
                finding.cases,
                finding.completed,
                finding.differences,
                dict(sorted(finding.gaps.items())),
            ]
    return {name: tiers for name, tiers in forms.items() if any(tiers.values())}


def _policy_lines(
    data: dict[str, Any], sorting: _Sorting, findings: Sequence[Finding]
) -> Iterator[str]:
    fast = [f for f in findings if f.tier == "fast"]
    cases = sum(f.cases for f in fast)
    counted = [f.cases for f in fast if is_right(f)]
    yield from (
        "# Made by `sandbox conformance --write-policy`; do not edit, run it again.",
        "#",
        f"# Compared with   {data['processor']}",
        f"# Fast path       Unicorn {data['unicorn']}",
        f"# Date            {data['date']}",
        f"# Cases           {cases} of {len({f.form for f in fast if f.cases})} forms, "
        f"{min(counted, default=0)} to {max(counted, default=0)} for each that is allowed; seed "
        f"{data['seed']}",
        "# By form         verified.json, beside this file",
        "#",
        "# Compared in 64-bit mode at CPL 3; 16- and 32-bit code uses the same forms.",
        "# Right means: values, defined flags and faults as on that processor. What the fast path",
        "# leaves out next to a right value (float exception flags, alignment faults and the like)",
        "# is listed in docs/known-wrong.md. What cannot be compared natively is in by-hand.toml.",
        "",
        'extends = "by-hand"',
    )
    yield from _rule("allow", "no difference from hardware", sorting.allowed)
    for kind, forms in sorting.partly.items():
        other = "memory" if kind == "register" else "registers"
        comment = f"no difference from hardware; with operands in {other} there is one"
        yield from _rule("allow", comment, forms, kind)
    whole = {f.form for f in sorting.wrong} - {
        f for forms in sorting.partly.values() for f in forms
    }
    yield from _rule("trap", "wrong in Unicorn: see docs/known-wrong.md", sorted(whole))
    for kind in ("register", "memory"):
        forms = _sorted(f for f in sorting.wrong if f.operands == kind and f.form not in whole)
        yield from _rule("trap", "wrong in Unicorn: see docs/known-wrong.md", forms, kind)


def _rule(action: str, comment: str, forms: Sequence[str], operands: str = "") -> Iterator[str]:
    if not forms:
        return
    yield from ("", "[[rule]]", f'action = "{action}"', f'comment = "{comment}"')
    if operands:
        yield f'operands = "{operands}"'
    names = ", ".join(f'"{form}"' for form in forms)
    yield "form = ["
    yield from textwrap.wrap(names + ",", 100, initial_indent="  ", subsequent_indent="  ")
    yield "]"


# -- the list of what is wrong --------------------------------------------------------------------


def write_known_wrong(path: Path, data: dict[str, Any], findings: Sequence[Finding]) -> None:
    """Write the page, and the reproducing cases to ``tests/golden/known_wrong.json``."""
    sorting = _Sorting(findings)
    path.write_text("\n".join(_page(data, sorting, findings)) + "\n")
    records = [
        {"form": f.form, "operands": f.operands, "crash": True}
        if f.record is None
        else {"form": f.form, "operands": f.operands, **f.record}
        for f in sorting.wrong
    ]
    golden = path.parent.parent / "tests" / "golden"
    golden.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join(json.dumps(record) for record in records)
    (golden / "known_wrong.json").write_text(f"[\n{rows}\n]\n")


def _page(data: dict[str, Any], sorting: _Sorting, findings: Sequence[Finding]) -> Iterator[str]:
    yield from (
        "# What Unicorn gets wrong",
        "",
        "Made by `sandbox conformance --write-known-wrong`; do not edit, run it again.",
        f"Unicorn {data['unicorn']}, compared form by form with {data['processor']}; "
        f"{data['date']}.",
        "All of this is trapped by the policy `verified` and runs in handlers. For each line there",
        "is a case in `tests/golden/known_wrong.json`, which `tests/test_verified.py` runs.",
        "",
        "## Gaps: right values, but a side effect is missing",
        "",
        "| Gap | What is missing | Forms | Cured by |",
        "|-----|-----------------|-------|----------|",
    )
    for gap, text in GAPS.items():
        forms = {f.form for f in findings if f.tier == "fast" and gap in f.gaps}
        yield f"| {gap} | {text} | {len(forms)} | {_CURES.get(gap, '')} |"
    for title, wanted in _KINDS.items():
        rows = [f for f in sorting.wrong if _kind(f) == wanted]
        yield from ("", f"## {title}", "", "| Form | Operands | Bytes | First difference |")
        yield "|------|----------|-------|------------------|"
        for finding in sorted(rows, key=lambda f: (f.form, f.operands)):
            yield _row(finding)


_CURES = {
    "refused": "nothing to cure",
    "mxcsr": "`float_flags`",
    "nan": '`float_flags = "exact"`',
    "x87": "`float_flags`",
    "x87-stack": '`float_flags = "exact"`',
    "x87-nan": '`float_flags = "exact"`',
    "alignment": '`alignment = "exact"`',
    "partial": "running the instruction again, which is right",
    "mmx": "EMMS, as programs have to run it anyway",
}
_KINDS = {
    "Legacy encodings": "legacy",
    "VEX, EVEX and XOP: the second source is dropped, or the upper lanes are left": "vex",
}


def _kind(finding: Finding) -> str:
    return "vex" if finding.form.startswith(("VEX_", "EVEX_", "XOP_")) else "legacy"


def _row(finding: Finding) -> str:
    first = " ".join(finding.first.partition("\n  ")[0].split())
    text = code = ""
    if finding.record:
        raw = bytes.fromhex(finding.record["insn"])
        code, text = f"`{raw.hex(' ')}`", f" {decode(raw, 64).text()}"
    if len(first) > 110:
        first = first[:107] + "..."
    return f"| {finding.form} | {finding.operands} | {code}{text} | {first.replace('|', '/')} |"
