"""docs/conformance.md says what its data say, and these leave nothing open."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from sandbox.campaign import Finding
from sandbox.encodings import all_forms
from sandbox.verified import findings_of

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "conformance.md").read_text()
FINDINGS = list(findings_of(json.loads((DOCS / "conformance.json").read_text())))
TIERS = {
    "fast": "fast path",
    "handlers": "handlers",
    "lowered": "lowered code",
    "host": "host runs",
}


def of_tier(tier: str) -> list[Finding]:
    return [finding for finding in FINDINGS if finding.tier == tier and finding.cases]


def numbers(values: list[int]) -> str:
    return " | ".join(f"{value:,}" for value in values)


@pytest.mark.parametrize("tier", TIERS)
def test_the_sums_are_those_of_the_data(tier: str) -> None:
    found = of_tier(tier)
    sums = [len({f.form for f in found}), sum(f.cases for f in found)]
    sums += [sum(f.completed for f in found), sum(f.differences for f in found)]
    assert f"| {TIERS[tier]} | {numbers(sums)} |" in PAGE


def test_ten_million_cases_were_compared_and_none_differed() -> None:
    found = of_tier("fast") + of_tier("handlers")
    refused = sum(finding.gaps.get("refused", 0) for finding in found)
    assert sum(finding.cases for finding in found) - refused > 10_000_000
    assert not any(finding.differences for finding in found + of_tier("lowered") + of_tier("host"))


def test_the_gaps_are_those_of_the_data() -> None:
    gaps: Counter[str] = Counter()
    for finding in of_tier("fast"):
        gaps.update(finding.gaps)
    for gap, count in gaps.items():
        assert f"| {gap} | {count:,} |" in PAGE
    assert not any(finding.gaps for finding in of_tier("handlers"))


def test_every_form_is_compared_or_is_said_not_to_be() -> None:
    compared = {finding.form for tier in TIERS for finding in of_tier(tier)}
    skipped = {f.form: f.skipped for f in FINDINGS if f.skipped and f.form not in compared}
    lacking = sum(why.startswith("the host has no") for why in skipped.values())
    neither = len(all_forms()) - len(compared) - len(skipped)
    for count, why in (
        (len(compared), "were compared"),
        (lacking, "need what this processor lacks"),
        (len(skipped) - lacking, "cannot be compared"),
        (neither, "run neither on the fast path nor in a handler"),
    ):
        assert f"| {count:,} | {why}" in PAGE
