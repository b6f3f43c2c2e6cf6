"""Host runs do what the handlers do, whatever the guest does, and the host comes to no harm.

Random programs run three ways: with host runs, with portable sequences, with handlers alone. More
of them, with other seeds: ``HOST_RUN_SEEDS=100000:2000 pytest tests/test_host_runs.py``.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, cast

import pytest

from sandbox.boot import Machine
from sandbox.engine.unicorn import UnicornEngine
from sandbox.exits import GuestException
from sandbox.lowering import SAVED_OFFSET, SPILL_OFFSET, UPPER_OFFSET
from sandbox.policy import Policy
from sandbox.registers import RAX, RCX, RDI, RDX, RSI
from tests.guest import machine, run_to_hlt
from tests.host_programs import PACKS, computer, counts, first_difference, load, program, run

FIRST, COUNT = map(int, os.environ.get("HOST_RUN_SEEDS", "0:120").split(":"))
PARTS = 6
LAZY = (0x1F80, 0x1F80, 0x7F80)
EXACT = (0x1F80, 0x1F80, 0x3F80, 0x5FC0, 0x9FC0, 0x1D80, 0x1000)
HOST: dict[str, Any] = {}
PORTABLE: dict[str, Any] = {"host": False}
HANDLERS: dict[str, Any] = {"lowering": False}


@pytest.fixture(scope="module")
def lazy() -> Iterator[list[Machine]]:
    """Host runs, portable sequences, handlers."""
    with ExitStack() as stack:
        yield [stack.enter_context(computer(**how)) for how in (HOST, PORTABLE, HANDLERS)]


@pytest.fixture(scope="module")
def exact() -> Iterator[list[Machine]]:
    """Host runs and handlers, with exact exception flags."""
    with ExitStack() as stack:
        choices = (HOST | {"float_flags": "exact"}, HANDLERS | {"float_flags": "exact"})
        yield [stack.enter_context(computer(**how)) for how in choices]


@pytest.mark.parametrize("part", range(PARTS))
def test_random_programs_do_the_same_in_all_three_ways(lazy: list[Machine], part: int) -> None:
    for seed in range(FIRST + part, FIRST + COUNT, PARTS):
        what = program(seed, mxcsr=LAZY, floats=False)
        traces = []
        for found in lazy:
            load(found, what)
            traces.append(run(found, what))
        host, portable, handlers = traces
        assert first_difference(host, handlers) is None, f"host, seed {seed}\n{what.text}"
        assert first_difference(portable, handlers) is None, f"portable, seed {seed}\n{what.text}"
    assert sum(lazy[0].vcpu.stats.lowered_sites.values()) > 20


@pytest.mark.parametrize("part", range(PARTS))
def test_random_programs_with_floats_set_the_flags_in_mxcsr_and_fault_as_the_handlers_do(
    exact: list[Machine], part: int
) -> None:
    """Rounding modes, FTZ, DAZ, exceptions that are not masked; all of MXCSR is compared."""
    for seed in range(FIRST + 50_000 + part, FIRST + 50_000 + COUNT, PARTS):
        what = program(seed, mxcsr=EXACT)
        traces = []
        for found in exact:
            load(found, what)
            traces.append(run(found, what, mxcsr=True))
        assert first_difference(*traces) is None, f"seed {seed}\n{what.text}"


def test_executions_are_counted_exactly() -> None:
    """Of programs without faults: lowered, or by a handler, an instruction is counted once."""
    with computer() as host, computer(lowering=False) as handlers:
        host.vm.settings.count_lowered = True
        host.vm.policy = host.vm.policy
        for seed in range(FIRST + 90_000, FIRST + 90_000 + COUNT // 3):
            what = program(seed, faults=False)
            seen = []
            for found in (host, handlers):
                load(found, what)
                before = counts(found)
                run(found, what)
                seen.append(counts(found) - before)
            assert seen[0] == seen[1], f"seed {seed}\n{what.text}"


# -- what has gone wrong once --------------------------------------------------------------------


def outcome(source: str, mxcsr: int = 0x1F80, **exactness: Any) -> tuple[Any, ...]:
    policy = Policy.load("verified").with_exactness(**exactness)
    with machine(source, policy=policy, handlers=PACKS) as found:
        registers, bank = found.vcpu.registers, found.vm.engine.bank
        registers.vec.write(2, struct.pack("<4d", 1.0, 2.0, 3.0, 4.0))
        bank.write("mxcsr", mxcsr)
        left = found.vcpu.run(10)
        return (
            str(left), hex(registers.rip), [hex(value) for value in registers.gpr],
            hex(registers.rflags & ~0x10), bytes(registers.vec.raw).hex(),
        )  # fmt: skip


def same(source: str, mxcsr: int = 0x1F80, **exactness: Any) -> None:
    want = outcome(source, mxcsr, lowering=False, **exactness)
    assert outcome(source, mxcsr, **exactness) == want
    assert want[0]


@pytest.mark.parametrize("flags", ["lazy", "exact"])
def test_an_exception_that_is_not_masked_never_reaches_the_host_after_a_way_back_in(
    flags: str,
) -> None:
    """Hidden code does the first instruction; the run must look at MXCSR again, or SIGFPE."""
    source = """
        vpaddd ymm0, ymm0, ymm0
        vdivps ymm1, ymm2, ymm3
        vpaddd ymm4, ymm4, ymm4
        hlt
    """
    same(source, 0x1F80 & ~0x200, float_flags=flags)
    source = "mov rdi, 0x200000\n vpaddd ymm0, ymm0, [rdi]\n" + source
    same(source, 0x1F80 & ~0x200, float_flags=flags)
    assert GuestException.name in outcome(source, 0x1D80, float_flags=flags)[0]


@pytest.mark.parametrize("mode", range(4))
def test_a_conversion_from_memory_alone_goes_by_mxcsr(mode: int) -> None:
    """No vector register is named, and MXCSR is used."""
    source = """
        mov rdi, 0x200100
        mov rax, 0x4004000000000000
        mov [rdi], rax
        vcvtsd2si rbx, qword ptr [rdi]
        vcvtsd2si rcx, qword ptr [rdi]
        neg rbx
        hlt
    """
    same(source, 0x1F80 | mode << 13)
    same(source, 0x0F80 | mode << 13)  # the precision exception is not masked
    same(source, 0x1F80 | mode << 13, float_flags="exact")


FLAGS = {
    "hidden code sets flags, a jump behind a vector instruction goes by them": """
        mov rdi, 0x200ffc
        vpaddd ymm0, ymm0, ymm0
        cmp rbx, [rdi]
        vpaddd ymm0, ymm0, ymm0
        je good
        mov eax, 1
    good:
        vpaddd ymm0, ymm0, ymm0
        hlt
    """,
    "hidden code sets flags that the run would keep": """
        mov rdi, 0x200ffc
        vpaddd ymm0, ymm0, ymm0
        cmp rbx, [rdi]
        vpaddd ymm0, ymm0, ymm0
        vmovdqu ymm1, [rdi]
        hlt
    """,
    "a carry goes through the look-up of a memory operand": """
        mov rdi, 0x200100
        mov rax, -1
        mov ecx, 1
        mov rbx, [rdi]
        mov [rdi], rbx
        vpaddd ymm0, ymm0, ymm0
        add rax, rcx
        adc rbx, [rdi]
        adc r8, [rdi]
        vpaddd ymm0, ymm0, ymm0
        hlt
    """,
    "so does what is moved or set on a condition": """
        mov rdi, 0x200100
        mov rax, -1
        mov [rdi], rax
        vpaddd ymm0, ymm0, ymm0
        cmp rax, rbx
        cmove rcx, [rdi]
        sete byte ptr [rdi]
        sbb qword ptr [rdi], 0
        mov rdx, [rdi]
        vpaddd ymm0, ymm0, ymm0
        hlt
    """,
}


@pytest.mark.parametrize("why", FLAGS)
def test_flags_are_the_guests(why: str) -> None:
    same(FLAGS[why])


@pytest.mark.parametrize("value", [1, 0x1234_5678_90, 1 << 63, (1 << 64) - 8])
@pytest.mark.parametrize("offset", [UPPER_OFFSET, SAVED_OFFSET, SPILL_OFFSET], ids=hex)
@pytest.mark.parametrize("end", ["mov rax, [rsi]", "mov rax, [rdx]", "cpuid", "hlt"])
def test_a_guest_that_writes_into_the_state_page_harms_but_itself(
    offset: int, value: int, end: str
) -> None:
    """Where to go on is not said there, but where the guest cannot write."""
    source = f"vpaddd ymm0, ymm0, ymm0\n mov [rdi], rcx\n {end}\n vpaddd ymm0, ymm0, ymm0\n hlt"
    with machine(source, policy="verified", handlers=PACKS) as found:
        registers = found.vcpu.registers
        registers.gpr[RDI] = 0x20_0000
        found.vcpu.run(5)
        made = cast(UnicornEngine, found.vm.engine)._blocks.lowering
        assert made is not None
        registers.gpr[RDI], registers.gpr[RCX] = made.hidden.state + offset, value
        registers.gpr[RSI], registers.gpr[RDX] = 0x6000_0000, 0x20_0000
        registers.rip = 0x1004
        found.vcpu.run(5)
        registers.gpr[RDI], registers.gpr[RSI] = 0x20_0000, 0x20_0000
        registers.rip = 0x1000
        run_to_hlt(found)


LEGACY = (
    "pshufb xmm1, {x}", "pcmpistri xmm1, {x}, 12", "pcmpistrm xmm1, {x}, 0x4c",
    "sha1msg1 xmm1, {x}", "sha1msg2 xmm1, {x}", "sha1nexte xmm1, {x}", "sha1rnds4 xmm1, {x}, 2",
    "sha256msg1 xmm1, {x}", "sha256msg2 xmm1, {x}", "sha256rnds2 xmm1, {x}",
)  # fmt: skip


@pytest.mark.parametrize("x", ["xmm2", "xmm1", "[rdi]", "[rdi + 4080]"])
@pytest.mark.parametrize("text", LEGACY)
def test_what_is_not_vex_keeps_the_upper_halves(text: str, x: str) -> None:
    source = f"""
        mov rdi, 0x200000
        vpcmpeqd ymm0, ymm0, ymm0
        vpsubd ymm1, ymm0, [rdi]
        vpsubd ymm2, ymm1, ymm0
        {text.format(x=x)}
        {text.format(x="xmm2")}
        vpaddd ymm3, ymm1, ymm0
        pushfq
        pop rax
        hlt
    """
    same(source)


@pytest.mark.parametrize("text", ["vmovdqa ymm1, [rdi + 8]", "vmovaps [rdi + 16], ymm2"])
@pytest.mark.parametrize("trapped", [(), ("movups",), ("movups", "movaps", "movdqu", "movdqa")])
def test_an_aligned_move_with_a_misaligned_operand_never_faults_in_the_host(
    text: str, trapped: tuple[str, ...]
) -> None:
    source = f"vpaddd ymm0, ymm0, ymm0\n {text}\n vpaddd ymm0, ymm0, ymm0\n hlt"
    rules = f'[[rule]]\naction = "trap"\nmnemonic = {list(trapped)}\n' if trapped else ""
    for alignment in ("lazy", "exact"):
        policy = Policy.parse(f'extends = "verified"\nalignment = "{alignment}"\n' + rules)
        with machine(source, policy=policy, handlers=PACKS) as found:
            found.vcpu.registers.gpr[RDI] = 0x20_0000
            for _ in range(2):
                found.vcpu.registers.rip = 0x1000
                left = found.vcpu.run(5)
                if alignment == "exact":
                    assert isinstance(left, GuestException) and left.exception == 13


ALIAS = """
    vpcmpeqd ymm0, ymm0, ymm0
    vmovdqu ymm5, [rip + new]
    mov ecx, {rounds}
    lea rsi, [rip + here]
    add rsi, rdi
