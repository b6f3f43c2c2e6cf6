"""Lowered code does what the handlers do: single instructions, and runs of them with others."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from functools import cache

import pytest

from guests.assemble import assemble
from handlers.lowered import rule_for
from sandbox.abi import KVM_CAP_EXIT_ON_EMULATION_FAILURE
from sandbox.boot import Machine
from sandbox.cases import Cases, float_type
from sandbox.conformance import defined_flags, difference, not_comparable
from sandbox.decode import FORM_NAMES, Insn, decode
from sandbox.encodings import SIMPLE, Memory, all_forms, encode, encodings, form, info_of, kinds_of
from sandbox.gaps import alignment, reconcile_lowered
from sandbox.native import CODE, DATA, Result, State, Trap
from sandbox.paging import AddressSpace
from sandbox.policy import Policy
from sandbox.registers import RAX, RSI, RSP
from sandbox.subjects import HandlerTier, Lowered, Stage, without_avx512
from tests.guest import BASE, machine, run_to_hlt

PACKS = ("integer", "avx2")
pytestmark = pytest.mark.usefixtures("lowering_mode")
PARTS = 8
"""The forms are spread over so many tests."""
Subjects = tuple[Lowered, HandlerTier]
LAZY = (0x1F80, 0x3F80, 0x5F80, 0x7F80)


@pytest.fixture(scope="module")
def subjects(lowering_mode: str) -> tuple[Lowered, HandlerTier]:
    handlers = Stage(PACKS)
    handlers.registers.xcr0 = 7
    return Lowered(Stage(PACKS, "verified")), HandlerTier(handlers)


@cache
def lowered_forms() -> list[int]:
    """The forms with a rule, less those whose results are approximate."""
    found = []
    for code in all_forms():
        name, info = FORM_NAMES[code], info_of(code)
        if rule_for(code, info.mnemonic, info.encoding) is not None and not not_comparable(name):
            found.append(code)
    return found


def differs(subjects: Subjects, insn: Insn, state: State) -> str | None:
    """In what lowered code differs from the handler, but for what is lazy."""
    lowered, handlers = subjects
    mine, right = lowered.run(insn, state), handlers.run(insn, state)
    fault = right.fault
    trap = Trap(fault.vector, fault.error_code or 0, fault.address, 0, 0) if fault else None
    want = Result(right.state, trap)
    mine, _gaps = reconcile_lowered(insn, state, want, mine)
    return difference(insn, want, mine, defined_flags(insn))


@pytest.mark.parametrize("part", range(PARTS))
def test_every_form_does_what_its_handler_does(part: int, subjects: Subjects) -> None:
    lowered, _handlers = subjects
    tried = 0
    for code in lowered_forms()[part::PARTS]:
        rng = random.Random(code)
        some = list(encodings(code))
        for insn in rng.sample(some, min(3, len(some))):
            if lowered.accepts(insn):
                tried += 1
                for state in Cases(insn, mxcsr=LAZY).take(3):
                    assert differs(subjects, insn, without_avx512(state)) is None, insn.text(CODE)
    assert tried > 100


def test_most_of_avx_and_avx2_is_lowered(subjects: Subjects) -> None:
    lowered, _handlers = subjects
    wanted = """VPADDD_YMM_YMM_YMMM256 VPXOR_YMM_YMM_YMMM256 VPCMPEQB_YMM_YMM_YMMM256
        VPMOVMSKB_R32_YMM VMOVDQU_YMM_YMMM256 VMOVDQU_YMMM256_YMM VPTEST_YMM_YMMM256
        VADDPD_YMM_YMM_YMMM256 VADDSD_XMM_XMM_XMMM64 VPERMQ_YMM_YMMM256_IMM8
        VINSERTI128_YMM_YMM_XMMM128_IMM8 VZEROUPPER VPBROADCASTB_YMM_XMMM8
        VPSHUFB_YMM_YMM_YMMM256 VPERMD_YMM_YMM_YMMM256 VPSLLVD_YMM_YMM_YMMM256""".split()
    for insn in (next(encodings(form(f"VEX_{name}"))) for name in wanted):
        assert lowered.accepts(insn), insn.form
    assert len(lowered_forms()) > 530


# -- runs ------------------------------------------------------------------------------------


@cache
def some_instructions() -> tuple[list[int], list[int]]:
    """Lowered forms that compute exactly, and forms that are allowed, to be mixed."""
    lowered = [
        code
        for code in lowered_forms()
        if float_type(next(encodings(code))) is None and "GATHER" not in FORM_NAMES[code]
    ]
    others = """ADD_R64_RM64 ADC_RM32_R32 IMUL_R64_RM64 LEA_R64_M MOV_R64_RM64 SETB_RM8 XOR_R32_RM32
        MOVZX_R32_RM8 PADDD_XMM_XMMM128 PXOR_XMM_XMMM128 MOVUPS_XMM_XMMM128 MOVUPS_XMMM128_XMM
        PSHUFD_XMM_XMMM128_IMM8 CMP_R64_RM64 RCL_RM32_1 CMOVE_R64_RM64 MOV_RM64_R64 MOVQ_RM64_XMM
        MOVQ_XMM_RM64 SHLD_RM64_R64_IMM8 PUSH_R64 POP_R64""".split()
    return lowered, [form(name) for name in others]


FAR = Memory(relative=True, absolute=DATA + 0x1800)


def random_code(rng: random.Random, at: int, count: int) -> bytes:
    """Straight-line code for ``at``: RSI, which is never written, leads to memory."""
    lowered, others = some_instructions()
    code = b""
    while count:
        which = rng.choice(lowered if rng.random() < 0.7 else others)
        gpr = any(kind.startswith(("R8", "R16", "R32", "R64")) for kind in kinds_of(which))
        numbers = [n for n in range(16) if n not in (4, 6)] if gpr else range(16)
        registers = [rng.choice(numbers) for _ in range(4)]
        memory = rng.choice((None, None, SIMPLE, Memory(6, displacement=rng.randrange(64)), FAR))
        here = len(code)
        if memory is FAR:  # as if the instruction stood at CODE
            memory = replace(FAR, absolute=FAR.absolute - (at + here) + CODE)
        try:
            raw = encode(which, registers, memory, rng.randrange(256))
        except ValueError:
            continue
        insn = decode(raw, 64)
        if insn.code == which and alignment(insn) == 1:
            code += raw
            count -= 1
    return code


class Program:
    """Code at ``native.CODE`` on a stage, under ``verified`` with or without lowering."""

    def __init__(self, *, lowering: bool) -> None:
        self.stage = Stage(PACKS, "verified")
        self.stage.vm.policy = Policy.load("verified").with_exactness(lowering=lowering)
        self.stage.vm.enable_cap(KVM_CAP_EXIT_ON_EMULATION_FAILURE)
        self.stage.registers.xcr0 = 7

    def run(self, code: bytes, state: State) -> State:
        """The state in which the guest comes to the end."""
        stage, end = self.stage, CODE + len(code)
        stage.vm.memory.load(CODE, code + b"\xf4")
        stage.load(decode(b"\x90", 64), state)
        left = stage.vcpu.run(10)  # HLT at CPL 3: #GP, and there is no IDT
        assert stage.registers.rip == end, left
        return stage.store(state)


@pytest.fixture(scope="module")
def programs(lowering_mode: str) -> tuple[Program, Program]:
    return Program(lowering=True), Program(lowering=False)


def random_program(seed: int) -> tuple[bytes, State]:
    """Code, and a state to begin with: RSI leads to memory, RSP to a stack."""
    rng = random.Random(seed)
    code = random_code(rng, CODE, rng.randrange(2, 60))
    state = without_avx512(Cases(decode(b"\x90", 64), seed).state())
    state.gpr[RSI], state.gpr[RSP] = DATA + 0x1000 + rng.choice((0, 32, 7)), DATA + 0x2800
    return code, state


@pytest.mark.parametrize("seed", range(60))
def test_random_code_comes_to_the_same_end(seed: int, programs: tuple[Program, Program]) -> None:
    code, state = random_program(seed)
    want, got = programs[1].run(code, state), programs[0].run(code, state)
    assert got.gpr == want.gpr
    assert got.vectors == want.vectors
    assert got.memory == want.memory
    assert got.rflags == want.rflags
    assert programs[0].stage.vcpu.stats.lowered_sites


def test_stops_at_any_time_do_not_lead_random_code_astray(
    programs: tuple[Program, Program],
) -> None:
    """New code at the same addresses each time, stopped while it is translated and as it runs."""
    fast, plain = programs
    rng, done = random.Random(3), threading.Event()

    def disturb() -> None:
        while not done.wait(rng.random() * 3e-4):
            fast.stage.engine.stop()

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for seed in range(1000, 1060):
            code, state = random_program(seed)
            got = fast.run(code, state)
            want = plain.run(code, state)
            assert (got.gpr, got.rflags) == (want.gpr, want.rflags), seed
            assert (got.vectors, got.memory) == (want.vectors, want.memory), seed
    finally:
        done.set()
        thread.join()


LOOP = """
    mov rdi, {data}
    mov ecx, 200
    vpcmpeqd ymm1, ymm1, ymm1
    vpsrld ymm1, ymm1, 31
    vpxor ymm0, ymm0, ymm0
