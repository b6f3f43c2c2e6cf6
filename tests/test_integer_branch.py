"""Near branches, after the manual: targets, conditions, the stack, limits."""

from __future__ import annotations

import pytest

from sandbox.cpu import GP, Cpu, Fault
from sandbox.decode import decode
from sandbox.handler import Resume
from sandbox.registers import CF, OF, PF, RAX, RCX, RSP, SF, ZF, Segment
from tests.doubles import FlatMemory, make_cpu
from tests.integer_cases import bind

IP = 0x10000
TOP = 0x12000


def cpu_at(ip: int = IP, bitness: int = 64) -> Cpu:
    cpu = make_cpu(bitness, 0, FlatMemory(0, 0x20000))
    code = Segment(limit=0xFFFF if bitness == 16 else 0xFFFF_FFFF, db=int(bitness == 32))
    cpu.registers.bank.write_segment("cs", code)
    cpu.registers.bank.write_segment("ss", Segment(db=int(bitness == 32)))
    cpu.registers.rip = ip
    cpu.gpr[RSP] = TOP
    return cpu


def go(cpu: Cpu, code: str) -> int | None:
    """Where an instruction goes; None: on after it."""
    verdict = bind(cpu, decode(bytes.fromhex(code), cpu.bitness))()
    if verdict is None:
        return None
    assert isinstance(verdict, Resume)
    return verdict.rip


@pytest.mark.parametrize(
    ("code", "bitness", "ip", "target"),
    [
        ("eb10", 64, IP, IP + 0x12),
        ("ebfe", 64, IP, IP),
        ("e900010000", 64, IP, IP + 0x105),
        ("e9fbffffff", 64, 0x7FFF_0000_0000, 0x7FFF_0000_0000),
        ("eb10", 32, 0xFFFF_FFFE, 0x10),
        ("66e90001", 32, 0x12345, 0x2449),  # a 16-bit operand clears the upper half of EIP
        ("eb10", 16, 0xFFF0, 0x2),
        ("e90001", 16, 0x100, 0x203),
        ("66e900010000", 16, 0x100, 0x206),
    ],
)
def test_relative_jumps(code: str, bitness: int, ip: int, target: int) -> None:
    assert go(cpu_at(ip, bitness), code) == target


CONDITIONS = [
    *[("o", 0x0, OF), ("b", 0x2, CF), ("e", 0x4, ZF), ("s", 0x8, SF), ("p", 0xA, PF)],
    *[("be", 0x6, CF), ("be", 0x6, ZF), ("l", 0xC, SF), ("l", 0xC, OF)],
    *[("le", 0xE, ZF), ("le", 0xE, SF), ("le", 0xE, OF)],
]


@pytest.mark.parametrize(("name", "number", "flags"), CONDITIONS)
def test_conditional_jumps_and_their_opposites(name: str, number: int, flags: int) -> None:
    """SDM Vol. 1, appendix B."""
    for state, holds in ((flags, True), (0, False)):
        cpu = cpu_at()
        cpu.rflags = 2 | state
        assert go(cpu, f"7{number:x}10") == (IP + 0x12 if holds else None)
        assert go(cpu, f"7{number + 1:x}10") == (None if holds else IP + 0x12)
        assert go(cpu, f"0f8{number:x}00010000") == (IP + 0x106 if holds else None)


def test_less_needs_sign_and_overflow_to_differ() -> None:
    cpu = cpu_at()
    cpu.rflags = 2 | SF | OF
    assert go(cpu, "7c10") is None
    assert go(cpu, "7d10") == IP + 0x12
    assert go(cpu, "7f10") == IP + 0x12


def test_call_pushes_the_next_address_and_ret_pops_it() -> None:
    cpu = cpu_at()
    assert go(cpu, "e800010000") == IP + 0x105
    assert cpu.gpr[RSP] == TOP - 8
    assert cpu.read_int(TOP - 8, 8) == IP + 5
    assert go(cpu, "c3") == IP + 5
    assert cpu.gpr[RSP] == TOP


