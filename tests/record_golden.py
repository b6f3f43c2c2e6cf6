"""Record what this CPU does, so that any machine can check the handlers against it.

    python -m tests.record_golden            # writes tests/golden/vectors.json.xz, two minutes

A few cases of each encoding of each form that a handler takes and this CPU has. The file is for
``tests/test_golden.py``.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sandbox.bench.command import processor
from sandbox.cases import Cases
from sandbox.conformance import is_undefined, not_comparable
from sandbox.decode import FORM_NAMES, Insn
from sandbox.encodings import all_forms, encodings
from sandbox.golden import make_record, reduced
from sandbox.native import NativeCpu, missing_features
from sandbox.run import INSTRUCTION_PACKS
from sandbox.subjects import HandlerTier, Stage

FILE = Path(__file__).parent / "golden" / "vectors.json.xz"
ENCODINGS = 5
CASES = 2


def chosen(code: int, handlers: HandlerTier) -> list[Insn]:
    """A few encodings of a form, spread over all it has; none if it cannot be recorded."""
    if not_comparable(FORM_NAMES[code]):
        return []
    try:
        every = [insn for insn in encodings(code) if handlers.accepts(insn)]
    except ValueError:  # branches, mostly
        return []
    if not every or missing_features(every[0]):
        return []
    step = max(1, len(every) // ENCODINGS)
    return every[::step][:ENCODINGS]


def records(seed: int) -> Iterator[dict[str, Any]]:
    """The records of all forms, in iced-x86's order."""
    handlers, cpu = HandlerTier(Stage(INSTRUCTION_PACKS)), NativeCpu.shared()
    for code in all_forms():
        for insn in chosen(code, handlers):
            states = [reduced(insn, state) for state in Cases(insn, seed).take(CASES)]
            states = [state for state in states if not is_undefined(insn, state)]
            try:
                results = cpu.run_batch([(insn.raw, state) for state in states])
            except ValueError:  # not to be run natively
                continue
            for state, result in zip(states, results, strict=True):
                if not result.crashed:
                    yield make_record(insn, state, result)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.record_golden", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", type=Path, default=FILE)
    options = parser.parse_args()
    found = list(records(options.seed))
    data = {"processor": processor(), "seed": options.seed, "records": found}
    text = json.dumps(data, separators=(",", ":")).encode()
    options.file.write_bytes(lzma.compress(text, preset=9))
    print(f"{len(found)} cases, {options.file.stat().st_size} bytes in {options.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