again:
    vpaddd ymm0, ymm0, ymm1
    vmovdqu [rdi + rcx], ymm0
    add eax, 3
    vpermq ymm2, ymm0, 0x4e
    vpaddd ymm3, ymm2, [rdi + rcx]
    vpsadbw ymm4, ymm3, [rip + constant]
    vpaddq ymm5, ymm5, ymm4
    inc edx
    dec ecx
    jnz again
    vextracti128 xmm6, ymm5, 1
    vpaddq xmm5, xmm5, xmm6
    vmovq rbx, xmm5
    hlt
    .balign 32
constant: .quad 1, 0x0203040506070809, 3, 4
"""


def outcome(found: Machine) -> tuple[list[int], bytes]:
    run_to_hlt(found)
    registers = found.vcpu.registers
    return list(registers.gpr), bytes(registers.vec.raw)


@pytest.mark.parametrize("count", [False, True])
def test_a_loop_comes_to_the_same_end_and_never_traps(count: bool) -> None:
    source = LOOP.format(data=0x20_0000)
    plain = Policy.load("verified").with_exactness(lowering=False)
    with machine(source, policy=plain, handlers=PACKS) as found:
        want = outcome(found)
        assert not found.vcpu.stats.lowered_sites
    with machine(source, policy="verified", handlers=PACKS) as found:
        found.vm.settings.count_lowered = count
        found.vm.policy = found.vm.policy
        assert outcome(found) == want
        stats = found.vcpu.stats
        assert stats.fallback_count == 1  # HLT
        once = ("vpcmpeqd", "vpsrld", "vpxor", "vextracti128", "vmovq")
        often = ("vmovdqu", "vpermq", "vpsadbw")
        want_counts = dict.fromkeys(once, 1) | dict.fromkeys(often, 200)
        want_counts |= {"vpaddd": 400, "vpaddq": 201}
        assert stats.lowered == (want_counts if count else {})


HIGH = [0x5555_5555_4000, 0xFFFF_9000_0000_0000, 0x9000_0000, 0x1_0000_0000 - 0x1000]


@pytest.mark.parametrize("where", HIGH, ids=hex)
def test_position_independent_code_finds_its_constants_wherever_it_is(where: int) -> None:
    source = LOOP.format(data=0x20_0000)
    with machine(source, policy="verified", handlers=PACKS) as found:
        want = outcome(found)
    code = assemble(source, where, 64)
    with machine(code, policy="verified", handlers=PACKS) as found:
        space = found.space
        assert isinstance(space, AddressSpace)
        space.map(where, BASE, 0x1000, write=True, execute=True)
        found.vcpu.registers.rip = where
        assert outcome(found) == want
        assert found.vcpu.stats.fallback_count == 1


@pytest.mark.parametrize("number", [0, 1, 3, 5, 7, 8, 14, 15])
def test_a_byte_register_is_the_guests_own_between_lowered_instructions(number: int) -> None:
    """VPSHUFB takes a general register as scratch; what stands behind it reads another's byte."""
    store = bytes((0x44 if number > 7 else 0x40, 0x88, 0x44 | (number & 7) << 3, 0x24, 0xFF))
    insert = bytes((0xC4, 0xC3 if number > 7 else 0xE3, 0x71, 0x20, 0xC8 | number & 7, 3))
    shuffle = assemble("vpshufb ymm2, ymm1, ymm1", 0, 64)
    code = shuffle + store + shuffle + insert + shuffle + b"\xf4"
    with machine(code, policy="verified", handlers=PACKS) as found:
        registers, value = found.vcpu.registers, 0x11 * (number % 15 + 1)
        registers.gpr[number] = value
        run_to_hlt(found)
        assert found.vcpu.cpu.read(registers.gpr[RSP] - 1, 1)[0] == value
        assert registers.vec.read(1, 4)[3] == value
        assert registers.gpr[number] == value
        assert found.vcpu.stats.lowered_sites == {"vpshufb": 3, "vpinsrb": 1}


