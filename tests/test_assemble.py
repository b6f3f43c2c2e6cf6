"""Assembly: right encodings pass, wrong ones of keystone are refused, errors name their line."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from iced_x86 import Decoder

from guests.assemble import assemble, assemble_file
from sandbox.errors import GuestImageError


@pytest.mark.parametrize(
    ("source", "expected"),
    [  # encodings by hand from SDM Vol. 2
        ("hlt", "f4"),
        ("mov eax, 1 ; comment", "b8 01 00 00 00"),
        ("mov eax, 1 # comment", "b8 01 00 00 00"),
        ("mov eax, 1 // comment", "b8 01 00 00 00"),
        ("out dx, al", "ee"),
        ("x: jmp x", "eb fe"),
        ("jmp $", "eb fe"),
        ("lea rax, [rip+x]\nx: hlt", "48 8d 05 00 00 00 00 f4"),
        ("mov rax, x\nx: hlt", "48 c7 c0 07 10 00 00 f4"),
        ("N = 5\nmov al, N*2 + 1", "b0 0b"),
        ("N equ 5\nmov al, (N+1)*4", "b0 18"),
        ("mov al, [rbx+N*4]\n.set N, 5", "8a 43 14"),
        ("mov cl, 10h\nmov ch, 0b11\nmov bl, 'a'", "b1 10 b5 03 b3 61"),
        ("mov ecx, len\nmsg: db 1, 2, 3\nlen = $ - msg", "b9 03 00 00 00 01 02 03"),
        ("rep stosq", "f3 48 ab"),
        ("lock add dword ptr [rax], ecx", "f0 01 08"),
        ("iretq", "48 cf"),
        ("ltr ax", "0f 00 d8"),
        ("lea rax, [rip + x + N]\nN = 3\nx: hlt", "48 8d 05 03 00 00 00 f4"),
        ("add eax, [0x8000]", "03 05 fa 6f 00 00"),  # relative to RIP: the same address
        ("mov byte ptr fs:[-8], 1", "64 c6 04 25 f8 ff ff ff 01"),
        ("pushf", "9c"),
        ("retfq", "48 cb"),
        ("mov rax, qword ptr fs:[rbx+rcx*8-1]", "64 48 8b 44 cb ff"),
        ("vpaddd ymm1, ymm2, ymm3", "c5 ed fe cb"),
        ("vpaddd zmm1{k1}{z}, zmm2, zmm3", "62 f1 6d c9 fe cb"),
        ("vaddps zmm1, zmm2, dword ptr [rax]{1to16}", "62 f1 6c 58 58 08"),
        ("vcmpeqps ymm0, ymm1, ymm2", "c5 f4 c2 c2 00"),
        (".byte 0xc5, 0xed, 0xfe, 0xcb", "c5 ed fe cb"),
        ("dw 0x1234\ndd -1\ndq x\nx: db 'a', \"bc\", 0", "34 12 ff*4 0e 10 00*6 61 62 63 00"),
        ('.asciz "a;b#\\n\\""\n.ascii "\\x41\\102"', "61 3b 62 23 0a 22 00 41 42"),
        (".float 1.5\n.double -2", "00 00 c0 3f 00*7 c0"),
        (".octa 1", "01 00*15"),
        (".space 3\n.fill 2, 2, 0x1234\n.space 1, 7", "00*3 34 12 34 12 07"),
        ("db 1\nalign 4\ndb 2", "01 0f 1f 00 02"),
        (".code16\nmov ax, 1\n.code32\nmov eax, 1", "b8 01 00 b8 01 00 00 00"),
        ("", ""),
        ("only_a_label:", ""),
    ],
)
def test_encodings(source: str, expected: str) -> None:
    wanted = re.sub(r"(\w\w)\*(\d+)", lambda m: " ".join([m[1]] * int(m[2])), expected)
    assert assemble(source).hex(" ") == wanted


@pytest.mark.parametrize(
    ("source", "bitness", "expected"),
    [
        ("ret", 16, "c3"),
        ("iret", 16, "cf"),
        ("iretd", 16, "66 cf"),
        ("mov ax, [bx+si+4]", 16, "8b 40 04"),
        ("mov word ptr es:[di], 7", 16, "26 c7 05 07 00"),
        ("pushad", 32, "60"),
        ("iret", 32, "cf"),
        ("ret 8", 32, "c2 08 00"),
    ],
)
def test_other_modes(source: str, bitness: int, expected: str) -> None:
    assert assemble(source, bitness=bitness).hex(" ") == expected


def test_labels_follow_the_address() -> None:
    assert assemble("x: dq x", 0x1_2345_6789_A000) == (0x1_2345_6789_A000).to_bytes(8, "little")
    assert assemble("nop\nx: dw x", 0x7C00, 16) == b"\x90\x01\x7c"


@pytest.mark.parametrize(
    "line",
    [  # each of these keystone 0.9.2 assembles to something else
        "vpaddd zmm1, zmm2, [rax+0x40]",
        "vpaddd zmm1, zmm2, [rax+0x1000]",
        "vaddps zmm1, zmm2, dword ptr [rax+4]{1to16}",
        "mov al, 300",
        "mov eax, 0x100000000",
        "push 0x1234567890",
        "ret 70000",
        "mov byte ptr [rax], 256",
        "mov rax, [rax+0x100000000]",
        "nop dword ptr [rax]",
        "mov eax, -label",
        "mov eax, [label-other+rax]",
    ],
)
def test_wrong_encodings_of_keystone_are_refused(line: str) -> None:
    source = f"other: nop\nlabel:\n{line} ; comment\nhlt"
    with pytest.raises(GuestImageError, match=r"^f\.asm:3: keystone assembles this wrongly") as e:
        assemble(source, filename="f.asm")
    assert line in str(e.value)
    assert ".byte" in str(e.value)
    assert "\n" not in str(e.value)


def test_short_branch_that_wraps_around_is_refused() -> None:
    with pytest.raises(GuestImageError, match=r"^<asm>:1: keystone assembles this wrongly"):
        assemble("jrcxz far\n.space 200\nfar: hlt")


def test_refused_evex_displacement_says_why() -> None:
    with pytest.raises(GuestImageError, match="does not scale the 8-bit displacements of EVEX"):
        assemble("vmovups zmm1, [rsp+0x40]")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("badinsn eax", "Invalid mnemonic"),
        ("mov eax", "Invalid operand"),
        ("jmp nowhere", "Cannot find a symbol"),
        ("mov [rax], 1", "Invalid operand"),
        ("mov eax, [rax", "no memory operand"),
        ("mov eax, dword ptr x", "needs brackets"),
        ("mov eax, [rax*3]", "a scale is 1, 2, 4 or 8"),
        ("mov eax, [rax+rbx+rcx]", "too many registers"),
        ("mov eax, [rbx-rax]", "subtracts a register"),
        ("mov eax, rbx+1", "a register where a number must stand"),
        ("mov eax, 010", "leading zero"),
        ("mov eax, 5 5", "no expression"),
        ("mov eax, 1/0", "has no value"),
        ("mov eax,", "operand is missing"),
        ("iret", "write iretq"),
        ("(mov)", "no instruction or directive begins like this"),
        ('.ascii "abc', "not closed"),
        (".ascii abc", "no string"),
        (".byte 300", "does not fit in 1 bytes"),
        (".byte", "wants values"),
        (".align 3", "no power of two"),
        (".space 1 << 40", "limit is 16 MiB"),
        ('.incbin "/etc/passwd"', r"no directive \.incbin here; there are"),
        (".section .data", r"no directive \.section here"),
        ("first: nop", "first is already defined in line 1"),
        ("rax: nop", "cannot be the name"),
        ("1: nop", "numeric labels do not exist here; use a name"),
        ("lock", "prefix lock stands alone"),
        ("jrcxz last", "out of reach"),
    ],
)
def test_errors_name_file_line_and_text(line: str, reason: str) -> None:
    source = f"first: nop\n\n  {line} ; comment\njmp first\n.space 300\nlast: loop last\n"
    with pytest.raises(GuestImageError, match=rf"^f\.asm:3: .*{reason}") as caught:
        assemble(source, filename="f.asm")
    assert f"`{line} ; comment`" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("base", [0x1000, 0x1003, 0x1008, 0x100F])
def test_align_counts_from_address_zero(base: int) -> None:
    image = assemble("nop\n.align 16\nhere: dq here", base)
    assert int.from_bytes(image[-8:], "little") == base + len(image) - 8
    assert (base + len(image) - 8) % 16 == 0


@pytest.mark.parametrize(("address", "bitness"), [(-1, 64), (1 << 32, 32), (0, 48)])
def test_impossible_address_or_mode_is_refused(address: int, bitness: int) -> None:
    with pytest.raises(GuestImageError, match="no address"):
        assemble("nop", address, bitness)


def test_assembly_file_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "guest.asm"
    path.write_text("hlt\r\nhlt ; ü\r\n", encoding="utf-8")
    assert assemble_file(path) == b"\xf4\xf4"
    path.write_bytes(b"hlt\xff")
    with pytest.raises(GuestImageError, match=r"guest\.asm: not UTF-8 text at byte 3"):
        assemble_file(path)
    with pytest.raises(GuestImageError, match=r"missing\.asm: cannot be read"):
        assemble_file(tmp_path / "missing.asm")


PLAIN = """
add rax, -129 | and eax, 0xfffffff0 | imul eax, ecx, 5 | shl edx, 3 | sar rax, cl
cmovnae eax, ecx | setnz al | bt eax, 3 | bswap rdx | xchg rax, rbx | test eax, ecx
movzx eax, byte ptr [rcx] | movsx rax, cl | movsxd rax, ecx | push 0x80 | push -1
mov rax, 0x1122334455667788 | mov dword ptr [rbp-8], 7 | mov word ptr [r13+r14*2], ax
call rax | call qword ptr [rax] | jmp qword ptr [rip+16] | enter 16, 0 | int 0x80
cmpxchg16b [rdi] | lgdt [rdi] | mov cr3, rax | mov rax, dr7 | mov ds, eax | invlpg [rdi]
fadd st(1) | fadd st(1), st | fld qword ptr [rax] | fistp dword ptr [rax] | fxch
movq xmm0, rax | movaps xmm1, [rsp+32] | pshufd xmm1, xmm2, 0x1b | cmpltps xmm0, xmm1
blendvps xmm1, xmm2 | pcmpistri xmm1, xmm2, 12 | crc32 eax, cl | aesenc xmm1, xmm2
vaddps ymm1, ymm2, [rax+0x40] | vfmadd231pd ymm0, ymm1, [rdx+rcx*8-64] | vzeroupper
vpermq ymm1, ymm2, 0x4e | vpblendvb ymm1, ymm2, ymm3, ymm4 | vextracti128 xmm1, ymm2, 1
vpgatherdd ymm0, [rax+ymm1*4], ymm2 | vcvtsi2sd xmm0, xmm1, rax | vpinsrq xmm1, xmm2, rax, 1
andn eax, ecx, edx | rorx eax, ecx, 7 | mulx rax, rbx, rcx | shlx eax, [rcx], edx
adcx eax, ecx | rdtscp | xgetbv | syscall | swapgs | ud2 | pause | lfence | cpuid
"""


def test_plain_instructions_agree_with_the_gnu_assembler(tmp_path: Path) -> None:
    if shutil.which("as") is None or shutil.which("objcopy") is None:
        pytest.skip("binutils are not installed")
    lines = [line.strip() for row in PLAIN.strip().splitlines() for line in row.split("|")]
    source, image = tmp_path / "all.s", tmp_path / "all.bin"
    source.write_text(".intel_syntax noprefix\n" + "\n".join(lines) + "\n")
    done = subprocess.run(["as", "--64", "-o", tmp_path / "all.o", source], capture_output=True)
    if done.returncode:
        pytest.skip("this assembler does not make x86-64 code")
    subprocess.run(["objcopy", "-O", "binary", tmp_path / "all.o", image], check=True)
    theirs = [str(insn) for insn in Decoder(64, image.read_bytes())]
    ours = [str(insn) for insn in Decoder(64, assemble("\n".join(lines), 0))]
    assert ours == theirs
    assert len(ours) == len(lines)
