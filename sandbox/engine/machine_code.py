"""Pages of code for the host's own CPU, where the host lets us make any."""

from __future__ import annotations

import ctypes
import mmap
import platform


def executable_page(code: bytes = b"") -> mmap.mmap | None:
    """A page of x86-64 code, which may be rewritten; None on another CPU, or under a kernel that
    lets nobody make code."""
    if platform.machine() != "x86_64":
        return None
    rights = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=rights)
    except PermissionError:
        return None
    page[: len(code)] = code
    return page


def address_of(memory: mmap.mmap) -> int:
    """Host address of the first byte."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def function_address(function: object) -> int:
    """Host address of a function of a library."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]