def test_the_same_bytes_are_lowered_once_and_other_bytes_anew() -> None:
    """A guest that patches an immediate and runs the code again sees the new one, each time."""
    source = """
        mov esi, 1
    again:
        mov byte ptr [rip + here - 1], sil
        vpsrld ymm0, ymm1, 1
    here:
        vpaddd ymm2, ymm2, ymm0
        inc esi
        cmp esi, 20
        jne again
        vmovd eax, xmm2
        hlt
    """
    with machine(source, policy="verified", handlers=PACKS) as found:
        found.vcpu.registers.vec.write(1, (0x4000_0000).to_bytes(4, "little") * 8)
        run_to_hlt(found)
        assert found.vcpu.registers.gpr[RAX] == sum(0x4000_0000 >> n for n in range(1, 20))


def test_a_lowered_store_into_the_code_behind_it_takes_effect_at_once() -> None:
    """The store is in the middle of what would be one run."""
    source = """
        lea rdi, [rip + here]
        vmovdqu ymm1, [rip + new]
        vpcmpeqd ymm2, ymm2, ymm2
        vmovdqu [rdi], ymm1
        vpsubd ymm3, ymm3, ymm2
    here:
        vpsubd ymm3, ymm3, ymm2
        vpsubd ymm3, ymm3, ymm2
        vpsubd ymm3, ymm3, ymm2
        vpsubd ymm3, ymm3, ymm2
        vpsubd ymm3, ymm3, ymm2
        vpsubd ymm3, ymm3, ymm2
        vpsubd ymm3, ymm3, ymm2
        vpsubd ymm3, ymm3, ymm2
        vmovd eax, xmm3
        hlt
    new:
        vpaddd ymm3, ymm3, ymm3
        vpaddd ymm3, ymm3, ymm3
        .fill 24, 1, 0x90
    """
    with machine(source, policy="verified", handlers=PACKS) as found:
        run_to_hlt(found)
        assert found.vcpu.registers.gpr[RAX] == 4


def test_a_guest_that_reads_its_lowered_code_sees_its_own_bytes() -> None:
    source = """
        mov ecx, 3
    again:
        vpaddd ymm0, ymm0, ymm0
        mov rax, [rip + again]
        dec ecx
        jnz again
        hlt
    """
    with machine(source, policy="verified", handlers=PACKS) as found:
        before = found.vm.memory.read(BASE, 64)
        run_to_hlt(found)
        at = BASE + 5
        want = int.from_bytes(before[at - BASE : at - BASE + 8], "little")
        assert found.vcpu.registers.gpr[RAX] == want
        assert found.vm.memory.read(BASE, 64) == before


def test_an_address_of_32_bits_does_not_wrap_within_an_operand(subjects: Subjects) -> None:
    """The second half of [esi] at 4 GiB - 8 lies beyond it, not at 8."""
    lowered, _handlers = subjects
    assert not lowered.accepts(decode(bytes.fromhex("67c5fe6f06"), 64))  # vmovdqu ymm0, [esi]
    assert lowered.accepts(decode(bytes.fromhex("67c5fa6f06"), 64))  # vmovdqu xmm0, [esi]
