"""Every bad input ends in one clear line on stderr and the right status, never in a traceback."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest

from guests.assemble import assemble
from sandbox.errors import MemoryMapError
from sandbox.vm import Vm
from tests.command import Command
from tests.test_cli import DEMO, write
from tests.test_linux_programs import elf

HLT_ELF = elf("hlt")


@pytest.fixture
def sandbox(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def patched(data: bytes, at: int, fmt: str, value: int) -> bytes:
    image = bytearray(data)
    struct.pack_into(fmt, image, at, value)
    return bytes(image)


# Guest images

IMAGES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("g.bin", b"", "empty"),
    "neither": ("g.dat", b"hello", "g.dat: "),
    "malformed ELF": ("g", b"\x7fELF" + b"\xff" * 100, "g: "),
    "ELF magic alone": ("g", b"\x7fELF", "g: "),
    "truncated program": ("g", DEMO.read_bytes()[:5000], "g: "),
    "truncated headers": ("g", HLT_ELF[:70], "g: "),
    "32-bit ELF": ("g", patched(HLT_ELF, 4, "B", 1), "64-bit"),
    "other machine": ("g", patched(HLT_ELF, 18, "<H", 183), "g: "),
    "object file": ("g", patched(HLT_ELF, 16, "<H", 1), "g: "),
    "segment beyond the file": ("g", patched(HLT_ELF, 64 + 32, "<Q", 1 << 40), "g: "),
    "segment in the upper half": ("g", patched(HLT_ELF, 64 + 16, "<Q", 0xFFFF << 48), "g: "),
    "more program headers than fit": ("g", patched(HLT_ELF, 56, "<H", 0xFFFF), "g: "),
    "entry outside": ("g", patched(HLT_ELF, 24, "<Q", 0x10), "executable"),
    "too large for its RAM": ("g", patched(HLT_ELF, 64 + 40, "<Q", 2 << 30), ""),
    "raw image too large": ("g.bin", b"\x90" * ((64 << 20) + 1), "does not fit"),
    "not text": ("g.asm", b"nop\n\xff\xfe\n", "g.asm"),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_guest_images(name: str, tmp_path: Path, sandbox: Command) -> None:
    filename, content, text = IMAGES[name]
    ended = sandbox("run", "--timeout", "5", write(tmp_path / filename, content))
    assert text in ended.line
    assert ended.status == 2


@pytest.mark.parametrize("command", ["run", "explain"])
def test_files_that_cannot_be_read(command: str, tmp_path: Path, sandbox: Command) -> None:
    missing = sandbox(command, tmp_path / "missing.bin")
    assert missing.status == 2 and "missing.bin" in missing.line
    folder = tmp_path / "folder.bin"
    folder.mkdir()
    ended = sandbox(command, folder)
    assert ended.status == 2 and "folder.bin" in ended.line
    ended = sandbox(command, "/proc/self/mem")
    assert ended.status == 2 and "/proc/self/mem" in ended.line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path, sandbox: Command) -> None:
    path = write(tmp_path / "guest.bin", b"\xf4")
    path.chmod(0)
    ended = sandbox("run", path)
    assert ended.status == 2 and "Permission denied" in ended.line


@pytest.mark.parametrize(
    ("source", "line", "text"),
    [
        ("nop\nmvo eax, 1\nhlt", 2, "mvo eax, 1"),
        ("nop\n\nmov eax,\nhlt", 3, "mov eax,"),
        ("jmp nowhere", 1, "nowhere"),
        ("a: nop\na: nop", 2, "a"),
        ("vaddps zmm0, zmm1, [rax + 64]", 1, "zmm0"),
        (".byte 256", 1, "256"),
        ("", 1, ""),
        ("; only a comment", 1, ""),
    ],
)
def test_assembly_errors_name_file_and_line(
    source: str, line: int, text: str, tmp_path: Path, sandbox: Command
) -> None:
    ended = sandbox("run", write(tmp_path / "guest.asm", source))
    assert ended.status == 2
    assert f"guest.asm:{line}: " in ended.line or (not text and "empty" in ended.line)
    assert text in ended.line


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--base", "0x4000001"), "does not fit"),
        (("--base", "-1"), ""),
        (("--base", "0x100000", "--mode", "real"), "0x100000"),
        (("--base", "zero"), "'zero' is no number"),
        (("--timeout", "soon"), "'soon'"),
        (("--timeout", "0"), "'0'"),
        (("--timeout", "nan"), "'nan'"),
        (("--max-exits", "0"), "'0'"),
        (("--mode", "vm86"), "'vm86'"),
        (("--unhandled", "ignore"), "'ignore'"),
        (("--env", "NOVALUE"), "'NOVALUE'"),
        (("--memory", "-5"), "'-5'"),
        (("--frobnicate",), "--frobnicate"),
        (("--policy", "basline"), "baseline"),
        (("--policy", "nowhere.toml"), "nowhere.toml"),
        (("--handlers", "avx3"), "avx2"),
        (("--handlers", "nowhere.py"), "nowhere.py"),
    ],
)
def test_options(options: tuple[str, ...], text: str, tmp_path: Path, sandbox: Command) -> None:
    ended = sandbox("run", *options, write(tmp_path / "guest.asm", "hlt"))
    assert ended.status == 2
    assert text in ended.err
    assert "Traceback" not in ended.err
    assert ended.err.startswith(("sandbox: ", "usage: "))


def test_root_that_is_no_directory(tmp_path: Path, sandbox: Command) -> None:
    program = write(tmp_path / "program", HLT_ELF)
    for root in (tmp_path / "missing", program):
        ended = sandbox("run", "--root", root, program)
        assert ended.status == 2 and str(root) in ended.line


def test_too_little_memory_for_a_program(tmp_path: Path, sandbox: Command) -> None:
    ended = sandbox("run", "--memory", "1", DEMO)
    assert ended.status == 2
    assert "memory" in ended.line.lower() or "RAM" in ended.line


@pytest.mark.parametrize("report", ["missing/report.json", "."])
def test_a_report_that_cannot_be_written(report: str, tmp_path: Path, sandbox: Command) -> None:
    program = write(tmp_path / "guest.asm", "hlt")
    ended = sandbox("run", "--report", tmp_path / report, program)
    assert ended.status == 2 and "report cannot be written" in ended.line


# Policies


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[rule]]\naction = "allow"\nmnemonic = "vpadd"\n', "p.toml:3: "),
        ('[[rule]]\naction = "allow"\nmnemonic = ["add", "popcount"]\n', "'popcount'"),
        ('[[rule]]\naction = "permit"\nmnemonic = "add"\n', "p.toml:2: "),
        ('[[rule]]\naction = "allow"\n', "p.toml:1: "),
        ('[[rule]]\naction = "allow"\nbytes = "0x"\n', "p.toml:3: "),
        ('[[rule]\naction = "allow"\n', "p.toml:1"),
        ('unhandled = "retry"\n', "p.toml:1: "),
        ('extends = "base"\n', "baseline"),
        ('extends = "p.toml"\n', "p.toml"),
        ("colour = 1\n", "colour"),
        (b"\xff\xfe", "p.toml"),
    ],
)
def test_policies(text: str | bytes, message: str, tmp_path: Path, sandbox: Command) -> None:
    policy = write(tmp_path / "p.toml", text)
    for command in ("run", "explain"):
        ended = sandbox(command, "--policy", policy, write(tmp_path / "guest.asm", "hlt"))
        assert ended.status == 2
        assert message in ended.line


# Handlers

IMPORT = "from sandbox.handler import handler\n"
BYTES = IMPORT + "@handler(pattern='0f 3f')\ndef mine(cpu, insn):\n    {}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n", "SyntaxError"),
        ("import nowhere_at_all\n", "ModuleNotFoundError"),
        ("1 / 0\n", "ZeroDivisionError"),
        ("x = 1\n", "defines no handler"),
        (IMPORT + "@handler()\ndef f(cpu, insn): pass\n", "give a mnemonic"),
        (IMPORT + "@handler(pattern='0g')\ndef f(c, i): pass\n", "no hex digit"),
        (b"\xff\xfe\x00", "mine.py"),
        ("raise SystemExit(3)\n", "SystemExit"),
    ],
)  # fmt: skip
def test_handler_files(text: str | bytes, message: str, tmp_path: Path, sandbox: Command) -> None:
    path = write(tmp_path / "mine.py", text)
    ended = sandbox("run", "--handlers", path, write(tmp_path / "guest.asm", "hlt"))
    assert ended.status == 2
    assert str(path) in ended.line and message in ended.line


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("raise ValueError('two\\nlines')", "ValueError: two"),
        ("cpu.gpr[99] = 1", "IndexError"),
        ("cpu.gpr[0] = -1", "ValueError"),
        ("cpu.nothing()", "AttributeError"),
        ("mine(cpu, insn)", "RecursionError"),
        ("assert False", "AssertionError"),
        ("raise OSError(5, 'io')", "OSError"),
        ("return 5", "mine"),
        ("raise SystemExit(0)", ""),
    ],
)
def test_a_handler_that_raises_stops_the_run_with_its_name(
    body: str, text: str, tmp_path: Path, sandbox: Command
) -> None:
    handlers = write(tmp_path / "mine.py", BYTES.format(body))
    program = write(tmp_path / "guest.asm", ".byte 0x0f, 0x3f\n hlt")
    report = tmp_path / "report.json"
    ended = sandbox("run", "--handlers", handlers, "--report", report, program)
    assert ended.status == 70
    assert ended.line.startswith("handler sandbox_user_handlers_mine.mine failed on ")
    assert "0f 3f" in ended.line and text in ended.line
    assert ended.line.endswith("at 0x1000")
    assert '"status": 70' in report.read_text()


def test_a_handler_that_loops_is_stopped_by_the_timeout(tmp_path: Path, sandbox: Command) -> None:
    handlers = write(tmp_path / "mine.py", BYTES.format("while True: pass"))
    program = write(tmp_path / "guest.asm", ".byte 0x0f, 0x3f")
    ended = sandbox("run", "--handlers", handlers, "--timeout", "0.2", program)
    assert ended.status == 124
    assert "mine was still running on " in ended.line and "0f 3f" in ended.line


# Guests


@pytest.mark.parametrize(
    ("mode", "source"),
    [
        ("long", "mov eax, 0x70000000\n jmp rax"),
        ("long", "mov rax, 0x123456789000\n jmp rax"),
        ("long", "mov rax, 0x8000000000000000\n jmp rax"),
        ("long", "push 0x7000000\n ret"),
        ("protected", "mov eax, 0x70000000\n jmp eax"),
        ("real", ".byte 0xea, 0, 0x10, 0xff, 0xff"),
        ("long", "mov eax, [rbx + 0x50000000]"),
        ("long", "mov [rbx + 0x50000000], eax"),
        ("protected", "mov [0x50000000], eax"),
    ],
)
def test_a_guest_that_leaves_its_memory(
    mode: str, source: str, tmp_path: Path, sandbox: Command
) -> None:
    ended = sandbox("run", "--mode", mode, write(tmp_path / "guest.asm", source))
    assert ended.status == 139
    assert " at 0x" in ended.line or "at 0x" in ended.line


def test_a_program_that_leaves_its_memory(tmp_path: Path, sandbox: Command) -> None:
    for source in ("xor eax, eax\n jmp rax", "xor eax, eax\n mov [rax], al", "push 1\n popf\n ud2"):
        ended = sandbox("run", write(tmp_path / "program", elf(source)))
        assert ended.status == (132 if "ud2" in source else 139)
        assert ended.line


def test_a_guest_that_puts_a_forbidden_instruction_over_its_code(
    tmp_path: Path, sandbox: Command
) -> None:
    source = """
        mov ecx, 2
    again:
        nop
    place:
        .byte 0x90, 0x90, 0x90, 0x90
        mov dword ptr [rip + place], 0xc258f4c5     # vaddps ymm0, ymm1, ymm2
        dec ecx
        jnz again
        hlt
    """
    program = write(tmp_path / "guest.asm", source)
    ended = sandbox("run", "--handlers", "none", program)
    assert ended.status == 132
    assert ended.line == "no handler takes 'vaddps ymm0, ymm1, ymm2' at 0x1006 (#UD)"


@pytest.mark.parametrize("raw", ["06", "0fff", "f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0", "62", "c4"])
def test_bytes_that_are_no_instruction(raw: str, tmp_path: Path, sandbox: Command) -> None:
    ended = sandbox("run", write(tmp_path / "guest.bin", bytes.fromhex(raw)))
    assert ended.status in (132, 139)
    assert "0x1000" in ended.line


def test_a_guest_that_loops_is_stopped_by_the_timeout(tmp_path: Path, sandbox: Command) -> None:
    ended = sandbox("run", "--timeout", "0.2", write(tmp_path / "program", elf("l: jmp l")))
    assert ended.status == 124
    assert ended.line == "still running after 0.2 s, at 0x400078"


def test_running_off_the_end_of_the_image(tmp_path: Path, sandbox: Command) -> None:
    """Zeros are `add [rax], al`; the end of the executable pages is a #PF."""
    program = write(tmp_path / "guest.bin", assemble("mov eax, 0x8000"))
    ended = sandbox("run", "--timeout", "5", program)
    assert ended.status == 139
    assert "execute of 0x2000" in ended.line


