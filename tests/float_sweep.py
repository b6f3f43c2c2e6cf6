"""The legacy and VEX forms of a floating-point family, for sweeps against the host CPU.

``python -m tests.float_sweep CASES [SEED]`` sweeps all families, for as long as wanted.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from iced_x86 import EncodingKind

from sandbox.conformance import sweep
from sandbox.encodings import features_of, forms_of, info_of
from sandbox.handler import Pack
from tests.differential import HandlerSubject

FEATURES = frozenset("SSE SSE2 SSE3 SSE4_1 AVX FMA F16C".split())
FAMILIES = ("arithmetic", "compare", "convert", "fma", "horizontal", "round")


def forms(module: ModuleType) -> list[int]:
    """iced-x86 codes of all forms that the module's handlers are there for."""
    names = {name for handler in Pack.of("family", module).handlers for name in handler.mnemonics}
    served = (EncodingKind.LEGACY, EncodingKind.VEX)
    return [
        code
        for code in forms_of(*sorted(names))
        if info_of(code).encoding in served and features_of(code) <= FEATURES
    ]


def main(cases: int, seed: int) -> None:
    tried = differing = 0
    for family in FAMILIES:
        module = importlib.import_module(f"handlers.float_{family}")
        for verdict in sweep(HandlerSubject(module), forms(module), cases, seed):
            tried, differing = tried + verdict.cases, differing + verdict.differences
            if verdict.differences:
                print(f"{verdict.form}: {verdict.differences} of {verdict.cases}\n{verdict.first}")
        print(f"{family}: {tried} cases so far, {differing} differ", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
