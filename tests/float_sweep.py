"""The legacy and VEX forms of a floating-point family, for sweeps against the host CPU."""

from __future__ import annotations

from types import ModuleType

from iced_x86 import EncodingKind

from sandbox.encodings import features_of, forms_of, info_of
from sandbox.handler import Pack

FEATURES = frozenset("SSE SSE2 SSE3 SSE4_1 AVX FMA F16C".split())


def forms(module: ModuleType) -> list[int]:
    """iced-x86 codes of all forms that the module's handlers are there for."""
    names = {name for handler in Pack.of("family", module).handlers for name in handler.mnemonics}
    served = (EncodingKind.LEGACY, EncodingKind.VEX)
    return [
        code
        for code in forms_of(*sorted(names))
        if info_of(code).encoding in served and features_of(code) <= FEATURES
    ]
