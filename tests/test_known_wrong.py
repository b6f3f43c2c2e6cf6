"""What ``baseline`` traps as known wrong really is wrong in Unicorn, and right on hardware.

The results were recorded on an AMD Zen 4 CPU. Each snippet reads its input at RDI and leaves its
result at an offset from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import unicorn
from unicorn import x86_const as x86

from sandbox.decode import Insn, decode
from sandbox.native import DATA as NATIVE_DATA
from sandbox.native import NativeCpu, State, missing_features
from sandbox.policy import Policy
from sandbox.registers import RDI

CODE, DATA, STACK = 0x1000, 0x2000, 0x3000


class Case(NamedTuple):
    wrong: str  # the mnemonic that baseline traps
    code: str
    input: str
    offset: int
    hardware: str


INTS = "01000000 02000000 03000000 04000000"
WORDS = "0100 0200 0400 0800 1000 2000 4000 8000"
ONE, THREE, BIG = "00000000000000 80ff3f", "00000000000000 c00040", "00000000000000 802040"

CASES = [
    # load xmm2; operate on it twice; store
    Case("vpaddd", "f30f6f17 c5e9feca f30f7f4f10", INTS, 16, "02000000040000000600000008000000"),
    Case("phaddd", "f30f6f17 660f3802d2 f30f7f5710", INTS, 16, "03000000070000000300000007000000"),
    Case("phaddw", "f30f6f17 660f3801d2 f30f7f5710", WORDS, 16, "03000c003000c00003000c003000c000"),
    Case("phsubw", "f30f6f17 660f3805d2 f30f7f5710", WORDS, 16, "fffffcfff0ffc0ff" * 2),
    # xor eax, eax; lahf with REX.W; mov [rdi+16], ah
    Case("lahf", "31c0 489f 886710", "", 16, "46"),
    # mov ah, 0xd5; sahf with REX.W; setb [rdi+16]
    Case("sahf", "b4d5 489e 0f924710", "", 16, "01"),
    # xor eax, eax; mov rbx, [rdi]; cmpxchg ebx, edx; mov [rdi+16], rbx
    Case("cmpxchg", "31c0 488b1f 0fb1d3 48895f10", "11" * 8, 16, "11" * 8),
    # "ab" in 15 x and one a: the needle may begin in the last byte
    Case("pcmpistri", "f30f6f07 660f3a6347100c 894f20",
         "6162" + "00" * 14 + "78" * 15 + "61", 32, "0f000000"),
    # -0 times 1, added up
    Case("dppd", "f30f6f07 f30f6f4f10 660f3a41c131 f30f7f4720",
         "0000000000000080" * 2 + "000000000000f03f" * 2, 32, "0000000000000080"),
    Case("dpps", "f30f6f07 f30f6f4f10 660f3a40c1f1 f30f7f4720",
         "00000080" * 4 + "0000803f" * 4, 32, "00000080"),
    Case("fsin", "db2f d9fe db7f10", ONE, 16, "2170674878a46ad7fe3f"),
    Case("f2xm1", "db2f d9f0 db7f10", "00000000000000 c0fd3f", 16, "a8e344c5a65afb97fd3f"),
    Case("fyl2x", "db2f d9e8 d9c9 d9f1 db7f10", THREE, 16, "d043ebfd1c0de0caff3f"),
    Case("fpatan", "db2f d9e8 d9f3 db7f10", THREE, 16, "ecff2ad45bbbe09fff3f"),
    Case("fprem", "d9eb db2f d9f8 db7f10", "ffffffffffffff ff0540", 16, "98a7a1c7aad685950040"),
    Case("fprem1", "d9eb db2f d9f5 db7f10", "ffffffffffffff ff0540", 16, "746a1c67dd0f28cefebf"),
    Case("fisttp", "db2f db4f10", BIG, 16, "00000080"),
    Case("fbstp", "db2f df7710", "00000000000000 806040", 16, "00000000000000c0ffff"),
    Case("fxtract", "db2f d9f4 ddd8 db7f10", "00000000000000 80ff7f", 16, "00000000000000 80ff7f"),
    # fninit; operate; fnstenv: the tag word
    Case("pshufb", "dbe3 0f3800c1 d97710", "", 24, "5655"),
    Case("pabsb", "dbe3 0f381cc1 d97710", "", 24, "5655"),
    Case("cvtpi2pd", "dbe3 660f2a07 d97710", "", 24, "ffff"),
]  # fmt: skip

PROCESSOR_SPECIFIC = {"fsin", "f2xm1", "fyl2x", "fpatan", "cvtpi2pd", "cmpxchg"}


def is_amd() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()


def instructions(code: bytes) -> Iterator[Insn]:
    while code:
        insn = decode(code, 64)
        yield insn
        code = code[insn.length :]


def run_in_plain_unicorn(code: bytes, data: bytes) -> bytes:
    """Memory at RDI after ``code`` ran without any policy, in a sane x87 and SSE state."""
    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    uc.mem_map(CODE, 0x3000)
    uc.mem_write(CODE, code)
    uc.mem_write(DATA, data)
    for register, value in (
        (x86.UC_X86_REG_CR4, 0x600),
        (x86.UC_X86_REG_MXCSR, 0x1F80),
        (x86.UC_X86_REG_FPCW, 0x37F),
        (x86.UC_X86_REG_RDI, DATA),
        (x86.UC_X86_REG_RSP, STACK),
    ):
        uc.reg_write(register, value)
    uc.emu_start(CODE, CODE + len(code))
    return bytes(uc.mem_read(DATA, 64))


@pytest.mark.parametrize("case", CASES, ids=[case.wrong for case in CASES])
def test_baseline_traps_it_and_nothing_else_of_the_snippet(case: Case) -> None:
    policy = Policy.load("baseline")
    trapped = [i.mnemonic for i in instructions(bytes.fromhex(case.code)) if not policy.allows(i)]
    assert trapped == [case.wrong]


@pytest.mark.skipif(unicorn.__version__ != "2.1.4", reason="the list was made for Unicorn 2.1.4")
@pytest.mark.parametrize("case", CASES, ids=[case.wrong for case in CASES])
def test_plain_unicorn_computes_something_else_than_hardware(case: Case) -> None:
    memory = run_in_plain_unicorn(bytes.fromhex(case.code), bytes.fromhex(case.input))
    hardware = bytes.fromhex(case.hardware)
    assert memory[case.offset : case.offset + len(hardware)] != hardware


@pytest.mark.parametrize("case", CASES, ids=[case.wrong for case in CASES])
def test_this_cpu_computes_what_was_recorded(case: Case) -> None:
    if reason := NativeCpu.available():
        pytest.skip(reason)
    if case.wrong in PROCESSOR_SPECIFIC and not is_amd():
        pytest.skip("the last bit or the x87 tags are the processor's own")
    state = State()
    state.gpr[RDI] = NATIVE_DATA
    state.store(NATIVE_DATA, bytes.fromhex(case.input))
    for insn in instructions(bytes.fromhex(case.code)):
        if missing_features(insn):
            pytest.skip(f"this CPU has no {'+'.join(missing_features(insn))}")
        result = NativeCpu.shared().run(insn.raw, state)
        assert result.fault is None
        state = result.state
    hardware = bytes.fromhex(case.hardware)
    assert state.load(NATIVE_DATA + case.offset, len(hardware)) == hardware
