"""The command ``sandbox bench``."""

from __future__ import annotations

import json
import platform
import sys
from argparse import Namespace
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from sandbox.bench.suites import SUITES
from sandbox.errors import SandboxError


def bench_command(options: Namespace) -> int:
    """Run the suites named (all by default), print a line per figure, write JSON if asked."""
    wanted = options.suite or list(SUITES)
    for name in wanted:
        if name not in SUITES:
            raise SandboxError(f"no suite is named {name!r}; there are: {', '.join(SUITES)}")
    figures = []
    for name in wanted:
        for figure in SUITES[name]():
            print(figure, flush=True)
            figures.append(figure)
    if options.json:
        data = {
            "python": platform.python_version(),
            "machine": processor(),
            "unicorn": version("unicorn"),
            "figures": [asdict(figure) for figure in figures],
        }
        Path(options.json).write_text(json.dumps(data, indent=2) + "\n")
    return 0


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return f"{platform.machine()} {sys.platform}"
