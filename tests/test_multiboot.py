"""Multiboot images: what is read from them, what is refused and why, and how they start."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guests.assemble import assemble
from guests.load import Kind, detect, multiboot_header
from guests.multiboot import load_multiboot
from sandbox.abi import KVM_CAP_EXIT_ON_EMULATION_FAILURE as CAP
from sandbox.boot import Machine
from sandbox.errors import GuestImageError
from sandbox.exits import Hlt
from sandbox.multiboot import BOOT_MAGIC, boot_multiboot
from sandbox.platform.pc import PowerOff
from sandbox.registers import RAX, RBX
from sandbox.vm import Vm
from tests.command import Command
from tests.kvm_guest import KVM
from tests.multiboot_image import BASE, elf, flat, header, kernel

ENGINES = ["unicorn", pytest.param("kvm", marks=KVM)]
HALT = b"\xf4"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.mark.parametrize("at", [0, 4, 8180])
def test_a_header_is_found_at_multiples_of_4_in_the_first_8192_bytes(at: int) -> None:
    assert multiboot_header(bytes(at) + header()) == at


@pytest.mark.parametrize(
    "start",
    [b"", header()[:11], b"\0\0" + header(), bytes(8184) + header(), header()[:8] + b"\1\2\3\4"],
    ids=["empty", "cut", "not aligned", "too far", "checksum"],
)
def test_what_is_no_header(start: bytes) -> None:
    assert multiboot_header(start) is None


def test_a_false_header_does_not_hide_the_true_one() -> None:
    assert multiboot_header(header()[:4] * 3 + header(2)) == 12


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("kernel", elf(HALT), Kind.MULTIBOOT),
        ("kernel.bin", flat(HALT), Kind.MULTIBOOT),
        ("program", elf(HALT).replace(header(), bytes(12)), Kind.ELF),
        ("raw.bin", HALT, Kind.RAW),
    ],
)
def test_kinds_of_files(name: str, data: bytes, kind: Kind, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    assert detect(tmp_path / name) is kind


def test_elf_segments_go_to_their_physical_addresses() -> None:
    image = load_multiboot(
        elf(b"code", entry=0xC010_0002, address=0xC010_0000, physical=BASE, memory_size=0x3000)
    )
    assert image.entry == BASE + 2
    (segment,) = image.segments
    assert (segment.address, segment.data, segment.memory_size) == (BASE, b"code", 0x3000)
    assert image.end == BASE + 0x3000


def test_64_bit_elf_files_are_loaded_alike() -> None:
    start = struct.pack(
        "<4s5B7xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 0, 2, 62, 1, 0xFFFF_8000_0010_0000,
        64, 0, 0, 64, 56, 1, 64, 0, 0,
    )  # fmt: skip
    segment = (1, 7, 0x100, 0xFFFF_8000_0010_0000, BASE, 4, 0x2000, 0x1000)
    data = (start + struct.pack("<IIQQQQQQ", *segment) + header()).ljust(0x100, b"\0") + b"code"
    image = load_multiboot(data)
    assert image.entry == BASE
    assert (image.segments[0].data, image.segments[0].memory_size) == (b"code", 0x2000)


def test_addresses_in_the_header_count_before_elf() -> None:
    image = load_multiboot(flat(b"code", before=b"\x7fELF" + bytes(12), load=0x20_0000))
    (segment,) = image.segments
    assert segment.address == 0x20_0000
    assert segment.data[:4] == b"\x7fELF" and segment.data.endswith(b"code")
    assert image.entry == 0x20_0030


def test_flat_image_with_ends_and_bss() -> None:
    words = (0x30_0000, 0x30_0000, 0x30_0024, 0x30_1000, 0x30_0020)
    image = load_multiboot(header(1 << 16, words) + b"\xf4\xf4\xf4\xf4 not loaded")
    (segment,) = image.segments
    assert (len(segment.data), segment.memory_size) == (36, 0x1000)


WRONG = {
    "no header": (b"\x7fELF" + bytes(8300), "no multiboot kernel"),
    "wants video": (elf(HALT, flags=4), "0x4 is a video mode"),
    "unknown requirement": (elf(HALT, flags=0x8000), "flags 0x8000"),
    "class": (elf(HALT, class_=3), "neither 32 nor 64 bits"),
    "other machine": (elf(HALT, machine=40), "machine 40"),
    "object file": (elf(HALT, type_=1), "not linked"),
    "not ELF": (header().ljust(100, b"\0"), "neither an ELF file"),
    "header sizes": (elf(HALT, header_size=56), "program headers of 32 bytes"),
    "no segment": (elf(HALT, kind=4), "no segment to load"),
    "cut": (elf(bytes(100))[:-1], "truncated: segment at 0x100000"),
    "more file than memory": (elf(HALT * 9, memory_size=8), "larger in the file"),
    "entry": (elf(HALT, entry=5), "its entry 0x5 is in no segment"),
    "overlap": (elf(HALT, copies=2), "overlap at 0x100000"),
    "beyond 4 GiB": (elf(HALT * 9, physical=0xFFFF_FFFC), "beyond 4 GiB"),
    "flat, cut header": (header(1 << 16, (BASE,)), "its multiboot header ends with the file"),
    "flat, header before the image": (
        header(1 << 16, (BASE, BASE + 4, 0, 0, BASE)) + HALT, "cannot be loaded"
    ),
    "flat, too short": (
        header(1 << 16, (BASE, BASE, BASE + 100, 0, BASE)) + HALT, "more than the file has"
    ),
    "flat, negative": (
        header(1 << 16, (BASE, BASE, BASE - 4, 0, BASE)) + HALT, "more than the file has"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_images_are_refused_in_one_line(name: str) -> None:
    data, reason = WRONG[name]
    with pytest.raises(GuestImageError) as refused:
        load_multiboot(data)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


@given(st.binary(max_size=200), st.integers(0, 250), st.booleans())
def test_damaged_images_are_loaded_or_refused(damage: bytes, at: int, plain: bool) -> None:
    data = bytearray(flat(HALT * 64) if plain else elf(HALT * 64))
    data[at : at + len(damage)] = damage
    try:
        image = load_multiboot(bytes(data))
    except GuestImageError as error:
        assert "\n" not in str(error)
    else:
        assert all(s.address + s.memory_size <= 1 << 32 for s in image.segments)


# The machine


def boot(
    data: bytes, engine: str, line: str = "", ram: int = 16 << 20
) -> tuple[Machine, io.BytesIO]:
    vm = Vm("baseline", ["integer", "system"], engine=engine)
    vm.enable_cap(CAP)
    out = io.BytesIO()
    return boot_multiboot(vm, load_multiboot(data), out, line, ram=ram), out


@pytest.mark.parametrize("engine", ENGINES)
def test_the_machine_starts_as_the_specification_says(engine: str) -> None:
    found, _out = boot(kernel("mov ecx, cr0 \n mov edx, cs \n hlt"), engine)
    with found.vm:
        registers = found.vcpu.registers
        assert registers.gpr[RAX] == BOOT_MAGIC
        bank = registers.bank
        assert bank.read("cr0") & 0x8000_0001 == 1, "protected mode, no paging"
        for name in ("cs", "ds", "es", "fs", "gs", "ss"):
            segment = bank.read_segment(name)
            assert (segment.base, segment.limit, segment.db) == (0, 0xFFFF_FFFF, 1), name
        assert not registers.rflags & 0x2_0200, "IF and VM"
        assert isinstance(found.vcpu.run(10), Hlt)
        assert registers.gpr[1] & 0x8000_0001 == 1


@pytest.mark.parametrize("line", ["", "kernel a=b 'c d'", "x" * 4000])
def test_boot_information(line: str) -> None:
    found, _out = boot(kernel("hlt"), "unicorn", line, ram=48 << 20)
    with found.vm:
        memory, at = found.vm.memory, found.vcpu.registers.gpr[RBX]
        words = struct.unpack("<29I", memory.read(at, 116))
        assert words[0] == 0x24D, "memory, command line, modules (none), map, loader's name"
        assert (words[1], words[2]) == (639, 47 << 10)
        assert memory.read(words[4], len(line) + 1) == line.encode() + b"\0"
        assert words[5] == 0
        entries, map_at = b"", words[12]
        while map_at < words[12] + words[11]:
            size, base, length, kind = struct.unpack("<IQQI", memory.read(map_at, 24))
            entries += f"{base:#x}+{length:#x}:{kind} ".encode()
            map_at += size + 4
        assert entries == b"0x0+0x9fc00:1 0x100000+0x2f00000:1 "
        assert memory.read(words[16], 17) == b"unicorn-fallback\0"


@pytest.mark.parametrize(
    ("address", "size", "place"),
    [
        (BASE, 0x1000, 0x9_0000),
        (0x9_0000, 0x1000, 0x1000),
        (0x1000, 0x8_F001, 0x9_1000),
        (0x1000, 0x20_0000, 0x20_1000),
    ],
)
def test_boot_information_does_not_touch_the_image(address: int, size: int, place: int) -> None:
    found, _out = boot(elf(HALT, entry=address, address=address, memory_size=size), "unicorn")
    with found.vm:
        assert found.vcpu.registers.gpr[RBX] == place


@pytest.mark.parametrize("ram", [0, 4096, (2 << 20) + 1, 4 << 30])
def test_impossible_sizes_of_ram_are_refused(ram: int) -> None:
    with pytest.raises(GuestImageError, match="want a multiple of 0x1000, 2 MiB to 3072 MiB"):
        boot(kernel("hlt"), "unicorn", ram=ram)


def test_an_image_larger_than_ram_is_refused() -> None:
    with pytest.raises(GuestImageError, match="give it more"):
        boot(elf(HALT, memory_size=8 << 20), "unicorn", ram=8 << 20)


PRINT = """
    mov esi, [ebx + 16]
    mov edx, 0x3f8
