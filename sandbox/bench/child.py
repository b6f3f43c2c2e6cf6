"""One run of a program in one emulator, in a process of its own: what ``sandbox bench`` times.

``python -m sandbox.bench.child EMULATOR RESULT PROGRAM [ARG...]`` writes the outcome as JSON to the
file ``RESULT``. The time is CPU time of this process from before the program is loaded until it has
ended: the interpreter's own start and imports are outside, creating the VM is inside.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from sandbox.bench.outcome import Outcome

Run = Callable[[str, Sequence[str], Mapping[str, str]], Outcome]

EMULATORS = {
    "sandbox": ("sandbox.bench.ours", "run"),
    "kvm": ("sandbox.bench.ours", "run_kvm"),
    "bochs": ("sandbox.bench.peer_bochs", "run"),
    "unicorn": ("sandbox.bench.peer_unicorn", "run"),
}
"""Module and function of each. Only the one that runs is imported."""
_PACKAGES = {"bochs": "bochscpu", "unicorn": "unicorn"}


def main(arguments: Sequence[str]) -> None:
    """Run, write the result, and end the process without tearing anything down."""
    emulator, result, program, *rest = arguments
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the command does
    module, function = EMULATORS[emulator]
    run: Run = getattr(importlib.import_module(module), function)
    if emulator in _PACKAGES:
        importlib.import_module(_PACKAGES[emulator])
    env = {key: value for key, value in os.environ.items() if key.startswith("BENCH_")}
    start = time.process_time()
    outcome = run(program, [program, *rest], env)
    seconds = time.process_time() - start
    Path(result).write_text(json.dumps({"seconds": seconds, **asdict(outcome)}))
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
