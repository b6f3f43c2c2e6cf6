"""Guest images from files: what kind of guest it is, raw images, and static x86-64 ELF programs.

Pure parsing: nothing here touches a machine. Every bad file ends in one
:class:`~sandbox.errors.GuestImageError` that names the file, the reason and the way out.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from sandbox.errors import GuestImageError

MAX_FILE = 512 << 20
"""Largest image file that is read, in bytes."""
MAX_MEMORY = 4 << 30
"""Most memory that the segments of a program may span, in bytes."""
MULTIBOOT_SEARCHED = 8192
"""A multiboot header lies in so many bytes of a file."""
MULTIBOOT_HEADER = struct.Struct("<3I")
"""Its first words: magic, flags, checksum."""
_MULTIBOOT_MAGIC = (0x1BAD_B002).to_bytes(4, "little")
MULTIBOOT_HAS_ADDRESSES = 1 << 16
"""Flag: the header says where the image goes."""
USER_END = 1 << 47
"""End of the user half of the address space with 4-level paging (SDM Vol. 3A, 4.5)."""


class Kind(StrEnum):
    """What a guest file is."""

    ASM = "asm"
    RAW = "raw"
    ELF = "elf"
    MULTIBOOT = "multiboot"


_KIND_BY_SUFFIX = {".asm": Kind.ASM, ".s": Kind.ASM, ".bin": Kind.RAW}


@dataclass(frozen=True)
class LoadSegment:
    """Memory of ``memory_size`` bytes at ``address``: ``data``, then zeros."""

    address: int
    data: bytes
    memory_size: int
    readable: bool
    writable: bool
    executable: bool


@dataclass(frozen=True)
class TlsTemplate:
    """PT_TLS: where the initial image of each thread's thread-local storage lies."""

    address: int
    file_size: int
    memory_size: int
    alignment: int


@dataclass(frozen=True)
class ElfImage:
    """A static x86-64 program. All addresses are virtual.

    ``position_independent`` (static-pie): addresses start near 0, and the loader chooses a base
    (see :meth:`at`); the program relocates itself. ``headers_address`` is where the program
    headers lie in memory (AT_PHDR), 0 if no segment holds them. ``end`` is the first address
    after the highest segment, where the heap (brk) begins.
    """

    name: str
    entry: int
    segments: tuple[LoadSegment, ...]
    headers_address: int
    header_count: int
    header_size: int
    tls: TlsTemplate | None
    executable_stack: bool
    position_independent: bool
    bits: int = 64

    @property
    def end(self) -> int:
        """First address after the highest segment."""
        return max(segment.address + segment.memory_size for segment in self.segments)

    def at(self, base: int) -> ElfImage:
        """The image moved up by ``base``; only a position-independent one can move."""
        if not self.position_independent:
            raise GuestImageError(f"{self.name}: linked for fixed addresses, cannot be moved")
        if base % 4096 or not 0 <= base <= USER_END - self.end:
            raise GuestImageError(f"{self.name}: cannot be loaded at {base:#x}")
        return replace(
            self,
            entry=self.entry + base,
            segments=tuple(replace(s, address=s.address + base) for s in self.segments),
            headers_address=self.headers_address and self.headers_address + base,
            tls=self.tls and replace(self.tls, address=self.tls.address + base),
        )


def detect(path: str | Path) -> Kind:
    """What kind of guest a file is: ELF by its first bytes, the rest by its suffix."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(MULTIBOOT_SEARCHED)
    except OSError as error:
        raise _unreadable(path, error) from error
    if multiboot_header(start) is not None:
        return Kind.MULTIBOOT
    if start[:4] == b"\x7fELF":
        return Kind.ELF
    try:
        return _KIND_BY_SUFFIX[path.suffix.lower()]
    except KeyError:
        what = "a script, not a program" if start[:2] == b"#!" else "no ELF program"
        raise GuestImageError(
            f"{path}: {what}; a guest is a static x86-64 ELF program, "
            "an assembly file (.asm, .s), a raw image (.bin) or a multiboot kernel"
        ) from None


def multiboot_header(start: bytes) -> int | None:
    """Where the first 8192 bytes of a file hold a multiboot header: at a multiple of 4, with the
    right checksum (Multiboot Specification, 3.1). None if they hold none."""
    start = start[:MULTIBOOT_SEARCHED]
    at = start.find(_MULTIBOOT_MAGIC)
    while at >= 0:
        if at % 4 == 0 and at + MULTIBOOT_HEADER.size <= len(start):
            magic, flags, checksum = MULTIBOOT_HEADER.unpack_from(start, at)
            if (magic + flags + checksum) % (1 << 32) == 0:
                return at
        at = start.find(_MULTIBOOT_MAGIC, at + 1)
    return None


def load_raw(path: str | Path) -> bytes:
    """The bytes of a raw image."""
    data = read_file(path)
    if not data:
        raise GuestImageError(f"{path}: empty, there is nothing to run")
    return data


def read_file(path: str | Path) -> bytes:
    """The bytes of a guest file, at most :data:`MAX_FILE`."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(data) > MAX_FILE:
        raise GuestImageError(f"{path}: larger than {MAX_FILE >> 20} MiB, too large for a guest")
    return data


