"""Guest files: real programs load as readelf sees them; bad files end in one clear line."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from guests.load import MAX_MEMORY, ElfImage, Kind, detect, load_elf, load_raw
from guests.samples import PREBUILT
from sandbox.errors import GuestImageError

DEMO = PREBUILT.read_bytes()
HEADERS = 64
"""Where the program headers of the demo begin."""


def patched(offset: int, form: str, value: int, data: bytes = DEMO) -> bytes:
    copy = bytearray(data)
    struct.pack_into(form, copy, offset, value)
    return bytes(copy)


def header_offset(kind: int, nth: int = 0) -> int:
    """File offset of the demo's nth program header of type ``kind``."""
    count = struct.unpack_from("<H", DEMO, 56)[0]
    found = [
        offset
        for offset in range(HEADERS, HEADERS + 56 * count, 56)
        if struct.unpack_from("<I", DEMO, offset)[0] == kind
    ]
    return found[nth]


LOAD = header_offset(1)


def test_prebuilt_demo_loads() -> None:
    image = load_elf(PREBUILT)
    assert not image.position_independent
    assert image.bits == 64
    assert image.headers_address == 0x400040
    assert image.header_size == 56
    code = next(s for s in image.segments if s.executable)
    assert code.address <= image.entry < code.address + len(code.data)
    assert not any(s.writable and s.executable for s in image.segments)
    assert load_elf(DEMO).segments == image.segments
    assert image.end == image.segments[-1].address + image.segments[-1].memory_size


def compile_c(tmp_path: Path, *options: str) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    target = tmp_path / "program"
    source = "__thread int a = 5, b; int main(void) { return a + b; }"
    command = ["gcc", "-x", "c", "-", "-o", str(target), *options]
    if subprocess.run(command, input=source, text=True, capture_output=True).returncode:
        pytest.skip(f"gcc cannot link with {options}")
    return target


def test_segments_and_tls_agree_with_elftools(tmp_path: Path) -> None:
    elffile = pytest.importorskip("elftools.elf.elffile")
    path = compile_c(tmp_path, "-static")
    image = load_elf(path)
    with path.open("rb") as file:
        elf = elffile.ELFFile(file)
        theirs = [s for s in elf.iter_segments() if s["p_type"] == "PT_LOAD"]
        assert image.entry == elf["e_entry"]
        assert image.header_count == elf["e_phnum"]
        for ours, segment in zip(image.segments, theirs, strict=True):
            assert (ours.address, ours.memory_size) == (segment["p_vaddr"], segment["p_memsz"])
            assert ours.data == segment.data()
            flags = ours.readable * 4 | ours.writable * 2 | ours.executable
            assert flags == segment["p_flags"]
        tls = next(s for s in elf.iter_segments() if s["p_type"] == "PT_TLS")
        assert image.tls is not None
        assert (image.tls.address, image.tls.file_size, image.tls.memory_size) == (
            tls["p_vaddr"],
            tls["p_filesz"],
            tls["p_memsz"],
        )


def test_static_pie_can_be_moved_and_others_cannot(tmp_path: Path) -> None:
    image = load_elf(compile_c(tmp_path, "-static-pie"))
    assert image.position_independent
    moved = image.at(0x400000)
    assert moved.entry == image.entry + 0x400000
    assert moved.headers_address == image.headers_address + 0x400000
    assert [s.address for s in moved.segments] == [s.address + 0x400000 for s in image.segments]
    assert image.tls and moved.tls and moved.tls.address == image.tls.address + 0x400000
    for base in (1, -4096, 1 << 47):
        with pytest.raises(GuestImageError, match="cannot be loaded at"):
            image.at(base)
    with pytest.raises(GuestImageError, match="fixed addresses"):
        load_elf(PREBUILT).at(0x1000)


