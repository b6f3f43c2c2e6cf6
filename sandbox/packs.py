"""Handler packs by name: those of the project, those of installed packages, a user's file.

A pack is found as: the module ``handlers.NAME`` with a ``PACK``; an entry point ``NAME`` in the
group ``unicorn_fallback.handlers`` whose value is a :class:`~sandbox.handler.Pack` (or a module or
list of handlers); or the path of a Python file, all of whose handlers are taken.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import handlers
from sandbox.errors import SandboxError
from sandbox.handler import Pack

GROUP = "unicorn_fallback.handlers"


def _entry_points(name: str | None = None) -> list[Any]:
    from importlib.metadata import entry_points  # slow, and needed for foreign packs only

    return list(entry_points(group=GROUP, name=name) if name else entry_points(group=GROUP))


def pack_names() -> list[str]:
    """All packs that can be named, sorted."""
    return sorted({*handlers.PACKS, *(point.name for point in _entry_points())})


def find_pack(source: str | Path | Pack) -> Callable[[], Pack] | None:
    """How to load one of the project's own packs later; None for anything else."""
    if isinstance(source, str) and source in handlers.PACKS:
        return lambda: load_pack(source)
    return None


def load_pack(source: str | Path | Pack) -> Pack:
    """The pack of that name, or of that file (``.py``); a Pack is itself."""
    if isinstance(source, Pack):
        return source
    if isinstance(source, Path) or source.endswith(".py"):
        return _from_file(Path(source))
    if source in handlers.PACKS:
        return _as_pack(source, importlib.import_module(handlers.PACKS[source]))
    for point in _entry_points(source):
        return _as_pack(source, point.load())
    names = pack_names()
    near = difflib.get_close_matches(source, names, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names)}"
    raise SandboxError(f"no handler pack is named {source!r}; {hint} (a file ends in .py)")


def _as_pack(name: str, found: Any) -> Pack:
    pack = getattr(found, "PACK", found)
    return pack if isinstance(pack, Pack) else Pack.of(name, pack)


def _from_file(path: Path) -> Pack:
    name = path.stem
    spec = importlib.util.spec_from_file_location(f"sandbox_user_handlers_{name}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SandboxError(f"{path}: no such file of handlers")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise SandboxError(f"{path}: {type(error).__name__}: {error}") from error
    pack = _as_pack(name, module)
    if not pack.handlers:
        raise SandboxError(f"{path}: defines no handler; decorate one with @handler(...)")
    return pack
