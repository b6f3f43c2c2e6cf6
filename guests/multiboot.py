"""Multiboot kernels: which bytes of an image go where, and where it starts.

Source: the Multiboot Specification, version 0.6.96 (multiboot 1), 3.1. Images are ELF files,
loaded at their physical addresses, or any file whose header gives the addresses itself. Pure
parsing, as in :mod:`guests.load`; :mod:`sandbox.multiboot` starts them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from guests.load import (
    MULTIBOOT_HAS_ADDRESSES,
    MULTIBOOT_HEADER,
    LoadSegment,
    multiboot_header,
    read_file,
)
from sandbox.errors import GuestImageError

_UNDERSTOOD: Final = 0x1_0003
"""Modules on page boundaries (there are none), memory information, addresses in the header."""
_REQUIRED: Final = 0xFFFF
_ADDRESSES = struct.Struct("<5I")
_LIMIT: Final = 1 << 32


@dataclass(frozen=True)
class MultibootImage:
    """A kernel: what goes where in physical memory, and where it starts."""

    name: str
    entry: int
    segments: tuple[LoadSegment, ...]

    @property
    def end(self) -> int:
        """First address after the highest segment."""
        return max(s.address + s.memory_size for s in self.segments)


class _Malformed(Exception):
    """The reason alone; :func:`load_multiboot` puts the file's name before it."""


def load_multiboot(source: str | Path | bytes) -> MultibootImage:
    """Parse a multiboot kernel from a path or its bytes.

    :class:`~sandbox.errors.GuestImageError` names what is wrong with it.
    """
    name = "<bytes>" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else read_file(source)
    try:
        entry, segments = _parse(data)
    except _Malformed as error:
        raise GuestImageError(f"{name}: {error}") from None
    return MultibootImage(name, entry, segments)


def _parse(data: bytes) -> tuple[int, tuple[LoadSegment, ...]]:
    at = multiboot_header(data)
    if at is None:
        raise _Malformed("no multiboot kernel: its first 8192 bytes hold no valid header")
    flags = MULTIBOOT_HEADER.unpack_from(data, at)[1]
    if flags & _REQUIRED & ~_UNDERSTOOD:
        raise _Malformed(
            f"its multiboot header asks for what this machine does not have "
            f"(flags {flags & _REQUIRED & ~_UNDERSTOOD:#x}; 0x4 is a video mode)"
        )
    entry, segments = _flat(data, at) if flags & MULTIBOOT_HAS_ADDRESSES else _elf(data)
    end = 0
    for segment in sorted(segments, key=lambda s: s.address):
        if segment.address < end:
            raise _Malformed(f"malformed: two segments overlap at {segment.address:#x}")
        end = segment.address + segment.memory_size
    if not any(s.address <= entry < s.address + s.memory_size for s in segments):
        raise _Malformed(f"malformed: its entry {entry:#x} is in no segment")
    return entry, tuple(segments)


def _segment(address: int, data: bytes, size: int) -> LoadSegment:
    if address + size > _LIMIT:
        raise _Malformed(f"malformed: the segment at {address:#x} ends beyond 4 GiB")
    return LoadSegment(address, data, size, True, True, True)


def _flat(data: bytes, at: int) -> tuple[int, list[LoadSegment]]:
    """An image whose header says where its bytes go (3.1.3)."""
    if at + MULTIBOOT_HEADER.size + _ADDRESSES.size > len(data):
        raise _Malformed("truncated: its multiboot header ends with the file")
    header, load, load_end, bss_end, entry = _ADDRESSES.unpack_from(
        data, at + MULTIBOOT_HEADER.size
    )
    start = at - (header - load)
    if not load <= header or start < 0:
        raise _Malformed(
            f"malformed: the header at file offset {at:#x} cannot be loaded at {header:#x} if the "
            f"image begins at {load:#x}"
        )
    size = load_end - load if load_end else len(data) - start
    if size <= 0 or start + size > len(data):
        raise _Malformed(
            f"truncated: it loads up to {load_end:#x}, which is more than the file has"
        )
    whole = max(size, bss_end - load if bss_end else 0)
    return entry, [_segment(load, data[start : start + size], whole)]


# ELF: System V ABI, chapters 4 and 5; Intel386 supplement. A 64-bit file is loaded alike, and
# starts in 32-bit mode like any other.

_EXECUTABLE, _LOAD, _LITTLE_ENDIAN = 2, 1, 1


class _Class(NamedTuple):
    """What the files of one ELF class look like; ``fields`` names those of a program header."""

    machine: int
    header: struct.Struct
    program_header: struct.Struct
    fields: tuple[str, ...]


_CLASSES: Final = {
    1: _Class(
        3,
        struct.Struct("<4s12xHHIIIIIHHHHHH"),
        struct.Struct("<8I"),
        tuple("type offset address physical file_size memory_size flags alignment".split()),
    ),
    2: _Class(
        62,
        struct.Struct("<4s12xHHIQQQIHHHHHH"),
        struct.Struct("<IIQQQQQQ"),
        tuple("type flags offset address physical file_size memory_size alignment".split()),
    ),
}


def _elf(data: bytes) -> tuple[int, list[LoadSegment]]:
    if data[:4] != b"\x7fELF":
        raise _Malformed("neither an ELF file nor a multiboot header with addresses")
    kind = _CLASSES.get(data[4])
    if kind is None or data[5] != _LITTLE_ENDIAN or len(data) < kind.header.size:
        raise _Malformed("malformed ELF: neither 32 nor 64 bits, not little-endian, or truncated")
    (
        _magic,
        type_,
        machine,
        _version,
        entry,
        start,
        _sections,
        _flags,
        _size,
        size,
        count,
        *_rest,
    ) = kind.header.unpack_from(data)
    if machine != kind.machine:
        raise _Malformed(f"built for machine {machine}; a multiboot kernel is i386 or x86-64")
    if type_ != _EXECUTABLE:
        raise _Malformed("not linked: a multiboot kernel is an executable with fixed addresses")
    if not count or size != kind.program_header.size:
        raise _Malformed(
            f"malformed ELF: it has no program headers of {kind.program_header.size} bytes, so "
            "nothing to load"
        )
    end = start + count * size
    if end > len(data):
        raise _Malformed(f"truncated: program headers end at {end:#x}, the file has {len(data):#x}")
    headers = (
        dict(zip(kind.fields, values, strict=True))
        for values in kind.program_header.iter_unpack(data[start:end])
    )
    return _load(data, entry, [p for p in headers if p["type"] == _LOAD and p["memory_size"]])


def _load(
    data: bytes, virtual_entry: int, headers: list[dict[str, int]]
) -> tuple[int, list[LoadSegment]]:
    """The physical entry and the segments of program headers."""
    if not headers:
        raise _Malformed("malformed ELF: it has no segment to load")
    entry, segments = virtual_entry, []
    for p in headers:
        where = f"segment at {p['physical']:#x}"
        end = p["offset"] + p["file_size"]
        if end > len(data):
            raise _Malformed(
                f"truncated: {where} needs file bytes up to {end:#x}, the file has {len(data):#x}"
            )
        if p["file_size"] > p["memory_size"]:
            raise _Malformed(f"malformed ELF: {where} is larger in the file than in memory")
        if p["address"] <= virtual_entry < p["address"] + p["memory_size"]:
            entry = virtual_entry - p["address"] + p["physical"]
        segments.append(_segment(p["physical"], data[p["offset"] : end], p["memory_size"]))
    return entry, segments
