"""A line per trapped instruction, and the summary of what ran where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TextIO

from sandbox.stats import Stats, TraceRecord

TOP = 12


def tracer(out: TextIO, stats: Stats) -> Callable[[TraceRecord], None]:
    """Prints each record to ``out``: rip, bytes, instruction, reason, handler, microseconds; and
    each of the run's notices when it comes up."""
    told = 0

    def show(record: TraceRecord) -> None:
        nonlocal told
        code = record.raw.hex(" ")
        micros = record.seconds * 1e6
        print(
            f"{record.rip:#014x}  {code:<30} {record.text:<44} "
            f"{record.reason:<18} {record.handler:<28} {micros:8.1f} us",
            file=out,
        )
        for notice in stats.notices[told:]:
            print(f"notice: {notice}", file=out)
        told = len(stats.notices)

    return show


def summary(stats: Stats) -> Iterator[str]:
    """What ran where: counts and shares of time, the most frequent mnemonics."""
    total = stats.fast_seconds + stats.fallback_seconds or 1.0
    yield (f"fast path     {stats.fast_seconds:9.3f} s  {100 * stats.fast_seconds / total:5.1f} %")
    yield (
        f"handler tier  {stats.fallback_seconds:9.3f} s  "
        f"{100 * stats.fallback_seconds / total:5.1f} %  "
        f"{stats.fallback_count} instructions"
    )
    if stats.fallback_count:
        each = stats.fallback_seconds / stats.fallback_count
        yield f"              {each * 1e6:9.2f} us each"
    yield from _ranking(stats.by_mnemonic)
    if stats.lowered_sites:
        sites, runs = sum(stats.lowered_sites.values()), sum(stats.lowered.values())
        yield f"lowered       {runs:>9} instructions, on the fast path, at {sites} places"
        yield from _ranking(stats.lowered)
    for notice in stats.notices:
        yield f"notice: {notice}"


def _ranking(counts: dict[str, int]) -> Iterator[str]:
    """The most frequent mnemonics, and the sum of the others."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    for name, count in ranked[:TOP]:
        yield f"  {name:<16} {count:>12}"
    if len(ranked) > TOP:
        rest = sum(count for _name, count in ranked[TOP:])
        yield f"  {len(ranked) - TOP} others {'':>5} {rest:>12}"