again:
    vpsubd ymm1, ymm1, ymm0
    cmp ecx, 1
    jne skip
    vmovdqu [rsi], ymm5
skip:
    vpsubd ymm1, ymm1, ymm0
here:
    .rept 8
    vpsubd ymm1, ymm1, ymm0
    .endr
    dec ecx
    jnz again
    vmovd eax, xmm1
    hlt
new:
    .quad 0x9090909090909090, 0x9090909090909090, 0x9090909090909090, 0x9090909090909090
"""


@pytest.mark.parametrize("distance", [0, 0x5000_0000 - 0x1000], ids=hex)
@pytest.mark.parametrize("rounds", [1, 2, 3, 300])
def test_a_store_that_reaches_the_code_by_another_address_takes_effect_at_once(
    rounds: int, distance: int
) -> None:
    """The first store there: Unicorn does it, and then holds the page for one without code."""
    source = ALIAS.format(rounds=rounds)
    source = source.replace(".rept 8\n", "").replace(".endr", "vpsubd ymm1, ymm1, ymm0\n" * 7)
    for low in (True, False):
        policy = Policy.load("verified").with_exactness(lowering=low)
        with machine(source, policy=policy, handlers=PACKS) as found:
            assert found.space is not None
            found.space.map(0x5000_0000, 0x1000, 0x1000, write=True, execute=False)
            found.vcpu.registers.gpr[RDI] = distance
            run_to_hlt(found)
            assert found.vcpu.registers.gpr[RAX] == 10 * rounds - 8


@pytest.mark.parametrize("text", ["andn r9, rax, r10", "sarx rbx, r9, r11", "pdep rax, rbx, rcx"])
def test_what_unicorn_refuses_before_vector_code_is_the_handlers(text: str) -> None:
    """BMI under CR0.TS: Unicorn takes it for vector code, and it is no #NM."""
    for behind in ("vpaddb ymm1, ymm2, ymm3", "vpgatherdd ymm1, [rax + ymm2], ymm3"):
        with machine(f"{text}\n {behind}\n hlt", policy="verified", handlers=PACKS) as found:
            bank = found.vm.engine.bank
            bank.write("cr0", bank.read("cr0") | 8)
            left = found.vcpu.run(5)
            assert isinstance(left, GuestException) and left.exception == 7
            assert found.vcpu.registers.rip == 0x1005


@pytest.mark.parametrize("lowering", [True, False], ids=["lowered", "in handlers"])
@pytest.mark.parametrize("condition", "be a l ge le g p np o no b ae e ne s ns".split())
def test_a_set_on_a_condition_whose_store_faults_keeps_the_flags(
    condition: str, lowering: bool
) -> None:
    """Unicorn works out the flags, then stores; where that fails, they are lost."""
    source = f"mov r8d, 7\n or r8, 0x38\n set{condition} byte ptr [rdi]\n hlt"
    seen = []
    for address in (0x20_0000, 0x6000_0000):
        policy = Policy.load("verified").with_exactness(lowering=lowering)
        with machine(source, policy=policy, handlers=PACKS) as found:
            found.vcpu.registers.gpr[RDI] = address
            found.vcpu.run(5)
            seen.append(found.vcpu.registers.rflags & 0x8C5)
    assert seen[0] == seen[1]
