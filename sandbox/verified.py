"""From a comparison with hardware to the preset ``verified`` and the list of what is wrong."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sandbox.campaign import Finding
from sandbox.decode import decode
from sandbox.gaps import GAPS

ENOUGH_CASES = 8
"""A form is right only if it completed so often on hardware, without a difference."""


def is_right(finding: Finding) -> bool:
    """Whether the finding shows that the fast path may run the form."""
    refused = finding.gaps.get("refused", 0)
    return not finding.differences and finding.completed - refused >= ENOUGH_CASES


def is_wrong(finding: Finding) -> bool:
    """Whether the fast path runs the form, but not as hardware does."""
    return finding.differences > 0


def _sorted(findings: Iterable[Finding]) -> list[str]:
    return sorted({finding.form for finding in findings})


class _Sorting:
    """The forms by what the findings of the fast path say, for each kind of operands."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        fast = [f for f in findings if f.tier == "fast"]
        kinds: dict[str, set[str]] = {}
        for finding in fast:
            if finding.operands:
                kinds.setdefault(finding.form, set()).add(finding.operands)
        right = {(f.form, f.operands) for f in fast if is_right(f)}
        self.allowed = sorted(
            form for form, has in kinds.items() if all((form, kind) in right for kind in has)
        )
        whole = set(self.allowed)
        self.partly = {
            kind: sorted(form for form, has in right if has == kind and form not in whole)
            for kind in ("register", "memory")
        }
        self.wrong = [f for f in fast if is_wrong(f)]


def write_policy(path: Path, data: dict[str, Any], findings: Sequence[Finding]) -> None:
    """Write the policy, and the evidence as ``.json`` beside it."""
    sorting = _Sorting(findings)
    path.write_text("\n".join(_policy_lines(data, sorting, findings)) + "\n")
    evidence = {key: data[key] for key in ("processor", "unicorn", "date", "seed")}
    evidence["forms"] = _evidence(findings)
    path.with_suffix(".json").write_text(_rows(evidence))


def _rows(evidence: dict[str, Any]) -> str:
    """JSON with a line per form, so that a new run gives a readable difference."""
    forms = evidence["forms"]
    head = json.dumps({k: v for k, v in evidence.items() if k != "forms"})[:-1]
    rows = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(forms.items()))
    return f'{head}, "forms": {{\n' + ",\n".join(rows) + "\n}}\n"


def _evidence(findings: Sequence[Finding]) -> dict[str, Any]:
    """By form, tier and operands: [cases, differences, gaps], or why there are none."""
    forms: dict[str, Any] = {}
    for finding in findings:
        tier = forms.setdefault(finding.form, {}).setdefault(finding.tier, {})
        if finding.skipped:
            tier["skipped"] = finding.skipped
        elif finding.cases:
            tier[finding.operands or "any"] = [
                finding.cases,
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
        "is a case in `tests/golden/known_wrong.json`, which `tests/test_known_wrong.py` runs.",
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
