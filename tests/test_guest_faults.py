"""Guests that fault on purpose see it through their IDT, at the instruction, state unchanged.

Each guest prepares its registers, halts, then runs one instruction. Its interrupt descriptor table
leads each vector to a HLT of its own; what is behind that one returns to the instruction.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import pytest

from guests.assemble import assemble
from sandbox import abi
from sandbox.boot import CODE_32, CODE_64, Machine, Mode, boot_flat
from sandbox.cpu import GP, NM, PF_, SS_, UD, XM
from sandbox.descriptors import Gate, serialise_gate
from sandbox.exits import Hlt
from sandbox.memory import PAGE_SIZE
from sandbox.policy import Policy
from sandbox.registers import RCX, RDI, RSP, DescriptorTable
from sandbox.vm import Vm

BASE, HANDLERS, IDT, DATA = 0x1000, 0x1800, 0x8000, 0x10000
HANDLER_BYTES = 16
ABSENT = 0x4000_0000
"""An address behind all RAM in long mode; its page may be mapped later."""
EDGE = 0x4000_0000
"""A page in long mode after which nothing is mapped: :func:`guest` maps it."""
ERROR_CODES = {8, 10, 11, 12, 13, 14, 17}
PACKS = ("integer", "avx2", "x87", "mmx")
Exactness = Literal["lazy", "exact"]


@dataclass
class Seen:
    """What the handler of the guest finds."""

    vector: int
    error_code: int | None
    address: int
    mxcsr: int


def _handler(vector: int, mode: Mode) -> bytes:
    """HLT, then back to the instruction."""
    drop = {"long": b"\x48\x83\xc4\x08", "protected": b"\x83\xc4\x04"}[mode]
    code = b"\xf4" + (drop if vector in ERROR_CODES else b"")
    code += b"\x48\xcf" if mode == "long" else b"\xcf"
    return code.ljust(HANDLER_BYTES, b"\xf4")


@contextmanager
def guest(
    setup: str,
    instruction: str | bytes,
    mode: Mode = "long",
    policy: str = "verified",
    exactness: Exactness = "lazy",
) -> Iterator[Machine]:
    """A machine about to run ``instruction``, with what ``setup`` leaves in its registers."""
    bits = 64 if mode == "long" else 32
    chosen = Policy.load(policy).with_exactness(exactness, exactness)
    first = assemble(setup.replace(";", "\n") + "\nhlt\n", BASE, bits)
    at = BASE + len(first)
    if isinstance(instruction, str):
        instruction = assemble(instruction, at, bits)
    image = (first + instruction + b"\xf4").ljust(HANDLERS - BASE, b"\xf4")
    image += b"".join(_handler(vector, mode) for vector in range(32))
    with Vm(chosen, PACKS) as vm:
        vm.enable_cap(abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE)
        found = boot_flat(vm, image, BASE, mode)
        cs = CODE_64 if mode == "long" else CODE_32
        gates = (
            serialise_gate(
                Gate(cs.selector, HANDLERS + HANDLER_BYTES * vector, 14), wide=mode == "long"
            )
            for vector in range(32)
        )
        vm.memory.load(IDT, b"".join(gates))
        vm.engine.bank.write_table("idtr", DescriptorTable(IDT, 0xFFF))
        if found.space is not None:
            vm.add_memory(EDGE, PAGE_SIZE)
            found.space.map(EDGE, EDGE, PAGE_SIZE, write=True, execute=False)
            vm.memory.load(EDGE, bytes(range(1, 129)) * 32)
        vm.memory.load(DATA, struct.pack("<16f", *(1.0 + i for i in range(16))))
        vm.memory.load(DATA + 64, struct.pack("<16I", *range(0x1000, 0x1010)))
        found.vcpu.registers.gpr[RDI] = DATA
        assert isinstance(found.vcpu.run(10), Hlt)
        assert found.vcpu.registers.rip == at, "the setup itself faulted"
        yield found


def state(found: Machine) -> tuple[bytes, ...]:
    """All that an instruction could change but RIP, RSP, flags and MXCSR."""
    registers, memory = found.vcpu.registers, found.vm.memory
    numbers = [value for n, value in enumerate(registers.gpr) if n != RSP]
    pages = [memory.read(DATA, PAGE_SIZE)]
    if found.space is not None:
        pages.append(memory.read(EDGE, PAGE_SIZE))
    return (repr(numbers).encode(), bytes(registers.vec.raw), bytes(registers.opmask), *pages)


def faulted(found: Machine, *, changed: bool = False) -> Seen:
    """Run the instruction: it must reach a handler, and all must be as before it."""
    registers = found.vcpu.registers
    rip, rsp, before = registers.rip, registers.gpr[RSP], state(found)
    assert isinstance(found.vcpu.run(10), Hlt)
    vector, offset = divmod(registers.rip - 1 - HANDLERS, HANDLER_BYTES)
    assert offset == 0, f"no fault: it halted at {registers.rip - 1:#x}"
    wide = found.space is not None
    count, size = (6, 8) if wide else (4, 4)
    frame = found.vm.memory.read(registers.gpr[RSP], count * size)
    words = list(struct.unpack(f"<{count}{'Q' if wide else 'I'}", frame))
    code = words.pop(0) if vector in ERROR_CODES else None
    assert words[0] == rip, "the frame names the instruction"
    assert not wide or words[3] == rsp
    assert changed or state(found) == before
    cr2 = registers.bank.read("cr2") if vector == PF_ else 0
    return Seen(vector, code, cr2, registers.mxcsr)


# #XM: unmasked floating-point exceptions

ONE_THIRD = "vmovups ymm2, [rdi]; vmovups ymm3, [rdi + 4]; vxorps ymm1, ymm1, ymm1;"
ZEROS = "vmovups ymm2, [rdi]; vxorps ymm3, ymm3, ymm3; vmovaps ymm1, ymm2;"
NEGATIVE = "vmovups ymm2, [rdi]; vxorps ymm3, ymm3, ymm3; vsubps ymm2, ymm3, ymm2;"
HUGE = "mov eax, 0x7f000000; vmovd xmm2, eax; vpbroadcastd ymm2, xmm2; vmovaps ymm3, ymm2;"
TINY = "mov eax, 0x00800000; vmovd xmm2, eax; vpbroadcastd ymm2, xmm2; vmovaps ymm3, ymm2;"
DENORMAL = "mov eax, 0x00000001; vmovd xmm2, eax; vpbroadcastd ymm2, xmm2; vmovaps ymm3, ymm2;"
SNAN = "mov eax, 0x7f800001; vmovd xmm2, eax; vpbroadcastd ymm2, xmm2; vmovaps ymm3, ymm2;"
QNAN = "mov eax, 0x7fc00001; vmovd xmm2, eax; vpbroadcastd ymm2, xmm2; vmovaps ymm3, ymm2;"
IE, DE, ZE, OE, UE, PE = (1 << n for n in range(6))

UNMASKED = [
    (ONE_THIRD, "vdivps ymm1, ymm2, ymm3", PE, PE),
    (ZEROS, "vdivps ymm1, ymm2, ymm3", ZE, ZE),
    (ZEROS, "vdivss xmm1, xmm2, xmm3", ZE, ZE),
    (ZEROS, "divps xmm2, xmm3", ZE, ZE),
    (ZEROS, "vdivps ymm1, ymm2, [rdi + 0x400]", ZE, ZE),
    (NEGATIVE, "vsqrtps ymm1, ymm2", IE, IE),
    (NEGATIVE, "sqrtps xmm1, xmm2", IE, IE),
    (HUGE, "vaddps ymm1, ymm2, ymm3", OE, OE),
    (HUGE, "vmulps ymm1, ymm2, ymm3", OE, OE | PE),
    (HUGE, "vfmadd231ps ymm1, ymm2, ymm3", OE, OE | PE),
    (HUGE, "vcvtps2dq ymm1, ymm2", IE, IE),
    (HUGE, "vcvttss2si eax, xmm2", IE, IE),
    (HUGE, "vcvtps2ph xmm1, ymm2, 0", OE, OE | PE),
    (TINY, "vmulps ymm1, ymm2, ymm3", UE, UE | PE),
    (TINY, "mulss xmm2, xmm3", UE, UE | PE),
    (DENORMAL, "vaddps ymm1, ymm2, ymm3", DE, DE),
    (DENORMAL, "vcmpps ymm1, ymm2, ymm3, 0", DE, DE),
    (DENORMAL, "vcvtps2pd ymm1, xmm2", DE, DE),
    (SNAN, "vminps ymm1, ymm2, ymm3", IE, IE),
    (SNAN, "vfmadd213ps ymm1, ymm2, ymm3", IE, IE),
    (SNAN, "vroundps ymm1, ymm2, 0", IE, IE),
    (SNAN, "vucomiss xmm2, xmm3", IE, IE),
    (QNAN, "vcomiss xmm2, xmm3", IE, IE),
    (QNAN, "vcmpps ymm1, ymm2, ymm3, 1", IE, IE),
    (QNAN, "vhaddps ymm1, ymm2, ymm3", IE, 0),
    (SNAN, "vdpps ymm1, ymm2, ymm3, 0xff", IE, IE),
]  # fmt: skip


def unmask(flags: int) -> str:
    masked = 0x1F80 & ~(flags << 7)
    return f"mov dword ptr [rdi + 0x800], {masked:#x}; vldmxcsr [rdi + 0x800];"


@pytest.mark.parametrize(
    ("setup", "instruction", "unmasked", "raised"),
    UNMASKED,
    ids=[f"{u[1]}-{u[2]}" for u in UNMASKED],
)
def test_an_unmasked_exception_is_xm_with_its_flags_and_nothing_written(
    setup: str, instruction: str, unmasked: int, raised: int
) -> None:
    with guest(setup + unmask(unmasked), instruction) as found:
        masks = 0x1F80 & ~(unmasked << 7)
        if not raised:  # a quiet NaN goes through: no exception
            assert isinstance(found.vcpu.run(10), Hlt)
            assert found.vcpu.registers.mxcsr == masks
            return
        seen = faulted(found)
        assert (seen.vector, seen.error_code) == (XM, None)
        assert seen.mxcsr & ~0x3F == masks
        assert seen.mxcsr & 0x3F & unmasked == unmasked
        assert seen.mxcsr & 0x3F & ~(raised | PE) == 0


def test_without_osxmmexcpt_an_unmasked_exception_is_ud() -> None:
    setup = ZEROS + unmask(ZE) + "mov rax, cr4; and rax, ~0x400; mov cr4, rax;"
    with guest(setup, "vdivps ymm1, ymm2, ymm3") as found:
        assert faulted(found).vector == UD


def test_masked_exceptions_go_on() -> None:
    with guest(ZEROS, "vdivps ymm1, ymm2, ymm3", exactness="exact") as found:
        rip = found.vcpu.registers.rip
        assert isinstance(found.vcpu.run(10), Hlt)
        assert found.vcpu.registers.rip > rip and found.vcpu.registers.mxcsr == 0x1F80 | ZE


# #GP: alignment

MISALIGNED: list[tuple[str, Exactness]] = [
    ("vmovaps ymm1, [rdi + 16]", "exact"), ("vmovdqa ymm1, [rdi + 1]", "exact"),
    ("vmovapd xmm1, [rdi + 8]", "exact"), ("vmovdqa [rdi + 16], ymm1", "exact"),
    ("vmovaps [rdi + 4], xmm1", "exact"), ("vmovntdqa ymm1, [rdi + 16]", "exact"),
    ("vmovntps [rdi + 16], ymm1", "exact"), ("vmovntdq [rdi + 8], xmm1", "exact"),
    ("sha256msg1 xmm1, [rdi + 8]", "lazy"),
    ("fxsave [rdi + 8]", "lazy"), ("xsave [rdi + 16]", "lazy"),
    ("movaps xmm1, [rdi + 8]", "exact"), ("paddd xmm1, [rdi + 8]", "exact"),
    ("aesenc xmm1, [rdi + 8]", "exact"), ("movdqa [rdi + 8], xmm1", "exact"),
    ("addps xmm1, [rdi + 4]", "exact"),
]  # fmt: skip


@pytest.mark.parametrize(("instruction", "exactness"), MISALIGNED)
def test_a_misaligned_operand_that_must_be_aligned_is_gp(
    instruction: str, exactness: Exactness
) -> None:
    setup = "vmovups ymm1, [rdi]; mov eax, 7; xor edx, edx"
    with guest(setup, instruction, exactness=exactness) as found:
        seen = faulted(found)
        assert (seen.vector, seen.error_code) == (GP, 0)


@pytest.mark.parametrize(
    "instruction",
    ["vpaddd ymm1, ymm2, [rdi + 1]", "vmovdqu ymm1, [rdi + 3]", "vaddps ymm1, ymm2, [rdi + 4]",
     "vfmadd231ps xmm1, xmm2, [rdi + 4]", "vpcmpistri xmm1, [rdi + 5], 0"],
)  # fmt: skip
def test_vex_operands_may_be_misaligned(instruction: str) -> None:
    with guest("vmovups ymm2, [rdi]", instruction) as found:
        rip = found.vcpu.registers.rip
        assert isinstance(found.vcpu.run(10), Hlt)
        assert rip < found.vcpu.registers.rip < HANDLERS


# #PF: pages that are not there; page crossing; masked lanes

END = EDGE + PAGE_SIZE
FIRST_HALF = "vpcmpeqd xmm2, xmm2, xmm2; vmovups ymm1, [rdi];"  # lanes 0 to 3 of YMM
ALL_LANES = "vpcmpeqd ymm2, ymm2, ymm2; vmovups ymm1, [rdi];"
LAST_LANE = "vpcmpeqd ymm2, ymm2, ymm2; vpslldq ymm2, ymm2, 12; vpxor xmm3, xmm3, xmm3;"
LAST_LANE += "vinserti128 ymm2, ymm2, xmm3, 0; vmovups ymm1, [rdi];"
AT_EDGE = f"mov rsi, {END - 16:#x};"

CROSSING = [
    ("", "vmovups ymm1, [rsi]", END, 0),
    ("", "vmovdqu [rsi], ymm1", END, 2),
    ("", "vpaddd ymm1, ymm1, [rsi]", END, 0),
    ("", "vextracti128 [rsi + 8], ymm1, 1", END, 2),
    ("", "vcvtps2ph [rsi + 8], ymm1, 0", END, 2),
    ("", "vbroadcasti128 ymm1, [rsi + 1]", END, 0),
    ("", "movdqu xmm1, [rsi + 16]", END, 0),
    (ALL_LANES, "vmaskmovps ymm3, ymm2, [rsi]", END, 0),
    (ALL_LANES, "vmaskmovps [rsi], ymm2, ymm1", END, 2),
    (LAST_LANE, "vpmaskmovd [rsi], ymm2, ymm1", END + 12, 2),
    (LAST_LANE, "vpmaskmovd ymm3, ymm2, [rsi]", END + 12, 0),
    ("", "movbe rax, [rsi + 12]", END, 0),
]  # fmt: skip


@pytest.mark.parametrize(("setup", "instruction", "address", "write"), CROSSING)
def test_an_operand_that_crosses_into_an_absent_page_faults_whole(
    setup: str, instruction: str, address: int, write: int
) -> None:
    with guest("vmovups ymm1, [rdi + 32];" + setup + AT_EDGE, instruction) as found:
        seen = faulted(found)
        assert (seen.vector, seen.error_code, seen.address) == (PF_, write, address)


@pytest.mark.parametrize("instruction", ["movups xmm1, [rsi + 8]", "movups [rsi + 8], xmm1"])
def test_a_legacy_move_that_crosses_into_an_absent_page_faults_whole(instruction: str) -> None:
    """On the fast path a part may be done, and is done again: the gap "partial"."""
    for policy, changed in (("nothing", False), ("verified", True)):
        with guest("vmovups ymm1, [rdi + 32];" + AT_EDGE, instruction, policy=policy) as found:
            seen = faulted(found, changed=changed)
            write = 2 if "]," in instruction else 0
            assert (seen.vector, seen.error_code, seen.address) == (PF_, write, END)


def test_an_xsave_area_that_crosses_into_an_absent_page_is_left_alone() -> None:
    setup = f"vmovups ymm1, [rdi]; mov eax, 7; xor edx, edx; mov rsi, {END - 64:#x}"
    with guest(setup, "xsave [rsi]") as found:
        seen = faulted(found)
        assert seen.vector == PF_ and END <= seen.address < END + PAGE_SIZE


@pytest.mark.parametrize(
    ("setup", "instruction"),
    [(FIRST_HALF, "vmaskmovps ymm3, ymm2, [rsi]"), (FIRST_HALF, "vpmaskmovd [rsi], ymm2, ymm1"),
     (FIRST_HALF, "vpmaskmovq ymm3, ymm2, [rsi]"), (FIRST_HALF, "vmaskmovpd [rsi], ymm2, ymm1"),
     ("vpxor ymm2, ymm2, ymm2; mov esi, 0x50000000;", "vmaskmovps ymm3, ymm2, [rsi]"),
     ("vpxor ymm2, ymm2, ymm2; mov esi, 0x50000000;", "vmaskmovps [rsi], ymm2, ymm1")],
)  # fmt: skip
def test_lanes_that_are_masked_out_do_not_fault(setup: str, instruction: str) -> None:
    with guest(AT_EDGE + setup, instruction) as found:
        rip = found.vcpu.registers.rip
        want = found.vm.memory.read(DATA, 16) if "[rsi]," in instruction else b""
        assert isinstance(found.vcpu.run(10), Hlt)
        assert rip < found.vcpu.registers.rip < HANDLERS
        if want and setup == FIRST_HALF:
            assert found.vm.memory.read(END - 16, 16) == want


@pytest.mark.parametrize("instruction", ["vmovups ymm1, [rsi]", "vmovups [rsi], ymm2"])
def test_a_fault_that_is_cured_is_restarted(instruction: str) -> None:
    with guest(f"vmovups ymm2, [rdi]; mov rsi, {END - 16:#x}", instruction) as found:
        assert faulted(found).vector == PF_
        found.vm.add_memory(END, PAGE_SIZE)
        assert found.space is not None
        found.space.map(END, END, PAGE_SIZE, write=True, execute=False)
        assert isinstance(found.vcpu.run(10), Hlt)
        assert found.vcpu.registers.rip < HANDLERS
        memory = found.vm.memory.read(END - 16, 32)
        number = 1 if "ymm1" in instruction else 2
        assert found.vcpu.registers.vec.read(number, 32) == memory


# Gathers

INDICES = f"""
    mov dword ptr [rdi + 0x100], 0; mov dword ptr [rdi + 0x104], 4;
    mov dword ptr [rdi + 0x108], 8; mov dword ptr [rdi + 0x10c], {END - EDGE:#x};
    mov dword ptr [rdi + 0x110], 12; mov dword ptr [rdi + 0x114], 16;
    mov dword ptr [rdi + 0x118], 20; mov dword ptr [rdi + 0x11c], 24;
    mov rsi, {EDGE:#x}; vmovdqu ymm3, [rdi + 0x100]; vpcmpeqd ymm2, ymm2, ymm2; vmovups ymm1, [rdi];
""".replace("\n", "")


def test_a_gather_keeps_what_it_has_done_and_goes_on_after_the_fault() -> None:
    with guest(INDICES, "vpgatherdd ymm1, [rsi + ymm3], ymm2") as found:
        registers = found.vcpu.registers
        before = registers.vec.read(1, 32)
        seen = faulted(found, changed=True)
        assert (seen.vector, seen.error_code, seen.address) == (PF_, 0, END)
        page = found.vm.memory.read(EDGE, 32)
        assert registers.vec.read(1, 12) == page[:12], "the elements before it"
        assert registers.vec.read(1, 32)[12:] == before[12:]
        assert registers.vec.read(2, 32) == bytes(12) + b"\xff" * 20, "their mask is cleared"
        found.vm.add_memory(END, PAGE_SIZE)
        assert found.space is not None
        found.space.map(END, END, PAGE_SIZE, write=True, execute=False)
        found.vm.memory.load(END, b"last")
        found.vm.memory.load(EDGE, bytes(12))  # what was loaded must not be loaded again
        assert isinstance(found.vcpu.run(10), Hlt)
        assert registers.rip < HANDLERS
        assert registers.vec.read(1, 32) == page[:12] + b"last" + page[12:28]
        assert registers.vec.read(2, 32) == bytes(32)


def test_elements_that_a_gather_masks_out_do_not_fault() -> None:
    setup = INDICES + "vpxor xmm4, xmm4, xmm4; vpblendd ymm2, ymm2, ymm4, 8;"
    with guest(setup, "vpgatherdd ymm1, [rsi + ymm3], ymm2") as found:
        assert isinstance(found.vcpu.run(10), Hlt)
        assert found.vcpu.registers.rip < HANDLERS


@pytest.mark.parametrize(
    "code",
    ["c4e26d900c0e", "c4e26d900c16", "c4e26d90141e"],
    ids=["destination is index", "mask is index", "mask is destination"],
)
def test_a_gather_onto_its_own_operands_is_ud(code: str) -> None:
    with guest(INDICES, bytes.fromhex(code)) as found:
        assert faulted(found).vector == UD


# #UD

UNDEFINED = {
    "vvvv of a move": "c5e828c1",
    "vvvv of vpabsd": "c4e26d1eca",
    "vvvv of vsqrtps": "c5ec51ca",
    "vvvv of vmovups to memory": "c5ec110f",
    "vvvv of vcvtdq2ps": "c5ec5bca",
    "L of vpermd": "c4e26936cb",
    "L of vbroadcasti128": "c4e2795a0f",
    "L of vpextrb": "c4e37d14c801",
    "L of vmovd": "c5fd6ec8",
    "L of vaesimc": "c4e27ddbca",
    "L of andn": "c4e26cf2cb",
    "W of vpermps": "c4e2ed16cb",
    "W of vbroadcastss": "c4e2fd18ca",
    "LOCK before vpaddd": "f0c5edfecb",
    "66 before vpaddd": "66c5edfecb",
    "F2 before vaddps": "f2c5ec58cb",
    "F3 before vaddps": "f3c5ec58cb",
    "REX before vaddps": "48c5ec58cb",
    "LOCK before andn": "f0c4e268f2cb",
    "LOCK before addps": "f00f58ca",
    "LOCK before a register": "f001c8",
    "VMASKMOV with registers": "c4e26d2ccb",
    "an opcode that is none": "0fff",
    "ud2": "0f0b",
}


@pytest.mark.parametrize("policy", ["verified", "nothing"])
@pytest.mark.parametrize("why", UNDEFINED)
def test_encodings_that_are_reserved_are_ud(why: str, policy: str) -> None:
    with guest("vmovups ymm1, [rdi]", bytes.fromhex(UNDEFINED[why]), policy=policy) as found:
        assert faulted(found).vector == UD


VECTOR_CODE = (
    "vaddps ymm1, ymm2, ymm3", "vpaddd xmm1, xmm2, xmm3", "vmovdqu [rdi], ymm1", "vzeroupper",
    "vpmovmskb eax, ymm1", "vptest ymm1, ymm2", "vfmadd231ss xmm1, xmm2, xmm3",
    "vpgatherdd ymm1, [rdi + ymm3], ymm2", "vmaskmovps ymm1, ymm2, [rdi]", "vldmxcsr [rdi]",
    "vcvtph2ps ymm1, xmm2", "vaesenc xmm1, xmm2, xmm3", "vbroadcastss ymm1, [rdi]",
)  # fmt: skip


@pytest.mark.parametrize("instruction", VECTOR_CODE)
def test_without_osxsave_vex_is_ud(instruction: str) -> None:
    with guest("mov rax, cr4; and rax, ~0x40000; mov cr4, rax", instruction) as found:
        assert faulted(found).vector == UD


@pytest.mark.parametrize("instruction", VECTOR_CODE)
def test_without_avx_in_xcr0_vex_is_ud(instruction: str) -> None:
    with guest("xor ecx, ecx; xor edx, edx; mov eax, 3; xsetbv", instruction) as found:
        assert faulted(found).vector == UD


@pytest.mark.parametrize(
    "instruction", ["andn eax, ecx, edx", "shlx eax, ecx, edx", "rorx eax, ecx, 3"]
)
def test_vex_on_general_registers_needs_no_xcr0(instruction: str) -> None:
    setup = "mov rax, cr4; and rax, ~0x40000; mov cr4, rax; mov rax, cr0; or rax, 8; mov cr0, rax"
    with guest(setup, instruction) as found:
        assert isinstance(found.vcpu.run(10), Hlt)
        assert found.vcpu.registers.rip < HANDLERS


# #NM

SET_TS = "mov eax, 7; xor edx, edx; mov rcx, cr0; or rcx, 8; mov cr0, rcx"
OTHER_CODE = (
    "addps xmm1, xmm2", "movups xmm1, [rdi]", "paddd xmm1, xmm2", "pshufb xmm1, xmm2",
    "stmxcsr [rdi]", "fld1", "fninit", "emms", "paddd mm0, mm1", "fxsave [rdi]", "xsave [rdi]",
    "aesenc xmm1, xmm2", "cvtsi2ss xmm1, eax", "sha1nexte xmm1, xmm2",
)  # fmt: skip


@pytest.mark.parametrize("policy", ["verified", "nothing"])
@pytest.mark.parametrize("instruction", VECTOR_CODE + OTHER_CODE)
def test_with_ts_set_vector_and_x87_code_is_nm(instruction: str, policy: str) -> None:
    with guest(SET_TS, instruction, policy=policy) as found:
        assert faulted(found).vector == NM


def test_after_clts_the_instruction_goes_on() -> None:
    with guest(SET_TS, "vaddps ymm1, ymm2, ymm3") as found:
        assert faulted(found).vector == NM
        bank = found.vm.engine.bank
        bank.write("cr0", bank.read("cr0") & ~8)
        assert isinstance(found.vcpu.run(10), Hlt)
        assert found.vcpu.registers.rip < HANDLERS


# Addresses that are not canonical

NOT_CANONICAL = (
    "mov rsi, 1 << 47; mov rbp, 1 << 47; mov rcx, 0x7fffffffffff; mov rax, 0x7ffffffffff8;"
)
OUTSIDE = [
    ("vmovups ymm1, [rsi]", GP), ("vmovups [rsi], ymm1", GP), ("vpaddd ymm1, ymm2, [rsi]", GP),
    ("vmovups ymm1, [rbp]", SS_), ("vmovdqu [rbp], xmm1", SS_),
    ("vpaddd xmm1, xmm2, [rbp + 4]", SS_), ("movups xmm1, [rsi]", GP), ("movups [rbp], xmm1", SS_),
    ("paddd xmm1, [rsi]", GP),
    ("movbe rax, [rsi]", GP), ("shlx rax, [rbp], rdx", SS_), ("xsave [rsi]", GP),
    ("vmovups ymm1, [rax]", GP), ("vbroadcastss ymm1, [rbp]", SS_),
]  # fmt: skip


@pytest.mark.parametrize(("instruction", "vector"), OUTSIDE)
def test_an_address_that_is_not_canonical_is_gp_or_ss(instruction: str, vector: int) -> None:
    with guest(NOT_CANONICAL, instruction) as found:
        seen = faulted(found)
        assert (seen.vector, seen.error_code) == (vector, 0)


def test_an_element_of_a_gather_that_is_not_canonical_is_gp() -> None:
    setup = INDICES + "mov rsi, 1 << 47;"
    with guest(setup, "vpgatherdd ymm1, [rsi + ymm3], ymm2") as found:
        seen = faulted(found)
        assert (seen.vector, seen.error_code) == (GP, 0)


# 32-bit guests

PROTECTED = [
    ("vmovups ymm2, [edi]; vxorps ymm3, ymm3, ymm3; mov dword ptr [edi + 0x800], 0x1d80;"
     "vldmxcsr [edi + 0x800]", "vdivps ymm1, ymm2, ymm3", XM, None),
    ("", "vmovaps ymm1, [edi + 16]", GP, 0),
    ("", "vmovdqa [edi + 8], xmm1", GP, 0),
    ("mov eax, cr0; or eax, 8; mov cr0, eax", "vpaddd ymm1, ymm2, ymm3", NM, None),
    ("mov eax, cr4; and eax, 0xfffbffff; mov cr4, eax", "vpaddd ymm1, ymm2, ymm3", UD, None),
    ("xor ecx, ecx; xor edx, edx; mov eax, 3; xsetbv", "vpermd ymm1, ymm2, ymm3", UD, None),
    ("", bytes.fromhex("c5e828c1"), UD, None),
    ("", bytes.fromhex("f0c5edfecb"), UD, None),
]  # fmt: skip


@pytest.mark.parametrize(("setup", "instruction", "vector", "code"), PROTECTED)
def test_a_guest_of_32_bits_sees_the_same_faults(
    setup: str, instruction: str | bytes, vector: int, code: int | None
) -> None:
    with guest(setup, instruction, "protected") as found:
        seen = faulted(found)
        assert (seen.vector, seen.error_code) == (vector, code)


SAME_CODE = """
    vmovdqu ymm0, [{di}]; vmovdqu ymm1, [{di} + 64]; vpaddd ymm2, ymm0, ymm1;
    vpshufb ymm3, ymm2, ymm1; vpermd ymm4, ymm1, ymm3; vfmadd213ps ymm0, ymm1, ymm2;
    vpcmpeqd ymm5, ymm5, ymm5; vpsrld ymm6, ymm5, 29; vpgatherdd ymm7, [{di} + ymm6 * 4], ymm5;
    vextracti128 xmm1, ymm4, 1; vpmovmskb ecx, ymm3; andn edx, ecx, ecx; shlx ecx, ecx, edx;
    vinserti128 ymm5, ymm2, [{di} + 16], 1; vmovups [{di} + 0x200], ymm5
""".replace("\n", "")


def test_avx2_code_gives_in_32_bits_what_it_gives_in_64() -> None:
    results = []
    for mode, pointer in (("long", "rdi"), ("protected", "edi")):
        assert mode in ("long", "protected")
        with guest("nop", SAME_CODE.format(di=pointer).replace(";", "\n"), mode) as found:  # type: ignore[arg-type]
            assert isinstance(found.vcpu.run(10), Hlt)
            registers = found.vcpu.registers
            assert registers.rip < HANDLERS
            vectors = b"".join(registers.vec.read(n, 64) for n in range(8))
            results.append((vectors, registers.gpr[RCX], found.vm.memory.read(DATA, 0x800)))
    assert results[0] == results[1]
