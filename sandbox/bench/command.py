"""The command ``sandbox bench``."""

from __future__ import annotations

import json
import platform
import re
import sys
from argparse import Namespace
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from sandbox.bench.measure import Effort, Figure, Note, Result
from sandbox.bench.programs import versions
from sandbox.bench.suites import SUITES
from sandbox.bench.table import Table, summary
from sandbox.errors import SandboxError


def bench_command(options: Namespace) -> int:
    """Run the suites named (all by default), print a line per figure, write JSON if asked."""
    effort = _effort(options)
    wanted = options.suite or list(SUITES)
    for name in wanted:
        if name not in SUITES:
            raise SandboxError(f"no suite is named {name!r}; there are: {', '.join(SUITES)}")
    results: list[Result] = []
    table = Table()
    for name in wanted:
        for result in SUITES[name](effort):
            _clear_progress()
            print(table.line(result), flush=True)
            results.append(result)
    _clear_progress()
    for line in summary(results):
        print(line)
    if options.json:
        Path(options.json).write_text(json.dumps(as_data(results, effort), indent=1) + "\n")
    return 0


def _effort(options: Namespace) -> Effort:
    try:
        re.compile(options.only)
    except re.error as error:
        raise SandboxError(f"--only {options.only!r} is no regular expression: {error}") from None
    if (options.rounds is not None and options.rounds < 1) or not options.scale > 0:
        raise SandboxError("--rounds must be 1 or more, and --scale above 0")
    return Effort(options.rounds, options.scale, options.only)


def as_data(results: list[Result], effort: Effort) -> dict[str, object]:
    """What ``--json`` writes."""
    return {
        "python": platform.python_version(),
        "machine": processor(),
        "kernel": platform.release(),
        "unicorn": version("unicorn"),
        "versions": versions(),
        "rounds": effort.rounds,
        "scale": effort.scale,
        "figures": [asdict(result) for result in results if isinstance(result, Figure)],
        "notes": [asdict(result) for result in results if isinstance(result, Note)],
    }


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
