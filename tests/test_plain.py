"""What is recognised as plain code is what the decoder reads there, allowed, and nothing else."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import product

import pytest
from iced_x86 import Decoder

from guests.assemble import assemble
from sandbox.engine import plain
from sandbox.engine.allowlist import Allowlist, Patch
from sandbox.engine.plain import EXPECTED, instruction, splitter
from sandbox.exits import EmulationFailure, Hlt
from sandbox.policy import ALLOW, ASK, TRAP, Policy
from sandbox.registers import RAX, RBX
from tests.guest import BASE, Recorder, machine, run_to_hlt

VERIFIED = Policy.load("verified").marks
REX = (b"", b"\x45", b"\x4e")
SIB = (0x00, 0x25, 0x6C)
TRAPPED = 'extends = "verified"\n[[rule]]\naction = "trap"\nmnemonic = "imul"\n'


def encodings(rng: random.Random) -> Iterator[bytes]:
    """The one- and two-byte opcodes with ModRM and some SIBs, followed by random bytes."""
    for before in (*product((b"",), REX, (b"", b"\x0f")), *product((b"\x64",), REX, (b"",))):
        head = b"".join(before)
        for opcode, modrm in product(range(256), range(256)):
            sibs = SIB if modrm < 0xC0 and modrm & 7 == 4 else SIB[:1]
            for sib in sibs:
                yield head + bytes([opcode, modrm, sib]) + rng.randbytes(10)


@pytest.mark.parametrize("trapped", [0, 0.3])
def test_what_is_recognised_is_one_instruction_to_the_decoder_and_allowed(trapped: float) -> None:
    rng = random.Random(5)
    marks = bytes(TRAP if rng.random() < trapped else mark for mark in VERIFIED)
    match = re.compile(instruction(marks), re.DOTALL).match
    found = 0
    for code in encodings(rng):
        recognised = match(code)
        if recognised:
            found += 1
            insn = Decoder(64, code).decode()
            assert marks[insn.code] == ALLOW, code.hex()
            assert recognised.end() == insn.len, code.hex()
    assert found > 30_000


def test_no_instruction_is_recognised_in_a_part_or_with_more_bytes() -> None:
    rng = random.Random(6)
    whole = re.compile(instruction(VERIFIED), re.DOTALL).fullmatch
    for code in encodings(rng):
        if rng.random() < 0.01:
            length = Decoder(64, code).decode().len
            assert all(not whole(code, 0, end) for end in range(16) if end != length), code.hex()


def is_plain(code: bytes, count: int, marks: bytes = VERIFIED) -> bool:
    filler, left = EXPECTED[count]
    return splitter(marks)(filler + code) == left


def test_a_block_is_plain_only_with_its_own_number_of_instructions() -> None:
    code = assemble("mov eax, 0x90909090\n push rbx\n lea rcx, [rdx + 8*rsi + 0x10]\n ret")
    for count in range(1, 5):
        block = code[: (5, 6, 11, 12)[count - 1]]
        for claimed in range(len(EXPECTED)):
            assert is_plain(block, claimed) == (claimed == count)
        assert not is_plain(block[:-1], count)
        assert not is_plain(block + b"\x90", count)


@pytest.mark.parametrize(
    "text",
    [
        "mov eax, [r13]", "mov eax, [r12 + 4*r14 + 0x12345]", "test bl, 1",
        "cmp dword ptr [rip + 0x1000], 77", "jne 0x5000", "call 0x5000", "call [rax]", "jmp r11",
        "movzx eax, byte ptr [rsp + 3]", "cmovge r8, r9", "sete al", "shl rax, 3", "push r15",
        "imul rax, rbx", "movsxd rax, edi", "leave", "cdqe", "inc r9d", "mov byte ptr [rdi], 0",
    ],
)  # fmt: skip
def test_common_instructions_are_plain_where_the_policy_allows_them(text: str) -> None:
    code = assemble(text)
    assert is_plain(code, 1)
    assert not is_plain(code, 1, bytes([TRAP]) * len(VERIFIED))


def test_a_load_relative_to_fs_is_plain() -> None:
    assert is_plain(bytes.fromhex("64 48 8b 04 25 28 00 00 00"), 1)  # mov rax, fs:[0x28]


@pytest.mark.parametrize("mark", [TRAP, ASK])
def test_what_is_trapped_or_asked_about_is_not_plain(mark: int) -> None:
    code = assemble("imul rax, rbx")
    marks = bytearray(VERIFIED)
    marks[Decoder(64, code).decode().code] = mark
    assert not is_plain(code, 1, bytes(marks))
    assert is_plain(assemble("add rax, rbx"), 1, bytes(marks))


# -- on the machine -------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "BLOCKS_BEFORE", 1)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Addresses of the blocks that were decoded."""
    found: list[int] = []
    check = Allowlist.check

    def note(self: Allowlist, start: int, size: int, count: int) -> Patch | None:
        found.append(start)
        return check(self, start, size, count)

    monkeypatch.setattr(Allowlist, "check", note)
    return found


