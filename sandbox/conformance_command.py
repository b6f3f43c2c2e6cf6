"""The command ``sandbox conformance``: the tiers and the host CPU, form by form."""

from __future__ import annotations

import json
import re
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sandbox.bench.command import processor
from sandbox.campaign import Campaign, Finding
from sandbox.decode import FORM_NAMES
from sandbox.encodings import all_forms, forms_with
from sandbox.engine.unicorn_library import library
from sandbox.errors import SandboxError
from sandbox.native import NativeCpu
from sandbox.policy import Policy
from sandbox.run import INSTRUCTION_PACKS
from sandbox.verified import write_evidence, write_known_wrong, write_policy

TIERS = {
    "fast": ("fast",),
    "handlers": ("handlers",),
    "lowered": ("lowered",),
    "host": ("host",),
    "both": ("fast", "handlers"),
}


def conformance_command(options: Namespace) -> int:
    """Compare, print a line per form that differs, write what is asked for; the exit status."""
    if options.data:
        data, findings = added_up([read_data(Path(name)) for name in options.data])
    else:
        reason = NativeCpu.available()
        if reason:
            print(f"skipped: {reason}", file=sys.stderr)
            return 0
        findings = list(_run(options))
        data = {
            "processor": processor(),
            "unicorn": ".".join(map(str, library().version)),
            "date": options.date,
            "seed": options.seed,
            "findings": [_compact(finding) for finding in findings],
        }
    _print_summary(findings)
    if options.json:
        Path(options.json).write_text(json.dumps(data, indent=0) + "\n")
    if options.write_evidence:
        write_evidence(Path(options.write_evidence), data, findings)
    if options.write_policy:
        write_policy(Path(options.write_policy), data, findings)
    if options.write_known_wrong:
        write_known_wrong(Path(options.write_known_wrong), data, findings)
    expected = () if options.policy else ("fast",)
    return int(any(f.differences and f.tier not in expected for f in findings))


def read_data(path: Path) -> dict[str, Any]:
    """What an earlier run wrote with ``--json``."""
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        return data
    except (OSError, ValueError) as error:
        raise SandboxError(f"{path}: cannot read this data: {error}") from None


def added_up(runs: list[dict[str, Any]]) -> tuple[dict[str, Any], list[Finding]]:
    """The findings of several runs as if they were one, and what is known about the runs.

    SandboxError if they are not about the same processor and the same Unicorn.
    """
    total: dict[tuple[str, str, str], Finding] = {}
    for run in runs:
        if any(run[key] != runs[0][key] for key in ("processor", "unicorn")):
            raise SandboxError("these data are of different processors or versions of Unicorn")
        for found in run["findings"]:
            finding = Finding(**found)
            sum_ = total.setdefault((finding.form, finding.tier, finding.operands), finding)
            if sum_ is not finding:
                _add(sum_, finding)
    seeds = ", ".join(dict.fromkeys(str(run["seed"]) for run in runs))
    return {**runs[-1], "seed": seeds}, list(total.values())


def _add(total: Finding, more: Finding) -> None:
    total.cases += more.cases
    total.completed += more.completed
    total.differences += more.differences
    for gap, count in more.gaps.items():
        total.gaps[gap] = total.gaps.get(gap, 0) + count
    total.first = total.first or more.first
    total.record = total.record or more.record


def _compact(finding: Finding) -> dict[str, Any]:
    return {key: value for key, value in asdict(finding).items() if value}


def _choose(options: Namespace) -> list[int]:
    codes: Iterable[int] = forms_with(*options.features) if options.features else all_forms()
    try:
        wanted = re.compile(options.forms, re.IGNORECASE)
    except re.error as error:
        raise SandboxError(f"--forms {options.forms!r}: {error}") from None
    found = [code for code in codes if wanted.search(FORM_NAMES[code])]
    if not found:
        raise SandboxError("no instruction form fits --forms and --features")
    return found


def _run(options: Namespace) -> Iterator[Finding]:
    codes = _choose(options)
    requests = [(tier, code) for code in codes for tier in TIERS[options.tier]]
    started = shown = time.monotonic()
    total = 0
    packs = options.handlers or INSTRUCTION_PACKS
    if options.policy:
        Policy.load(options.policy)  # a mistake in it is told here
    with Campaign(packs, options.jobs, options.policy) as campaign:
        answers = campaign.run(requests, options.cases, options.seed)
        for number, findings in enumerate(answers, 1):
            for finding in findings:
                total += finding.cases
                if finding.differences:
                    print(line_of(finding), flush=True)
                    if options.full:
                        print(finding.first, flush=True)
                yield finding
            now = time.monotonic()
            if now - shown > 1 and sys.stderr.isatty():
                shown = now
                print(f"\r{number} of {len(requests)}, {total} cases ", end="", file=sys.stderr)
            if options.seconds and now - started > options.seconds:
                left = len(requests) - number
                print(f"time is over: {left} of {len(requests)} not compared", file=sys.stderr)
                return


def line_of(finding: Finding) -> str:
    """A finding in one line of text."""
    first = finding.first.partition("\n")[0]
    name = f"{finding.form} {finding.operands}"
    return f"{finding.tier:<8} {name:<52} {finding.cases:>6} {finding.differences:>6}  {first}"


def _print_summary(findings: list[Finding]) -> None:
    for tier in ("fast", "handlers", "lowered", "host"):
        mine = [f for f in findings if f.tier == tier]
        if not mine:
            continue
        cases, differences = (sum(getattr(f, n) for f in mine) for n in ("cases", "differences"))
        print(
            f"{tier}: {cases} cases of {len({f.form for f in mine if f.cases})} forms, "
            f"{differences} differences in {len({f.form for f in mine if f.differences})} forms; "
            f"{len({f.form for f in mine if f.skipped})} forms cannot be compared here"
        )
        gaps: dict[str, int] = {}
        for finding in mine:
            for gap, count in finding.gaps.items():
                gaps[gap] = gaps.get(gap, 0) + count
        for gap, count in sorted(gaps.items()):
            print(f"  gap {gap}: {count} cases")
