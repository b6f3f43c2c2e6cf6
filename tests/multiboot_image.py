"""Multiboot images for tests: small kernels, and ones with something wrong."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from guests.assemble import assemble

BASE = 0x10_0000
MAGIC = 0x1BAD_B002


def header(flags: int = 0, addresses: Sequence[int] = ()) -> bytes:
    """A valid header."""
    words = (MAGIC, flags, -(MAGIC + flags) & 0xFFFF_FFFF, *addresses)
    return struct.pack(f"<{len(words)}I", *words)


def elf(
    body: bytes,
    *,
    entry: int = BASE,
    address: int = BASE,
    physical: int | None = None,
    memory_size: int | None = None,
    flags: int = 0,
    class_: int = 1,
    machine: int = 3,
    type_: int = 2,
    header_size: int = 32,
    kind: int = 1,
    copies: int = 1,
) -> bytes:
    """A 32-bit ELF file with ``body`` as its one segment, and a multiboot header behind its own."""
    physical = address if physical is None else physical
    size = len(body) if memory_size is None else memory_size
    offset = 0x1000
    segment = struct.pack(
        "<8I", kind, offset, address, physical, len(body), size, 7, 0x1000
    ) * copies  # fmt: skip
    start = struct.pack(
        "<4s5B7xHHIIIIIHHHHHH", b"\x7fELF", class_, 1, 1, 0, 0, type_, machine, 1, entry,
        52, 0, 0, 52, header_size, copies, 40, 0, 0,
    )  # fmt: skip
    return (start + segment + header(flags)).ljust(offset, b"\0") + body


def flat(code: bytes, *, load: int = BASE, before: bytes = b"") -> bytes:
    """An image whose header gives the addresses: ``before``, the header, ``code``."""
    at = load + len(before)
    start = header(1 << 16, (at, load, 0, 0, at + 32))
    return before + start + code


def kernel(source: str) -> bytes:
    """A kernel from 32-bit assembly."""
    return elf(assemble(source, BASE, 32))