def test_ret_with_an_immediate_drops_arguments() -> None:
    cpu = cpu_at()
    cpu.write_int(TOP, 0x1234, 8)
    assert go(cpu, "c21000") == 0x1234
    assert cpu.gpr[RSP] == TOP + 0x18


def test_16_bit_call_and_ret() -> None:
    cpu = cpu_at(0x100, 16)
    cpu.gpr[RSP] = 0xABCD_2000
    assert go(cpu, "e80001") == 0x203
    assert cpu.gpr[RSP] == 0xABCD_1FFE
    assert cpu.read_int(0x1FFE, 2) == 0x103
    assert go(cpu, "c3") == 0x103
    assert go(cpu, "c20400") is not None
    assert cpu.gpr[RSP] == 0xABCD_2006


def test_indirect_branches() -> None:
    cpu = cpu_at()
    cpu.gpr[RAX] = 0x4242
    assert go(cpu, "ffe0") == 0x4242
    assert go(cpu, "ffd0") == 0x4242
    assert cpu.read_int(TOP - 8, 8) == IP + 2
    cpu.write_int(TOP, 0x7777, 8)
    cpu.gpr[RSP] = TOP
    assert go(cpu, "ff1424") == 0x7777  # call [rsp]: read before the push
    assert go(cpu, "ff2505000000") == 0  # jmp [rip+5]


def test_non_canonical_targets_fault_at_the_branch() -> None:
    cpu = cpu_at()
    cpu.gpr[RAX] = 0x8000_0000_0000
    cpu.write_int(TOP, 0x8000_0000_0000, 8)
    for code in ("ffe0", "ffd0", "c3"):
        with pytest.raises(Fault) as caught:
            go(cpu, code)
        assert (caught.value.vector, caught.value.error_code) == (GP, 0)
        assert cpu.gpr[RSP] == TOP


def test_targets_beyond_the_code_segment_limit_fault() -> None:
    cpu = cpu_at(0x100, 32)
    cpu.registers.bank.write_segment("cs", Segment(limit=0x1FF, db=1))
    assert go(cpu, "eb10") == 0x112
    with pytest.raises(Fault) as caught:
        go(cpu, "e800010000")
    assert caught.value.vector == GP
    assert cpu.gpr[RSP] == TOP


@pytest.mark.parametrize(
    ("code", "count", "flags", "left", "jumps"),
    [
        ("e210", 2, 0, 1, True),
        ("e210", 1, 0, 0, False),
        ("e210", 0, 0, 0xFFFF_FFFF_FFFF_FFFF, True),
        ("67e210", 0x1_0000_0002, 0, 1, True),  # ECX: a 32-bit write
        ("67e210", 0x1_0000_0001, 0, 0, False),
        ("e110", 2, ZF, 1, True),
        ("e110", 2, 0, 1, False),
        ("e010", 2, 0, 1, True),
        ("e010", 2, ZF, 1, False),
    ],
)
def test_loops(code: str, count: int, flags: int, left: int, jumps: bool) -> None:
    cpu = cpu_at()
    cpu.gpr[RCX], cpu.rflags = count, 2 | flags
    after = IP + len(code) // 2 + 0x10
    assert go(cpu, code) == (after if jumps else None)
    assert cpu.gpr[RCX] == left
    assert cpu.rflags == 2 | flags


def test_16_bit_loop_counts_in_cx() -> None:
    cpu = cpu_at(0x100, 16)
    cpu.gpr[RCX] = 0x5555_0001
    assert go(cpu, "e210") is None
    assert cpu.gpr[RCX] == 0x5555_0000


def test_jumps_on_a_zero_count() -> None:
    cpu = cpu_at()
    cpu.gpr[RCX] = 0x1_0000_0000
    assert go(cpu, "e310") is None  # jrcxz
    assert go(cpu, "67e310") == IP + 0x13  # jecxz
    cpu.gpr[RCX] = 0
    assert go(cpu, "e310") == IP + 0x12
    cpu = cpu_at(0x100, 16)
    cpu.gpr[RCX] = 0x5555_0000
    assert go(cpu, "e310") == 0x112