@pytest.mark.parametrize("options", [(), ("-shared", "-fPIC")])
def test_dynamic_programs_are_refused_with_the_cure(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(GuestImageError, match=r"(dynamically|shared libraries).*gcc -static"):
        load_elf(compile_c(tmp_path, *options))


def test_object_file_is_refused_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(GuestImageError, match="an object file; link it"):
        load_elf(compile_c(tmp_path, "-c"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no ELF program"),
        (b"MZ" + DEMO[2:], "no ELF program"),
        (DEMO[:40], "truncated: 40 bytes"),
        (DEMO[:100], "truncated: . program headers at 0x40"),
        (DEMO[:-2000], "truncated: segment at 0x"),
        (patched(4, "<B", 1), "built for 32-bit x86-64"),
        (patched(5, "<B", 2), "only 64-bit x86-64 programs run here"),
        (patched(7, "<B", 9), "only Linux programs"),
        (patched(18, "<H", 183), "built for 64-bit AArch64"),
        (patched(18, "<H", 9999), "machine 9999"),
        (patched(16, "<H", 4), "core dump"),
        (patched(16, "<H", 77), "unknown type 77"),
        (patched(24, "<Q", 0), "entry 0x0 is in no executable segment"),
        (patched(32, "<Q", 1 << 63), "truncated: . program headers at 0x8000000000000000"),
        (patched(54, "<H", 32), "program headers of 32 bytes"),
        (patched(56, "<H", 0), "no program headers"),
        (patched(56, "<H", 0xFFFF), "truncated: 65535 program headers"),
        (patched(LOAD + 8, "<Q", 1 << 62), "truncated: segment at"),
        (patched(LOAD + 16, "<Q", 0xFFFF_8000_0000_0000), "beyond the user address space"),
        (patched(LOAD + 16, "<Q", 0x402000), "overlaps the one before"),
        (patched(LOAD + 40, "<Q", 1), "larger in the file than in memory"),
        (patched(header_offset(1, 3) + 40, "<Q", 1 << 60), "beyond the user address space"),
        (patched(header_offset(1, 3) + 40, "<Q", 1 << 40), "more than 4 GiB"),
    ],
)
def test_malformed_elf_is_refused_in_one_line(data: bytes, reason: str) -> None:
    with pytest.raises(GuestImageError, match=f"^<bytes>: .*{reason}") as caught:
        load_elf(data)
    assert "\n" not in str(caught.value)


def valid(image: ElfImage) -> bool:
    return (
        sum(s.memory_size for s in image.segments) <= MAX_MEMORY
        and sum(len(s.data) for s in image.segments) <= len(DEMO)
        and all(len(s.data) <= s.memory_size for s in image.segments)
        and all(s.address >= 0 and s.address + s.memory_size <= 1 << 47 for s in image.segments)
        and any(s.address <= image.entry < s.address + s.memory_size for s in image.segments)
    )


def test_corrupted_elf_gives_an_error_or_a_valid_image() -> None:
    rng = random.Random(1)
    specials = (0, 1, 0x7F, 0x80, 0xFF)
    outcomes = set()
    for _ in range(4000):
        copy = bytearray(DEMO[: rng.choice([len(DEMO)] * 4 + [rng.randrange(len(DEMO))])])
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(min(len(copy), 64 + 56 * 8) or 1)
            if at < len(copy):
                copy[at] = rng.choice([rng.randrange(256), *specials])
        try:
            assert valid(load_elf(bytes(copy)))
            outcomes.add("loaded")
        except GuestImageError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"loaded", "refused"}


def test_kinds_are_told_by_content_and_suffix(tmp_path: Path) -> None:
    for name, kind in [("a.asm", "asm"), ("a.s", "asm"), ("a.S", "asm"), ("a.bin", "raw")]:
        path = tmp_path / name
        path.write_bytes(b"hlt")
        assert detect(path) == kind
    assert detect(PREBUILT) is Kind.ELF
    renamed = tmp_path / "elf.bin"
    renamed.write_bytes(DEMO)
    assert detect(renamed) is Kind.ELF


@pytest.mark.parametrize(("content", "what"), [(b"#!/bin/sh\n", "a script"), (b"x", "no ELF")])
def test_unknown_kind_is_refused_with_what_is_possible(
    content: bytes, what: str, tmp_path: Path
) -> None:
    path = tmp_path / "guest"
    path.write_bytes(content)
    with pytest.raises(GuestImageError, match=rf"guest: {what}.*\.asm, \.s.*\.bin"):
        detect(path)


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing.bin"
    for read in (detect, load_raw, load_elf):
        with pytest.raises(GuestImageError, match=r"missing\.bin: cannot be read: No such file"):
            read(missing)
        with pytest.raises(GuestImageError, match="cannot be read: Is a directory"):
            read(tmp_path)


def test_file_without_read_permission_is_named(tmp_path: Path) -> None:
    path = tmp_path / "secret.bin"
    path.write_bytes(b"\xf4")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("running as root: every file is readable")
    with pytest.raises(GuestImageError, match="Permission denied"):
        load_raw(path)


def test_raw_image_is_its_bytes_and_an_empty_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "guest.bin"
    path.write_bytes(b"\xf4")
    assert load_raw(path) == b"\xf4"
    path.write_bytes(b"")
    with pytest.raises(GuestImageError, match="empty"):
        load_raw(path)
