"""Unicorn's own shared library through ctypes: the few calls that the fast path needs.

The Python binding costs 2 to 30 us per call; these cost 0.1 to 0.2 us. ``uc_emu_start`` releases
the GIL, so that a watchdog can call ``uc_emu_stop``; all else keeps it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from sandbox.errors import EngineError

MINIMUM_VERSION = (2, 1, 4)

UC_ARCH_X86 = 4
UC_MODE_64 = 8

UC_ERR_OK = 0
UC_ERR_READ_UNMAPPED = 6
UC_ERR_WRITE_UNMAPPED = 7
UC_ERR_FETCH_UNMAPPED = 8
UC_ERR_INSN_INVALID = 10
UC_ERR_WRITE_PROT = 12
UC_ERR_READ_PROT = 13
UC_ERR_FETCH_PROT = 14
UC_ERR_EXCEPTION = 21

UC_HOOK_INTR = 1 << 0
UC_HOOK_CODE = 1 << 2
UC_HOOK_BLOCK = 1 << 3
UC_HOOK_MEM_INVALID = 0b111111 << 4
UC_HOOK_MEM_WRITE = 1 << 11
UC_HOOK_EDGE_GENERATED = 1 << 15

UC_PROT_ALL = 7
UC_PROT_READ_EXEC = 5

_CTL_USE_EXITS, _CTL_EXITS, _CTL_MODEL, _CTL_REMOVE_CACHE, _CTL_TB_FLUSH = 4, 6, 7, 9, 10


TRANSLATION_BLOCK = struct.Struct("QHH")
"""``uc_tb``: a translated block as UC_HOOK_EDGE_GENERATED reports it: address, number of
instructions, size."""

EdgeCallback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
"""The first two of its arguments, the engine and the new block: the others are not looked at, and
to take them would cost something for each block."""
BlockCallback = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p
)
InterruptCallback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)
MemoryCallback = ctypes.CFUNCTYPE(
    ctypes.c_bool,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint64,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_void_p,
)


def _find(file: str) -> Path:
    """A file of the package ``unicorn``, which is not imported: that takes 30 ms and more."""
    if sys.platform != "linux":
        raise EngineError(f"the fast path runs on Linux hosts, not on {sys.platform}")
    spec = importlib.util.find_spec("unicorn")
    if spec is None or not spec.submodule_search_locations:
        raise EngineError("the package 'unicorn' is not installed: pip install 'unicorn>=2.1.4'")
    for folder in spec.submodule_search_locations:
        found = Path(folder) / file
        if found.exists():
            return found
    raise EngineError(f"the package 'unicorn' has no {file}: reinstall it")


def _constants() -> Any:
    """Unicorn's own ``x86_const`` module."""
    spec = importlib.util.spec_from_file_location("x86_const", _find("x86_const.py"))
    if spec is None or spec.loader is None:
        raise EngineError("the package 'unicorn' has no readable x86_const.py: reinstall it")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


x86 = _constants()


class Library:
    """The loaded library; ``call`` keeps the GIL, ``free`` releases it."""

    def __init__(self, path: Path) -> None:
        self.call = ctypes.PyDLL(str(path))
        self.free = ctypes.CDLL(str(path))
        self.version = self._version()
        if self.version < MINIMUM_VERSION:
            have, want = (".".join(map(str, v)) for v in (self.version, MINIMUM_VERSION))
            raise EngineError(f"Unicorn {have} is too old: pip install 'unicorn>={want}'")

    def _version(self) -> tuple[int, int, int]:
        packed = int(self.call.uc_version(None, None))
        return packed >> 24 & 0xFF, packed >> 16 & 0xFF, packed >> 8 & 0xFF

    def check(self, error: int, what: str) -> None:
        """Raise :class:`EngineError` unless ``error`` is UC_ERR_OK."""
        if error != UC_ERR_OK:
            self.call.uc_strerror.restype = ctypes.c_char_p
            reason = self.call.uc_strerror(error).decode()
            raise EngineError(f"Unicorn: {what} failed: {reason}")

    def open(self) -> ctypes.c_void_p:
        """A new engine, opened for 64-bit so that all registers are in reach in any mode."""
        handle = ctypes.c_void_p()
        self.check(self.call.uc_open(UC_ARCH_X86, UC_MODE_64, ctypes.byref(handle)), "uc_open")
        return handle

    def use_model(self, handle: ctypes.c_void_p, model: int) -> None:
        """Choose the CPU model, before anything else is done with the engine."""
        error = self.call.uc_ctl(handle, _control(_CTL_MODEL, 1), ctypes.c_int(model))
        self.check(error, "uc_ctl set_cpu_model")

    def use_no_exits(self, handle: ctypes.c_void_p) -> None:
        """Make no address an exit: an ``until`` would invalidate its block at every stop."""
        on = ctypes.c_int(1)
        self.check(self.call.uc_ctl(handle, _control(_CTL_USE_EXITS, 1), on), "uc_ctl use_exits")
        none = (ctypes.c_uint64 * 1)()
        self.check(
            self.call.uc_ctl(handle, _control(_CTL_EXITS, 2), none, ctypes.c_size_t(0)),
            "uc_ctl set_exits",
        )

    def remove_cache(self, handle: ctypes.c_void_p, start: int, end: int) -> int:
        """Invalidate the translated blocks that overlap linear ``start`` .. ``end - 1``."""
        return int(
            self.call.uc_ctl(
                handle,
                _control(_CTL_REMOVE_CACHE, 2),
                ctypes.c_uint64(start),
                ctypes.c_uint64(end),
            )
        )

    def flush_blocks(self, handle: ctypes.c_void_p) -> None:
        """Forget every translated block."""
        self.check(self.call.uc_ctl(handle, _control(_CTL_TB_FLUSH, 0)), "uc_ctl flush_tb")


def _control(kind: int, arguments: int) -> ctypes.c_int:
    """The macro UC_CTL_WRITE of unicorn.h."""
    write = 1 << 30
    return ctypes.c_int(kind | arguments << 26 | write)


@lru_cache(maxsize=1)
def library() -> Library:
    """Unicorn's library, loaded once; EngineError says what is missing."""
    return Library(_find("lib/libunicorn.so.2"))
