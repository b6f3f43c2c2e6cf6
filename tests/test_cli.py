"""``sandbox run`` and ``sandbox explain`` end to end: guests, options, exit statuses, reports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from guests.assemble import assemble
from guests.header import read_header
from tests.command import COMMAND, ROOT, Command, start
from tests.test_linux_programs import elf

GUESTS = sorted((ROOT / "guests" / "asm").glob("*.asm"))
DEMO = ROOT / "guests" / "c" / "prebuilt" / "demo-x86-64-v3-O3-musl-gcc"
AVX = "mov eax, 5\n vpcmpeqd ymm1, ymm1, ymm1\n bswap ebx\n hlt"


@pytest.fixture
def sandbox(capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(capfd)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def exits_with(status: int, output: bytes = b"") -> bytes:
    """A Linux program that writes ``output`` and exits."""
    return elf(f"""
        mov eax, 1
        mov edi, 1
        lea rsi, [rip + text]
        mov edx, {len(output)}
        syscall
        mov eax, 231
        mov edi, {status}
        syscall
    text:
        .byte {", ".join(map(str, output or b"!"))}
    """)


# Guests of each kind


@pytest.mark.parametrize("path", GUESTS, ids=lambda path: path.stem)
def test_the_assembly_guests_end_as_their_headers_say(
    path: Path, tmp_path: Path, sandbox: Command
) -> None:
    header = read_header(path.read_text(), str(path))
    report = tmp_path / "report.json"
    ended = sandbox(
        "run", "--mode", header.mode, "--base", hex(header.base), "--report", report, path
    )
    assert (ended.status, ended.err) == (0, "")
    registers = json.loads(report.read_text())["registers"]
    assert {name: int(registers[name], 16) for name in header.expect} == header.expect
    assert ended.out.encode() == header.output.get(0x3F8, b"")


@pytest.mark.parametrize(
    ("mode", "source", "rax"),
    [
        ("real", "mov ax, 0x7000\n add ax, ax\n hlt", 0xE000),
        ("protected", "mov eax, 0x70000000\n add eax, eax\n hlt", 0xE000_0000),
        ("long", "mov rax, 0x7000000000000000\n add rax, rax\n hlt", 0xE000_0000_0000_0000),
    ],
)
@pytest.mark.parametrize("base", [0x1000, 0x8123])
def test_raw_images_in_each_mode_at_a_base(
    mode: str, source: str, rax: int, base: int, tmp_path: Path, sandbox: Command
) -> None:
    bits = {"real": 16, "protected": 32, "long": 64}[mode]
    path = write(tmp_path / "guest.bin", assemble(source, base, bits))
    report = tmp_path / "report.json"
    options = ("--mode", mode, "--base", hex(base), "--report", report)
    assert sandbox("run", *options, path).status == 0
    registers = json.loads(report.read_text())["registers"]
    assert int(registers["rax"], 16) == rax
    assert int(registers["rip"], 16) == base + path.stat().st_size


@pytest.mark.parametrize("status", [0, 1, 42, 255])
def test_a_linux_program_ends_with_its_own_status(
    status: int, tmp_path: Path, sandbox: Command
) -> None:
    ended = sandbox("run", write(tmp_path / "program", exits_with(status, b"hi\n")))
    assert (ended.status, ended.out, ended.err) == (status, "hi\n", "")


def test_a_linux_program_in_a_process_of_its_own_reads_stdin_and_arguments(tmp_path: Path) -> None:
    source = """
        xor eax, eax
        xor edi, edi
        lea rsi, [rsp - 64]
        mov edx, 16
        syscall
        mov edx, eax
        mov eax, 1
        mov edi, 1
        syscall
        mov rsi, [rsp + 16]                     # argv[1]
        mov eax, 1
        mov edx, 3
        syscall
        mov edi, [rsp]                          # argc
        mov eax, 231
        syscall
    """
    program = write(tmp_path / "program", elf(source))
    process = start("run", program, "abc", "--trace", stdin=subprocess.PIPE)
    out, err = process.communicate(b"input\n", timeout=60)
    assert (out, err, process.returncode) == (b"input\nabc", b"", 3)


def test_the_demo_prints_what_it_should_and_the_summary_says_what_ran_where(
    sandbox: Command,
) -> None:
    ended = sandbox("run", "--summary", DEMO)
    assert (ended.status, ended.out) == (0, DEMO.with_name("demo.out").read_text())
    assert "fast path" in ended.err and "handler tier" in ended.err and "vp" in ended.err


def test_env_and_root_reach_the_program(tmp_path: Path, sandbox: Command) -> None:
    source = """
        mov eax, 257                            # openat(AT_FDCWD, "/note")
        mov edi, -100
        lea rsi, [rip + name]
        xor edx, edx
        syscall
        test eax, eax
        js failed
        mov edi, eax
        xor eax, eax
        lea rsi, [rsp - 64]
        mov edx, 5
        syscall
        mov eax, 1
        mov edi, 1
        syscall
        mov rsi, [rsp + 8 + 8 * 2]              # the first environment variable
        mov eax, 1
        mov edi, 1
        mov edx, 7
        syscall
        xor edi, edi
        jmp leave
    failed:
        mov edi, eax
        neg edi
    leave:
        mov eax, 231
        syscall
    name:
        .asciz "/note"
    """
    program = write(tmp_path / "program", elf(source))
    root = tmp_path / "root"
    root.mkdir()
    write(root / "note", "12345")
    ended = sandbox("run", "--root", root, "--env", "KEY=val", program)
    assert (ended.status, ended.out) == (0, "12345KEY=val")
    assert sandbox("run", program).status == 2, "ENOENT: no files without --root"


# Options


def test_policy_by_file_and_preset_decides_who_runs_what(tmp_path: Path, sandbox: Command) -> None:
    program = write(tmp_path / "guest.asm", "mov ecx, 3\nagain: bswap eax\n loop again\n hlt")
    rules = 'extends = "baseline"\n[[rule]]\naction = "trap"\nmnemonic = "bswap"\n'
    policy = write(tmp_path / "p.toml", rules)
    report = tmp_path / "report.json"
    counts = {}
    for name in ("baseline", policy, "nothing", "everything"):
        assert sandbox("run", "--policy", name, "--report", report, program).status == 0
        data = json.loads(report.read_text())
        counts[str(name)] = data["stats"]["fallback_count"]
        if name is policy:
            assert data["by_mnemonic"] == {"bswap": 3, "hlt": 1}
    assert counts == {"baseline": 1, str(policy): 4, "nothing": 8, "everything": 1}


def test_handlers_from_a_file_come_before_the_default_ones(
    tmp_path: Path, sandbox: Command
) -> None:
    program = write(tmp_path / "guest.asm", ".byte 0x0f, 0x3f, 7\n vpaddd ymm0, ymm0, ymm0\n hlt")
    handlers = write(
        tmp_path / "mine.py",
        "from sandbox.handler import handler\n"
        "@handler(pattern='0f 3f ??')\n"
        "def mine(cpu, insn):\n    cpu.gpr[3] += insn.raw[2]\n"
        "@handler('vpaddd')\n"
        "def first(cpu, insn):\n    cpu.gpr[3] += 0x100\n",
    )
    report = tmp_path / "report.json"
    assert sandbox("run", "--handlers", handlers, "--report", report, program).status == 0
    data = json.loads(report.read_text())
    assert int(data["registers"]["rbx"], 16) == 0x107
    assert data["by_mnemonic"] == {"0f 3f 07": 1, "hlt": 1, "vpaddd": 1}
    assert sandbox("run", program).status == 132


@pytest.mark.parametrize(
    ("unhandled", "status"), [(None, 132), ("inject", 132), ("exit", 132), ("skip", 0)]
)
def test_unhandled(unhandled: str | None, status: int, tmp_path: Path, sandbox: Command) -> None:
    program = write(tmp_path / "guest.asm", "mov eax, 1\n vaddps zmm0, zmm1, zmm2\n hlt")
    options = ("--unhandled", unhandled) if unhandled else ()
    ended = sandbox("run", "--handlers", "none", *options, program)
    assert ended.status == status
    if status:
        assert ended.line == "no handler takes 'vaddps zmm0, zmm1, zmm2' at 0x1005 (#UD)"


def test_unhandled_inject_in_a_guest_with_an_idt_is_the_guests_affair(
    tmp_path: Path, sandbox: Command
) -> None:
    source = """
        mov word ptr [6 * 4], handler
        mov word ptr [6 * 4 + 2], 0
        ud2
        hlt
    handler:
        mov bx, 0x77
        hlt
    """
    report = tmp_path / "report.json"
    program = write(tmp_path / "guest.asm", source)
    assert sandbox("run", "--mode", "real", "--report", report, program).status == 0
    assert int(json.loads(report.read_text())["registers"]["rbx"], 16) == 0x77


def test_trace_prints_a_line_per_exit(tmp_path: Path, sandbox: Command) -> None:
    ended = sandbox("run", "--trace", "--no-lowering", write(tmp_path / "guest.asm", AVX))
    lines = ended.err.splitlines()
    assert (ended.status, ended.out) == (0, "")
    rip, rest = lines[0].split(maxsplit=1)
    assert int(rip, 16) == 0x1005
    for part in ("c5 f5 76 c9", "vpcmpeqd ymm1, ymm1, ymm1", "emulation_failure", " us"):
        assert part in rest
    assert "hlt" in lines[1]


def test_regs_prints_the_final_registers(tmp_path: Path, sandbox: Command) -> None:
    ended = sandbox("run", "--regs", write(tmp_path / "guest.asm", AVX))
    assert "rax 0000000000000005" in ended.err
    assert "rip 000000000000100c" in ended.err
    assert f"zmm1  {'00' * 32}{'ff' * 32}" in ended.err


def test_the_report_holds_exit_registers_and_statistics(tmp_path: Path, sandbox: Command) -> None:
    report = tmp_path / "report.json"
    assert sandbox("run", "--report", report, write(tmp_path / "guest.asm", AVX)).status == 0
    data = json.loads(report.read_text())
    assert data["exit"] == {"status": 0, "name": "KVM_EXIT_HLT"}
    names = {"rax", "r15", "rip", "rflags", "mxcsr", "zmm0", "zmm31", "k0", "k7"}
    assert names <= data["registers"].keys()
    assert int(data["registers"]["zmm1"], 16) == (1 << 256) - 1
    assert len(data["registers"]["zmm0"]) == 2 + 128
    stats = data["stats"]
    assert (stats["fallback_count"], stats["lowered_count"]) == (1, 1)
    assert stats["fast_path_seconds"] > 0 and stats["fallback_seconds"] > 0
    assert data["by_mnemonic"] == {"hlt": 1}
    assert data["lowered"] == {"vpcmpeqd": 1}


@pytest.mark.parametrize(
    ("source", "options", "status", "exit_data"),
    [
        ("vaddps zmm0, zmm1, zmm2", ("--handlers", "none"), 132,
         {"name": "KVM_EXIT_INTERNAL_ERROR", "flags": 1, "insn_size": 15}),
        ("mov eax, [0x50000000]", (), 139, {"name": "KVM_EXIT_EXCEPTION", "exception": 14}),
        ("in al, 5", (), 125, {"name": "KVM_EXIT_IO", "port": 5, "size": 1}),
        ("again: jmp again", ("--timeout", "0.1"), 124, {"name": "KVM_EXIT_INTR"}),
        ("xor ecx, ecx\n div ecx", (), 136, {"name": "KVM_EXIT_EXCEPTION", "exception": 0}),
        ("int3", (), 133, {"name": "KVM_EXIT_EXCEPTION", "exception": 3}),
    ],
)  # fmt: skip
def test_the_report_says_how_it_ended(
    source: str,
    options: tuple[str, ...],
    status: int,
    exit_data: dict[str, Any],
    tmp_path: Path,
    sandbox: Command,
) -> None:
    report = tmp_path / "report.json"
    program = write(tmp_path / "guest.asm", source.replace("[0x50000000]", "[rbx + 0x50000000]"))
    ended = sandbox("run", *options, "--report", report, program)
    data = json.loads(report.read_text())["exit"]
    assert (ended.status, data["status"]) == (status, status)
    assert exit_data.items() <= data.items()
    assert data["message"] == ended.line


def test_a_linux_program_reports_its_end_too(tmp_path: Path, sandbox: Command) -> None:
    report = tmp_path / "report.json"
    program = write(tmp_path / "program", exits_with(7))
    assert sandbox("run", "--report", report, program).status == 7
    assert json.loads(report.read_text())["exit"]["status"] == 7


def test_max_exits_stops_with_its_own_status(tmp_path: Path, sandbox: Command) -> None:
    program = write(tmp_path / "guest.asm", "again: cpuid\n jmp again")
    ended = sandbox("run", "--max-exits", "10", program)
    assert (ended.status, ended.line) == (125, "stopped after 10 trapped instructions")


@pytest.mark.parametrize(
    "source", ["again: jmp again", "again: cpuid\n jmp again", "mov rcx, -1\n rep lodsb"]
)
def test_timeout_is_124(source: str, tmp_path: Path, sandbox: Command) -> None:
    program = write(tmp_path / "guest.asm", f"xor esi, esi\n {source}")
    ended = sandbox("run", "--timeout", "0.2", program)
    if ended.status != 139:  # REP LODSB runs out of memory, if the machine is fast
        assert ended.status == 124
        assert ended.line.startswith("still running after 0.2 s, at 0x100")


# Ctrl-C


@pytest.mark.parametrize("kind", ["loop", "handler", "trapped", "linux", "translating"])
def test_ctrl_c_stops_anything_at_once_with_130(kind: str, tmp_path: Path) -> None:
    """Each guest says that it runs, then does so for ever."""
    says = "mov dx, 0x3f8\n mov al, 0x21\n out dx, al\n"
    loops = {
        "loop": f"{says} again: jmp again",
        "handler": f"{says} .byte 0x0f, 0x3f",
        "trapped": f"{says} again: cpuid\n jmp again",
        "translating": f"""{says}
            again: lea rdi, [rip + place]
            inc dword ptr [rdi + 1]             # its own code: translated again each time
        place: mov eax, 0
            jmp again""",
        "linux": "mov eax, 1\n mov edi, 1\n lea rsi, [rip]\n mov edx, 1\n syscall\n l: jmp l",
    }
    handlers = write(
        tmp_path / "endless.py",
        "from sandbox.handler import handler\n"
        "@handler(pattern='0f 3f')\n"
        "def endless(cpu, insn):\n    while True: pass\n",
    )
    program = tmp_path / ("program" if kind == "linux" else "guest.asm")
    write(program, elf(loops[kind]) if kind == "linux" else loops[kind])
    process = start("run", "--handlers", handlers, program)
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    _out, err = process.communicate(timeout=20)
    assert time.monotonic() - sent < 10
    assert process.returncode == 130
    assert err.startswith(b"sandbox: interrupted at 0x") and err.count(b"\n") == 1


def test_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = assemble("mov dx, 0x3f8\nagain: out dx, al\n jmp again")
    process = subprocess.Popen(
        [*COMMAND, "run", write(tmp_path / "guest.bin", code)],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    _out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (141, b"")


# Explain


def test_explain_names_rule_and_handler(tmp_path: Path, sandbox: Command) -> None:
    rules = (
        '\nextends = "baseline"\n[[rule]]\naction = "trap"\nmnemonic = "bswap"\ncomment = "mine"\n'
    )
    policy = write(tmp_path / "p.toml", rules)
    ended = sandbox("explain", "--policy", policy, "90 0fc8 c5f5fec2 62f17c4858c2 06")
    assert (ended.status, ended.err) == (0, "")
    rows = ended.out.splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["0x1000", "0x1001", "0x1003", "0x1007", "0x100d"]
    assert "fast path" in rows[0] and "baseline.toml:" in rows[0]
    assert "p.toml:3 mine" in rows[1] and "integer" in rows[1]
    assert "AVX2" in rows[2] and "lowered" in rows[2]
    assert "AVX512F" in rows[3]
    assert "(no instruction)" in rows[4]


@pytest.mark.parametrize("kind", ["asm", "bin", "elf"])
def test_explain_reads_files_of_each_kind(kind: str, tmp_path: Path, sandbox: Command) -> None:
    code = "vpaddd ymm0, ymm1, ymm2\n hlt"
    content = {"asm": code.encode(), "bin": assemble(code), "elf": elf(code)}[kind]
    ended = sandbox("explain", write(tmp_path / f"guest.{kind}", content))
    assert ended.status == 0
    assert "vpaddd ymm0, ymm1, ymm2" in ended.out


def test_explain_in_16_bit_mode(sandbox: Command) -> None:
    ended = sandbox("explain", "--mode", "real", "--base", "0x7c00", "b83412")
    assert "0x7c00" in ended.out and "mov ax, 0x1234" in ended.out


def test_help_and_usage(sandbox: Command) -> None:
    assert sandbox("--help").status == sandbox("run", "--help").status == 0
    assert "COMMAND" in sandbox().err