again:
    lodsb
    out dx, al
    test al, al
    jnz again
    mov al, 10
    out dx, al
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_run_prints_the_command_line_and_ends_with_the_status(
    engine: str, tmp_path: Path, command: Command
) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(kernel(PRINT + "mov eax, 0x15 \n out 0xf4, eax \n hlt"))
    ended = command("run", "--engine", engine, "--memory", 4, path, "one", "two=3")
    assert ended.out == f"{path} one two=3\0\n"
    assert (ended.status, ended.err) == (0x15 << 1 | 1, "")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("hlt", 0),
        ("sti \n hlt", 0),
        ("mov eax, -1 \n out 0xf4, eax \n jmp $", 255),
        ("lea esi, [text] \n mov ecx, 8 \n mov edx, 0x8900 \n rep outsb \n jmp $ \n"
         "text: .ascii \"Shutdown\"", 0),
        ("mov al, 0xfe \n out 0x64, al \n jmp $", 0),
        ("lidt [0] \n ud2", 134),
    ],
    ids=[
        "hlt", "nothing to wait for", "debug exit", "shutdown port", "reset", "triple fault",
    ],
)  # fmt: skip
def test_ends(engine: str, end: str, status: int, tmp_path: Path, command: Command) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(kernel(end))
    ended = command("run", "--engine", engine, "--timeout", 20, path)
    if status == 134 and engine == "unicorn":
        assert ended.status == 132, "without an IDT the exception is the caller's"
    else:
        assert ended.status == status, ended.err


def test_a_flat_image_runs_too(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "kernel.bin"
    path.write_bytes(flat(assemble("mov al, 33 \n out 0xe9, al \n out 0xf4, al \n hlt", BASE, 32)))
    ended = command("run", path)
    assert (ended.out, ended.status) == ("!", 67)


def test_wrong_kernels_are_usage_errors(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(elf(HALT, flags=4))
    ended = command("run", path)
    assert ended.status == 2
    assert ended.line.startswith(f"{path}: its multiboot header asks for")


def test_ports_without_a_device_read_as_ones() -> None:
    found, _out = boot(kernel("mov al, 7 \n out 0x80, al \n in eax, 0x80 \n hlt"), "unicorn")
    with found.vm:
        assert isinstance(found.vcpu.run(10), Hlt)
        assert found.vcpu.registers.gpr[RAX] == 0xFFFF_FFFF


def test_power_off_can_be_told_from_other_ends() -> None:
    found, _out = boot(kernel("mov al, 1 \n out 0xf4, al \n hlt"), "unicorn")
    with found.vm:
        assert found.vcpu.run(10) == PowerOff(3)
        assert isinstance(found.vcpu.run(10), Hlt), "it can be run on"
