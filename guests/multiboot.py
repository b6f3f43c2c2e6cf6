"""Multiboot kernels: which bytes of an image go where, and where it starts.

Source: the Multiboot Specification, version 0.6.96 (multiboot 1), 3.1. Images are 32-bit ELF files,
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


# ELF: System V ABI, chapters 4 and 5; Intel386 supplement.

_ELF_HEADER = struct.Struct("<4s5B7xHHIIIIIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<8I")
_ELF_32, _LITTLE_ENDIAN, _EXECUTABLE, _I386, _X86_64, _LOAD = 1, 1, 2, 3, 62, 1


class _ElfHeader(NamedTuple):
    magic: bytes
    class_: int
    data: int
    ident_version: int
    os_abi: int
    abi_version: int
    type: int
    machine: int
    version: int
    entry: int
    program_headers: int
    section_headers: int
    flags: int
    header_size: int
    program_header_size: int
    program_header_count: int
    section_header_size: int
    section_header_count: int
    section_names: int


class _ProgramHeader(NamedTuple):
    type: int
    offset: int
    address: int
    physical_address: int
    file_size: int
    memory_size: int
    flags: int
    alignment: int


def _elf(data: bytes) -> tuple[int, list[LoadSegment]]:
    header = _elf_header(data)
    start, count = header.program_headers, header.program_header_count
    end = start + count * _PROGRAM_HEADER.size
    if not count or header.program_header_size != _PROGRAM_HEADER.size:
        raise _Malformed("malformed ELF: it has no program headers of 32 bytes, so nothing to load")
    if end > len(data):
        raise _Malformed(f"truncated: program headers end at {end:#x}, the file has {len(data):#x}")
    headers = [_ProgramHeader(*fields) for fields in _PROGRAM_HEADER.iter_unpack(data[start:end])]
    entry, segments = header.entry, []
    for p in headers:
        if p.type != _LOAD or not p.memory_size:
            continue
        if p.offset + p.file_size > len(data):
            raise _Malformed(
                f"truncated: segment at {p.physical_address:#x} needs file bytes up to "
                f"{p.offset + p.file_size:#x}, the file has {len(data):#x}"
            )
        if p.file_size > p.memory_size:
            where = f"segment at {p.physical_address:#x}"
            raise _Malformed(f"malformed ELF: {where} is larger in the file than in memory")
        if p.address <= header.entry < p.address + p.memory_size:
            entry = header.entry - p.address + p.physical_address  # the entry is virtual
        content = data[p.offset : p.offset + p.file_size]
        segments.append(_segment(p.physical_address, content, p.memory_size))
    if not segments:
        raise _Malformed("malformed ELF: it has no segment to load")
    return entry, segments


def _elf_header(data: bytes) -> _ElfHeader:
    if data[:4] != b"\x7fELF":
        raise _Malformed("neither an ELF file nor a multiboot header with addresses")
    if len(data) < _ELF_HEADER.size:
        raise _Malformed(f"truncated: {len(data)} bytes, an ELF header has {_ELF_HEADER.size}")
    header = _ElfHeader(*_ELF_HEADER.unpack_from(data))
    if header.class_ != _ELF_32 or header.data != _LITTLE_ENDIAN or header.machine != _I386:
        raise _Malformed(
            "a multiboot kernel is a 32-bit i386 ELF file, or gives its addresses in the header; "
            "make a 64-bit one such a file with objcopy -O elf32-i386"
        )
    if header.type != _EXECUTABLE:
        raise _Malformed("not linked: a multiboot kernel is an executable with fixed addresses")
    return header
