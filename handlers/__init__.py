"""The handler tier: instruction semantics by family of operation.

``PACKS`` names the packs that come with the project and the modules that hold them as ``PACK``, a
:class:`sandbox.handler.Pack`. Modules are imported when asked for.
"""

from __future__ import annotations

from typing import Final

PACKS: Final = {
    "amd": "handlers.amd",
    "avx2": "handlers.avx2",
    "integer": "handlers.integer_pack",
    "linux": "handlers.linux",
    "mmx": "handlers.mmx",
    "system": "handlers.system",
    "x87": "handlers.x87_pack",
}
