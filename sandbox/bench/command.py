"""The command ``sandbox bench``."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import time
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sandbox.bench.measure import Effort, Figure, Note, Result
from sandbox.bench.programs import versions
from sandbox.bench.suites import SUITES
from sandbox.bench.table import HEADER, Table, summary
from sandbox.errors import SandboxError


def bench_command(options: Namespace) -> int:
    """Run the suites named (all by default), or read the results of an earlier run; print a line
    per figure, write JSON and draw the picture if asked."""
    effort = _effort(options)
    wanted = options.suite or list(SUITES)
    for name in wanted:
        if name not in SUITES:
            raise SandboxError(f"no suite is named {name!r}; there are: {', '.join(SUITES)}")
    if options.picture:
        from sandbox.bench import picture

        picture.check(Path(options.picture))
    results: list[Result] = []
    data = about(effort)
    try:
        if options.read:
            data, old = read_results(Path(options.read))
            measured: Iterable[Result] = (result for result in old if result.suite in wanted)
        else:
            measured = (result for name in wanted for result in SUITES[name](effort))
        _collect(measured, results)
    finally:  # what was measured before an error or Ctrl-C is kept
        _clear_progress()
        if options.json:
            write_results(Path(options.json), data, results)
    for line in summary(results):
        print(line)
    if options.picture and results:
        picture.draw(results, caption(data), Path(options.picture))
    return 0


def _collect(measured: Iterable[Result], results: list[Result]) -> None:
    print(HEADER)
    table = Table()
    for result in measured:
        _clear_progress()
        print(table.line(result), flush=True)
        results.append(result)


def _effort(options: Namespace) -> Effort:
    try:
        re.compile(options.only)
    except re.error as error:
        raise SandboxError(f"--only {options.only!r} is no regular expression: {error}") from None
    if (options.rounds is not None and options.rounds < 1) or not options.scale > 0:
        raise SandboxError("--rounds must be 1 or more, and --scale above 0")
    return Effort(options.rounds, options.scale, options.only)


def about(effort: Effort) -> dict[str, Any]:
    """What is written beside the results: the machine, the versions, and how was measured."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": processor(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions(),
        "rounds": effort.rounds,
        "scale": effort.scale,
    }


def write_results(path: Path, data: dict[str, Any], results: Iterable[Result]) -> None:
    """Write ``data`` with the results as JSON."""
    split: dict[str, list[dict[str, Any]]] = {"figures": [], "notes": []}
    for result in results:
        split["figures" if isinstance(result, Figure) else "notes"].append(asdict(result))
    path.write_text(json.dumps({**data, **split}, indent=1) + "\n")


def read_results(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """What :func:`write_results` wrote; the notes follow the figures of their suite."""
    try:
        data = json.loads(path.read_text())
        results: list[Result] = [Figure(**figure) for figure in data.pop("figures")]
        results += [Note(**note) for note in data.pop("notes", [])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SandboxError(f"{path}: no results of sandbox bench: {error}") from None
    order = {name: place for place, name in enumerate(SUITES)}
    return data, sorted(results, key=lambda result: order.get(result.suite, len(order)))


def caption(data: dict[str, Any]) -> str:
    """One line about the machine and the peers."""
    versions = {"Python": data.get("python"), **data.get("versions", {})}
    cores = f"{data['cores']} cores" if "cores" in data else ""
    known = (f"{name} {text}" for name, text in versions.items() if text)
    return ", ".join(part for part in (data.get("machine"), cores, *known) if part)


def _clear_progress() -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return f"{platform.machine()} {sys.platform}"