# Explain


@pytest.mark.parametrize("what", ["c5f", "hello", "", "0x"])
def test_explain_of_nonsense(what: str, sandbox: Command) -> None:
    ended = sandbox("explain", what)
    assert ended.status == 2 and ended.line


# Memory, from Python


@pytest.mark.parametrize(
    ("base", "size", "message"),
    [
        (0x1000, 0x1000, "overlaps the memory slot 0x0..0xffff"),
        (0xF000, 0x2000, "overlaps the memory slot"),
        (0x10_0000, 0x1000, "overlaps the device range 0x100800..0x1008ff"),
        (0x20_0000, 0, "size is 0"),
        (0x20_0000, -0x1000, "size is -4096"),
        (0x20_0001, 0x1000, "multiples of 0x1000"),
        (0x20_0000, 0x1001, "multiples of 0x1000"),
        (-0x1000, 0x1000, "outside the 40-bit"),
        ((1 << 40) - 0x1000, 0x2000, "outside the 40-bit"),
    ],
)
def test_memory_slots_that_cannot_be(base: int, size: int, message: str) -> None:
    device: Any = object()
    with Vm() as vm:
        vm.add_memory(0, 0x1_0000)
        vm.add_mmio(0x10_0800, 0x100, device)
        with pytest.raises(MemoryMapError, match=message):
            vm.add_memory(base, size)
        assert len(vm.memory.slots) == 1
        vm.create_vcpu()
        with pytest.raises(MemoryMapError, match=message):
            vm.add_memory(base, size)
        vm.add_memory(0x1_0000, 0x1000)


@pytest.mark.parametrize(
    ("base", "count"), [(0x3F8, 0), (0x3F8, -1), (-1, 2), (0xFFFF, 2), (0x3FF, 2), (0x3F0, 9)]
)
def test_port_ranges_that_cannot_be(base: int, count: int) -> None:
    device: Any = object()
    with Vm() as vm:
        vm.add_ports(0x3F8, 8, device)
        with pytest.raises(MemoryMapError, match="IO ports"):
            vm.add_ports(base, count, device)