def _unreadable(path: str | Path, error: OSError) -> GuestImageError:
    return GuestImageError(f"{path}: cannot be read: {error.strerror or error}")


# ELF: System V ABI, chapters 4 and 5; AMD64 supplement, chapter 4 and 5.

_HEADER = struct.Struct("<4sBBBB8xHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_DYNAMIC_ENTRY = struct.Struct("<qQ")
_ET_REL, _ET_EXEC, _ET_DYN, _ET_CORE = 1, 2, 3, 4
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP, _PT_TLS, _PT_GNU_STACK = 1, 2, 3, 7, 0x6474E551
_PF_X, _PF_W, _PF_R = 1, 2, 4
_DT_NULL, _DT_NEEDED = 0, 1
_EM_X86_64 = 62
_MACHINES = {2: "SPARC", 3: "i386", 8: "MIPS", 20: "PowerPC", 21: "PowerPC64", 22: "S390"}
_MACHINES |= {40: "ARM", 50: "IA-64", 183: "AArch64", 243: "RISC-V", 258: "LoongArch"}
_MACHINES |= {_EM_X86_64: "x86-64"}
_NO_PROGRAMS = {
    _ET_REL: "an object file; link it (gcc -static)",
    _ET_CORE: "a core dump, not a program",
}
_OS_ABIS = {0: "System V", 3: "GNU/Linux"}


class _Header(NamedTuple):
    magic: bytes
    class_: int
    data: int
    ident_version: int
    os_abi: int
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
    flags: int
    offset: int
    address: int
    physical_address: int
    file_size: int
    memory_size: int
    alignment: int


def load_elf(source: str | Path | bytes) -> ElfImage:
    """Parse a static x86-64 Linux program (ET_EXEC or static-pie) from a path or its bytes."""
    name = "<bytes>" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else read_file(source)
    try:
        return _parse(name, data)
    except _Malformed as error:
        raise GuestImageError(f"{name}: {error}") from None


class _Malformed(Exception):
    """The reason alone; :func:`load_elf` puts the file's name before it."""


def _parse(name: str, data: bytes) -> ElfImage:
    header = _header(data)
    program_headers = _program_headers(data, header)
    _refuse_dynamic(data, program_headers)
    loads = [p for p in program_headers if p.type == _PT_LOAD and p.memory_size]
    _check_loads(data, loads)
    if not any(
        p.flags & _PF_X and p.address <= header.entry < p.address + p.memory_size for p in loads
    ):
        raise _Malformed(f"malformed ELF: its entry {header.entry:#x} is in no executable segment")
    return ElfImage(
        name=name,
        entry=header.entry,
        segments=tuple(
            LoadSegment(
                address=p.address,
                data=data[p.offset : p.offset + p.file_size],
                memory_size=p.memory_size,
                readable=bool(p.flags & _PF_R),
                writable=bool(p.flags & _PF_W),
                executable=bool(p.flags & _PF_X),
            )
            for p in loads
        ),
        headers_address=_headers_address(header, loads),
        header_count=header.program_header_count,
        header_size=header.program_header_size,
        tls=next((_tls(p, loads) for p in program_headers if p.type == _PT_TLS), None),
        executable_stack=any(p.type == _PT_GNU_STACK and p.flags & _PF_X for p in program_headers),
        position_independent=header.type == _ET_DYN,
    )


def _header(data: bytes) -> _Header:
    if data[:4] != b"\x7fELF":
        raise _Malformed("no ELF program (it does not begin with 7f 45 4c 46)")
    if len(data) < _HEADER.size:
        raise _Malformed(f"truncated: {len(data)} bytes, an ELF header has {_HEADER.size}")
    header = _Header(*_HEADER.unpack_from(data))
    machine = _MACHINES.get(header.machine, f"machine {header.machine}")
    if header.machine != _EM_X86_64 or header.class_ != 2 or header.data != 1:
        bits = {1: "32-bit", 2: "64-bit"}.get(header.class_, f"class {header.class_}")
        raise _Malformed(f"built for {bits} {machine}; only 64-bit x86-64 programs run here")
    if header.os_abi not in _OS_ABIS:
        raise _Malformed(f"built for OS ABI {header.os_abi}; only Linux programs run here")
    if header.type in _NO_PROGRAMS:
        raise _Malformed(_NO_PROGRAMS[header.type])
    if header.type not in (_ET_EXEC, _ET_DYN):
        raise _Malformed(f"malformed ELF: unknown type {header.type}")
    return header


def _program_headers(data: bytes, header: _Header) -> list[_ProgramHeader]:
    count, size, offset = (
        header.program_header_count,
        header.program_header_size,
        header.program_headers,
    )
    if not count:
        raise _Malformed("malformed ELF: it has no program headers, so nothing to load")
    if size != _PROGRAM_HEADER.size:
        raise _Malformed(f"malformed ELF: program headers of {size} bytes, not 56")
    if offset + count * size > len(data):
        raise _Malformed(
            f"truncated: {count} program headers at {offset:#x}, the file has {len(data)} bytes"
        )
    table = data[offset : offset + count * size]
    return [_ProgramHeader(*fields) for fields in _PROGRAM_HEADER.iter_unpack(table)]


def _refuse_dynamic(data: bytes, program_headers: list[_ProgramHeader]) -> None:
    for p in program_headers:
        content = data[p.offset : p.offset + p.file_size] if p.file_size <= len(data) else b""
        if p.type == _PT_INTERP:
            interpreter = content.rstrip(b"\0").decode(errors="replace")
            raise _Malformed(
                f"dynamically linked (wants {interpreter[:100]!r}); link it with gcc -static"
            )
        if p.type == _PT_DYNAMIC:
            whole = content[: len(content) // _DYNAMIC_ENTRY.size * _DYNAMIC_ENTRY.size]
            for tag, _value in _DYNAMIC_ENTRY.iter_unpack(whole):
                if tag == _DT_NULL:
                    break
                if tag == _DT_NEEDED:
                    raise _Malformed("needs shared libraries; link it with gcc -static")


def _check_loads(data: bytes, loads: list[_ProgramHeader]) -> None:
    if not loads:
        raise _Malformed("malformed ELF: it has no segment to load")
    end = 0
    for p in loads:
        where = f"segment at {p.address:#x}"
        if p.offset + p.file_size > len(data):
            raise _Malformed(
                f"truncated: {where} needs file bytes up to {p.offset + p.file_size:#x}, "
                f"the file has {len(data):#x}"
            )
        if p.file_size > p.memory_size:
            raise _Malformed(f"malformed ELF: {where} is larger in the file than in memory")
        if p.address + p.memory_size > USER_END:
            raise _Malformed(f"malformed ELF: {where} ends beyond the user address space")
        if p.address < end:
            raise _Malformed(f"malformed ELF: {where} overlaps the one before, or is out of order")
        end = p.address + p.memory_size
    if sum(p.file_size for p in loads) > len(data):
        raise _Malformed("malformed ELF: its segments share file bytes")
    if sum(p.memory_size for p in loads) > MAX_MEMORY or end - loads[0].address > MAX_MEMORY:
        raise _Malformed(f"its segments span more than {MAX_MEMORY >> 30} GiB of memory")


def _headers_address(header: _Header, loads: list[_ProgramHeader]) -> int:
    size = header.program_header_count * header.program_header_size
    for p in loads:
        if p.offset <= header.program_headers <= p.offset + p.file_size - size:
            return p.address + header.program_headers - p.offset
    return 0


def _tls(tls: _ProgramHeader, loads: list[_ProgramHeader]) -> TlsTemplate:
    if tls.file_size > tls.memory_size or tls.memory_size > MAX_MEMORY:
        raise _Malformed("malformed ELF: impossible size of thread-local storage")
    if tls.alignment & (tls.alignment - 1):
        raise _Malformed(f"malformed ELF: TLS alignment {tls.alignment:#x} is no power of two")
    if tls.file_size and not any(
        p.address <= tls.address <= p.address + p.file_size - tls.file_size for p in loads
    ):
        raise _Malformed("malformed ELF: thread-local storage begins outside the segments")
    return TlsTemplate(tls.address, tls.file_size, tls.memory_size, max(tls.alignment, 1))
