"""The page of all instruction forms: where each runs, and how that was checked.

    python -m sandbox.instructions           # writes docs/instructions.md and docs/instructions.csv

What runs where follows from the default policy and the default packs; how it was checked from the
evidence beside the policy (``verified.json``) and, for the fast path, the policy's own rules.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from iced_x86 import EncodingKind

from sandbox.decode import FEATURE_NAMES, FORM_NAMES
from sandbox.encodings import features_of, info_of, mnemonic_of
from sandbox.fallback import HandlerTable
from sandbox.intercepts import BOUND_MNEMONICS
from sandbox.packs import load_pack
from sandbox.policy import ALLOW, ASK
from sandbox.run import INSTRUCTION_PACKS
from sandbox.vm import Vm

FAST, MIXED, HANDLER, MACHINE = "fast path", "by operands", "handler", "machine"
OPTIONAL, NONE = "pack amd", "-"
PLACES = (FAST, MIXED, HANDLER, MACHINE, OPTIONAL, NONE)
_ORDER = {name: number for number, name in enumerate(FEATURE_NAMES.values())}


@dataclass(frozen=True, slots=True)
class Row:
    """One form: its mnemonic, the CPUID features it needs, where it runs, how that was checked."""

    form: str
    mnemonic: str
    features: tuple[str, ...]
    place: str
    checked: str


def known_forms() -> Iterator[int]:
    """The forms of the three modes that the decoder knows without an option for some old CPU."""
    for code in sorted(FORM_NAMES):
        info = info_of(code)
        is_other = info.encoding == EncodingKind.MVEX or "KNC" in features_of(code)
        is_two = info.fwait  # WAIT and another one: the decoder never gives these
        if info.is_instruction and not (info.decoder_option or is_other or is_two):
            yield code


@lru_cache(maxsize=1)
def evidence() -> dict[str, Any]:
    """What ``sandbox conformance`` wrote beside the policy ``verified``."""
    text = resources.files("sandbox.policies").joinpath("verified.json").read_text()
    found: dict[str, Any] = json.loads(text)
    return found


def rows() -> Iterator[Row]:
    """A row for each form."""
    with Vm(handlers=INSTRUCTION_PACKS) as vm:
        for code in known_forms():
            place = place_of(vm, code)
            features = tuple(sorted(features_of(code), key=_ORDER.__getitem__))
            checked = checked_by(vm, code, place)
            yield Row(FORM_NAMES[code], mnemonic_of(code), features, place, checked)


def place_of(vm: Vm, code: int) -> str:
    """Where a form runs in this machine."""
    settings = vm.settings
    handled = settings.handlers.takes(code)
    if settings.intercepted[code]:
        taken = handled or settings.kernel.takes(code) or mnemonic_of(code) in BOUND_MNEMONICS
        return MACHINE if taken else NONE
    mark = settings.policy.marks[code]
    if mark == ALLOW:
        return FAST
    if mark == ASK:
        return MIXED if handled else FAST
    if handled:
        return HANDLER
    return OPTIONAL if _optional().takes(code) else NONE


@lru_cache(maxsize=1)
def _optional() -> HandlerTable:
    """The pack that is not installed by default."""
    table = HandlerTable()
    table.add(load_pack("amd"))
    return table


def checked_by(vm: Vm, code: int, place: str) -> str:
    """How it is known that the form is run right."""
    name = FORM_NAMES[code]
    tiers = evidence()["forms"].get(name, {})
    if place == NONE:
        return ""
    if place in (FAST, MIXED):
        decision = vm.policy.rules[vm.policy.deciding(code)] if vm.policy.allowed[code] else None
        if decision is not None and decision.file != "verified.toml":
            return f"by hand: {decision.comment}"
    parts = [_cases(tiers[tier], tier) for tier in _TIERS[place] if tier in tiers]
    return "; ".join(part for part in parts if part) or "tests"


_TIERS: dict[str, tuple[str, ...]] = {
    FAST: ("fast",),
    MIXED: ("fast", "handlers"),
    HANDLER: ("handlers",),
    MACHINE: (),
    OPTIONAL: (),
}


def _cases(entries: dict[str, Any], tier: str) -> str:
    if "skipped" in entries:
        return f"tests ({entries['skipped']})"
    cases = sum(entry[0] for entry in entries.values())
    gaps = sorted({gap for entry in entries.values() for gap in entry[3]})
    left = f", gaps: {' '.join(gaps)}" if gaps else ""
    return f"hardware, {cases} cases{left}" if tier == "fast" else f"hardware, {cases} cases"


def page(found: Iterable[Row]) -> str:
    """The page in Markdown."""
    by_feature: dict[str, list[Row]] = {}
    for row in found:
        by_feature.setdefault(" + ".join(row.features), []).append(row)
    source = evidence()
    lines = [
        "# Instructions",
        "",
        "Made by `python -m sandbox.instructions`; do not edit, run it again.",
        "",
        "Every instruction form that the decoder knows, by the CPUID features it needs, and where",
        "it runs under the default policy with the default packs: on the fast path, there or in a",
        "handler by its operands, in a handler, in the machine itself (intercepted, as hypervisors",
        "do), in the pack `amd` if that is installed, or nowhere: then it raises #UD, and CPUID",
        "does not offer the feature. The full list, form by form with how it was checked, is",
        "[instructions.csv](instructions.csv).",
        "",
        f"Checked against hardware means: {source['processor']}, {source['date']}; fast path "
        f"Unicorn {source['unicorn']}.",
        "",
        "| Features | Forms | Fast path | By operands | Handler | Machine | Pack amd | Not run | "
        "Checked on hardware |",
        "|----------|------:|----------:|------------:|--------:|--------:|---------:|--------:|"
        "--------------------:|",
    ]
    totals = [0] * 8
    for feature, mine in by_feature.items():
        counts = [len(mine), *(sum(r.place == p for r in mine) for p in PLACES)]
        counts.append(sum(row.checked.startswith("hardware") for row in mine))
        totals = [a + b for a, b in zip(totals, counts, strict=True)]
        lines.append(f"| {feature} | " + " | ".join(str(c or "") for c in counts) + " |")
    lines.append("| all | " + " | ".join(map(str, totals)) + " |")
    lines += ["", "## Not run, by feature", "", "| Features | Mnemonics |", "|---|---|"]
    for feature, mine in by_feature.items():
        names = sorted({row.mnemonic for row in mine if row.place == NONE})
        if names:
            lines.append(f"| {feature} | {' '.join(names)} |")
    return "\n".join(lines) + "\n"


def table(found: Iterable[Row]) -> str:
    """The list as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("form", "mnemonic", "features", "runs on", "checked by"))
    for row in found:
        features = " + ".join(row.features)
        writer.writerow((row.form, row.mnemonic, features, row.place, row.checked))
    return out.getvalue()


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    found = list(rows())
    (folder / "instructions.md").write_text(page(found))
    (folder / "instructions.csv").write_text(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