def test_of_the_plain_blocks_of_a_page_the_first_is_decoded(decoded: list[int]) -> None:
    code = "".join(f"add eax, {n}\n jmp a{n}\n a{n}:\n" for n in range(1000)) + "hlt"
    with machine(code, policy="verified") as found:
        run_to_hlt(found)
        assert found.vcpu.registers.gpr[RAX] == sum(range(1000))
    pages = {start >> 12 for start in decoded}
    assert len(pages) > 1
    assert len(decoded) <= 3 * len(pages)


def test_a_trapped_instruction_on_a_page_of_plain_code_is_trapped() -> None:
    code = "mov ecx, 50\n again: jmp a\n a: dec ecx\n jnz again\n imul eax, ebx\n jmp b\n b: hlt"
    recorder = Recorder("imul")
    with machine(code, policy=Policy.parse(TRAPPED), handlers=[recorder.pack]) as found:
        run_to_hlt(found)
    assert recorder.texts == ["imul eax,ebx"]


def test_code_written_over_plain_code_is_looked_at() -> None:
    code = f"""
        call code
        call code
        mov dword ptr [code], {int.from_bytes(assemble("imul ebx, ebx"), "little"):#x}
        mov byte ptr [code + 3], 0xc3
        call code
        hlt
    .balign 64
    code: add ebx, 3
        ret
    """
    recorder = Recorder("imul")
    with machine(code, policy=Policy.parse(TRAPPED), handlers=[recorder.pack]) as found:
        run_to_hlt(found)
        assert found.vcpu.registers.gpr[RBX] == 6
    assert recorder.texts == ["imul ebx,ebx"]


def test_another_page_at_the_same_address_is_looked_at() -> None:
    with machine("jmp a\n a: jmp b\n b: hlt", policy=Policy.parse(TRAPPED)) as found:
        assert found.space is not None
        run_to_hlt(found)
        found.vm.memory.load(0x8000, assemble("jmp a\n a: imul eax, ebx\n jmp b\n b: hlt", BASE))
        found.space.map(BASE, 0x8000, 0x1000, write=True, execute=True)
        found.vcpu.registers.rip = BASE
        assert isinstance(found.vcpu.run(10), EmulationFailure)
        assert found.vcpu.registers.rip == BASE + 2


def test_a_block_on_two_pages_and_one_below_the_page_at_hand_are_looked_at() -> None:
    at = 0x1FF8
    middle = assemble("add eax, 1\n imul eax, ebx\n jmp 0x1100", at)
    parts = {0x1000: "jmp 0x2100", 0x2100: f"jmp a\n a: jmp {at}", 0x1100: "imul ecx, ebx\n hlt"}
    recorder = Recorder("imul")
    with machine(b"\xcc" * 0x2000, policy=Policy.parse(TRAPPED), handlers=[recorder.pack]) as found:
        for address, text in parts.items():
            found.vm.memory.load(address, assemble(text, address))
        found.vm.memory.load(at, middle)
        assert isinstance(found.vcpu.run(10), Hlt)
    assert recorder.texts == ["imul eax,ebx", "imul ecx,ebx"]
