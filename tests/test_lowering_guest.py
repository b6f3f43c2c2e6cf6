"""What a guest, and whoever runs it, sees of lowered code: nothing but that it is fast.

Faults, MMIO, control registers, single-stepping, stops at any time, guests that look for the hidden
pages and jump into them, hidden memory that is used up.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

import pytest
from iced_x86 import Decoder

from guests.assemble import assemble
from sandbox.abi import KVM_CAP_EXIT_ON_EMULATION_FAILURE
from sandbox.boot import Machine
from sandbox.cpu import Cpu
from sandbox.decode import Insn
from sandbox.engine import hidden
from sandbox.engine.unicorn import UnicornEngine
from sandbox.engine.unicorn_lowering import UnicornLowering
from sandbox.exits import EmulationFailure, GuestException, Hlt, Intr, Mmio
from sandbox.handler import FunctionHandler, Pack, Resume
from sandbox.memory import PAGE_SIZE
from sandbox.paging import AddressSpace
from sandbox.policy import Policy
from sandbox.registers import RAX, RBX, RCX, RDI, RSI
from sandbox.vm import Vm
from tests.guest import BASE, add_idt, enter_user_mode, machine, own_tables, run_to_hlt

PACKS = ("integer", "avx2", "system")
pytestmark = pytest.mark.usefixtures("lowering_mode")
EDGE = 0x4000_0000
"""A page after which nothing is mapped."""
HANDLER = BASE + 0x800


def with_handler(source: str, handler: str) -> bytes:
    """Code at BASE, and a handler of exceptions at HANDLER."""
    return assemble(source, BASE, 64).ljust(HANDLER - BASE, b"\xf4") + assemble(
        handler, HANDLER, 64
    )


@contextmanager
def guest(source: str | bytes, policy: str | Policy = "verified", **more: Any) -> Iterator[Machine]:
    """A flat guest whose RSI is at the last 8 bytes before EDGE + 4096, where all ends."""
    code = assemble(source, BASE, 64) if isinstance(source, str) else source
    with machine(code, policy=policy, handlers=PACKS, **more) as found:
        space = found.space
        assert space is not None
        found.vm.add_memory(EDGE, 2 * PAGE_SIZE)
        space.map(EDGE, EDGE, PAGE_SIZE, write=True, execute=False)
        found.vm.memory.load(EDGE, bytes(range(256)) * 32)
        found.vcpu.registers.gpr[RSI] = EDGE + PAGE_SIZE
        yield found


def engine(found: Machine) -> UnicornEngine:
    return cast(UnicornEngine, found.vm.engine)


def lowering(found: Machine) -> UnicornLowering:
    made = engine(found)._blocks.lowering
    assert made is not None
    return made


def state(found: Machine) -> tuple[Any, ...]:
    registers = found.vcpu.registers
    edge = found.vm.memory.read(EDGE, 2 * PAGE_SIZE)
    return list(registers.gpr), registers.rflags, bytes(registers.vec.raw), edge


def at_start(found: Machine) -> None:
    """Warm up to where RIP is, with registers full of what is told apart."""
    raw = found.vcpu.registers.vec.raw
    raw[:] = b"".join(bytes([n + 1] * 16 + [n + 0x81] * 16 + [0] * 32) for n in range(32))


# -- faults ------------------------------------------------------------------------------------

FAULTS = [
    ("vmovdqu ymm1, [rsi - 8]", 0),
    ("vmovdqu ymm1, [rsi - 24]", 0),
    ("vmovdqu [rsi - 8], ymm1", 2),
    ("vmovdqu [rsi - 24], ymm1", 2),
    ("vmovdqu [rsi - 17], ymm1", 2),
    ("vmovups [rsi - 31], ymm15", 2),
    ("vmovdqu [rsi - 8], xmm1", 2),
    ("vmovdqu [rsi - 5], xmm1", 2),
    ("vmovups xmm1, [rsi - 8]", 0),
    ("vextracti128 [rsi - 4], ymm1, 1", 2),
    ("vmovq [rsi - 4], xmm1", 2),
    ("vpaddd ymm1, ymm2, [rsi - 8]", 0),
    ("vpaddd ymm1, ymm1, [rsi - 24]", 0),
    ("vpermq ymm1, [rsi - 16], 0x44", 0),
    ("vperm2i128 ymm1, ymm1, [rsi - 16], 0x88", 0),
    ("vpmovzxbd ymm1, [rsi - 4]", 0),
    ("vinserti128 ymm1, ymm1, [rsi - 1], 1", 0),
    ("vbroadcastsd ymm1, [rsi - 4]", 0),
    ("vptest ymm1, [rsi - 16]", 0),
    ("vmovddup ymm1, [rsi - 16]", 0),
]


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize(("text", "write"), FAULTS)
def test_an_operand_that_runs_into_a_page_that_is_not_there_changes_nothing(
    text: str, write: int, readonly: bool
) -> None:
    source = f"vpaddd ymm3, ymm4, ymm5\n{text}\n vpaddd ymm6, ymm7, ymm8\n hlt"
    seen = []
    for low in (True, False):
        with guest(source, Policy.load("verified").with_exactness(lowering=low)) as found:
            space = found.space
            assert space is not None
            if readonly:
                space.map(EDGE + PAGE_SIZE, EDGE + PAGE_SIZE, 64, write=False, execute=False)
            at_start(found)
            left = found.vcpu.run(10)
            seen.append((str(left), found.vm.engine.bank.read("cr2"), state(found)))
            assert bool(found.vcpu.stats.lowered_sites) == low
            if write or not readonly:
                assert isinstance(left, GuestException) and left.exception == 14
                assert left.error_code == write | readonly
                rest = range(1, 32)
                rest_same = all(
                    found.vcpu.registers.vec.read(n, 32) == bytes([n + 1] * 16 + [n + 0x81] * 16)
                    for n in rest
                    if n != 3
                )
                assert rest_same
    assert seen[0] == seen[1]


def test_an_operand_in_a_device_is_the_callers() -> None:
    source = """
        mov edi, 0x50000000
        vpaddd ymm3, ymm3, ymm3
        vmovdqu ymm1, [rdi]
        vmovdqu [rdi + 32], ymm1
        vmovq [rdi + 4], xmm1
        hlt
    """
    seen = []
    for low in (True, False):
        with guest(source, Policy.load("verified").with_exactness(lowering=low)) as found:
            assert found.space is not None
            found.space.map(0x5000_0000, 0x5000_0000, PAGE_SIZE, write=True, execute=False)
            exits = []
            while not isinstance(left := found.vcpu.run(10), Hlt):
                assert isinstance(left, Mmio)
                exits.append((left.phys_addr, left.len, left.is_write, bytes(left.data)))
                if not left.is_write:
                    left.data = bytes(range(len(left.data)))
            seen.append((exits, state(found)))
    assert seen[0] == seen[1]
    assert len(seen[0][0]) >= 8


def test_a_page_that_the_guest_makes_present_when_it_faults_is_gone_on_with() -> None:
    """Its handler maps nothing: it moves the pointer, and the instruction starts again."""
    source = """
        vmovdqu ymm1, [rsi - 8]
        vpaddd ymm2, ymm1, ymm1
        vmovd eax, xmm2
        hlt
    """
    handler = "add rsp, 8\n sub rsi, 24\n iretq"
    with guest(with_handler(source, handler)) as found:
        add_idt(found, {14: HANDLER})
        found.vm.memory.load(EDGE + PAGE_SIZE - 32, (7).to_bytes(4, "little") * 8)
        run_to_hlt(found)
        assert found.vcpu.registers.gpr[RAX] == 14


@pytest.mark.parametrize("last", range(10))
def test_a_run_ends_with_its_page_whatever_comes_behind(last: int) -> None:
    """The page behind can be executed, or not: then the fetch faults, and not before."""
    body = "vpcmpeqd ymm0, ymm0, ymm0\n" + "vpsubd ymm1, ymm1, ymm0\n" * 6
    length = len(assemble(body, BASE, 64))
    start = 2 * PAGE_SIZE - length + last
    code = assemble(body + "vmovd eax, xmm1\n hlt", start, 64)
    image = b"\xf4" * (start - BASE) + code
    for behind in (True, False):
        seen = []
        for low in (True, False):
            policy = Policy.load("verified").with_exactness(lowering=low)
            with machine(image, policy=policy, handlers=PACKS) as found:
                space = found.space
                assert space is not None
                space.map(2 * PAGE_SIZE, 2 * PAGE_SIZE, PAGE_SIZE, write=True, execute=behind)
                registers = found.vcpu.registers
                registers.rip = start
                left = found.vcpu.run(10)
                assert isinstance(left, Hlt if behind else GuestException)
                assert not behind or registers.gpr[RAX] == 6
                cr2 = found.vm.engine.bank.read("cr2")
                vectors = bytes(registers.vec.raw)
                seen.append((str(left), registers.rip, cr2, list(registers.gpr), vectors))
                assert bool(found.vcpu.stats.lowered_sites) == low
        assert seen[0] == seen[1]


# -- control registers ---------------------------------------------------------------------------

SWITCHES = {
    "XCR0 without AVX": ("xor ecx, ecx\n xor edx, edx\n mov eax, 1\n xsetbv", 6),
    "CR4.OSXSAVE": ("mov rax, cr4\n btr eax, 18\n mov cr4, rax", 6),
    "CR0.TS": ("mov rax, cr0\n or eax, 8\n mov cr0, rax", 7),
}
BACK = "xor ecx, ecx\n xor edx, edx\n mov eax, 7\n xsetbv"


@pytest.mark.parametrize("why", SWITCHES)
def test_what_switches_avx_off_is_seen_by_code_that_is_lowered_already(why: str) -> None:
    switch, vector = SWITCHES[why]
    source = f"""
        mov edi, 2
    again:
        vpaddd ymm0, ymm0, ymm0
        vpaddd ymm1, ymm1, ymm1
        {switch}
        dec edi
        jnz again
        hlt
    """
    with guest(source) as found:
        left = found.vcpu.run(10)
        assert isinstance(left, GuestException) and left.exception == vector
        assert found.vcpu.stats.lowered_sites or vector == 6
        assert found.vcpu.registers.rip == BASE + 5


@pytest.mark.parametrize(
    "switch",
    ["mov rax, cr4\n btr eax, 9\n mov cr4, rax", "mov rax, cr0\n or eax, 4\n mov cr0, rax"],
    ids=["CR4.OSFXSR clear", "CR0.EM set"],
)
def test_what_only_sse_minds_does_not_stop_vex(switch: str) -> None:
    source = f"""
        mov edi, 2
    again:
        vpcmpeqd ymm0, ymm0, ymm0
        vpsubd ymm1, ymm1, ymm0
        {switch}
        dec edi
        jnz again
        hlt
    """
    with guest(source) as found:
        run_to_hlt(found)
        assert found.vcpu.registers.vec.read(1, 32) == (2).to_bytes(4, "little") * 8


def test_lowering_begins_again_when_avx_is_switched_on_again() -> None:
    source = f"""
        mov edi, 3
    again:
        xor ecx, ecx
        xor edx, edx
        mov eax, 1
        xsetbv
        {BACK}
        mov ebx, 50
    inner:
        vpcmpeqd ymm0, ymm0, ymm0
        vpsubd ymm1, ymm1, ymm0
        dec ebx
        jnz inner
        dec edi
        jnz again
        hlt
    """
    with guest(source) as found:
        run_to_hlt(found)
        assert found.vcpu.registers.vec.read(1, 32) == (150).to_bytes(4, "little") * 8
        assert found.vcpu.stats.lowered_sites
        assert found.vcpu.stats.fallback_count < 60


# -- single-stepping -----------------------------------------------------------------------------


def test_single_stepping_sees_each_instruction_of_lowered_code_once() -> None:
    source = """
        mov edi, 2
        mov esi, 0x8000
    again:
        vpcmpeqd ymm0, ymm0, ymm0
        vpsubd ymm1, ymm1, ymm0
        lea eax, [rax + 1]
        vmovdqu [rsp - 64], ymm1
        vpaddd ymm1, ymm1, [rsp - 64]
        cmp edi, 1
        je last
        dec edi
        pushfq
        or dword ptr [rsp], 0x100
        popfq
        jmp again
    last:
        pushfq
        and dword ptr [rsp], 0xfffffeff
        popfq
        hlt
    """
    handler = """
        push rbx
        mov rbx, [rsp + 8]
        mov [rsi], ebx
        add rsi, 4
        pop rbx
        iretq
    """
    seen = []
    code = with_handler(source, handler)
    for low in (True, False):
        with machine(
            code, policy=Policy.load("verified").with_exactness(lowering=low), handlers=PACKS
        ) as found:
            add_idt(found, {1: HANDLER})
            run_to_hlt(found)
            registers = found.vcpu.registers
            count = (registers.gpr[RSI] - 0x8000) // 4
            data = found.vm.memory.read(0x8000, 4 * count)
            rips = [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
            seen.append((rips, list(registers.gpr), bytes(registers.vec.raw)))
            assert bool(found.vcpu.stats.lowered_sites) == low
    assert seen[0] == seen[1]
    lengths = [b - a for a, b in pairwise(seen[0][0])]
    assert lengths[:6] == [4, 4, 3, 6, 6, 3], "one #DB each, from the jump back on"


# -- stops -----------------------------------------------------------------------------------------

STOPPED = """
    mov ecx, {count}
    vpcmpeqd ymm1, ymm1, ymm1
    mov rdi, 0x200000
again:
    vpsubd ymm0, ymm0, ymm1
    vpaddd ymm2, ymm0, ymm1
    vmovdqu [rdi], ymm2
    vpaddq ymm3, ymm3, [rdi]
    inc rax
    vpxor ymm4, ymm3, ymm2
    vpaddd ymm5, ymm5, ymm4
    vpermq ymm6, ymm5, 0x1b
    vptest ymm6, ymm1
    adc rbx, 0
    vpaddd ymm7, ymm6, ymm7
    dec ecx
    jnz again
    hlt
"""
COUNT = 2_000_000


def test_a_stop_at_any_time_finds_the_guest_between_two_instructions() -> None:
    source = STOPPED.format(count=COUNT)
    code = assemble(source, BASE, 64)
    starts = {insn.ip for insn in Decoder(64, code, ip=BASE)}
    rng = random.Random(5)
    with machine(code, policy="verified", handlers=PACKS) as found:
        run_to_hlt(found, 30)
        want = list(found.vcpu.registers.gpr), bytes(found.vcpu.registers.vec.raw)
    stops = 0
    with machine(code, policy="verified", handlers=PACKS) as found:
        vcpu, registers = found.vcpu, found.vcpu.registers
        seen = set()
        done = threading.Event()

        def disturb() -> None:
            while not done.wait(rng.random() * 0.002):
                vcpu.request_stop()

        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            while not isinstance(left := vcpu.run(30), Hlt):
                assert isinstance(left, Intr)
                stops += 1
                seen.add(registers.rip)
                assert registers.rip in starts
                begun, done_with = registers.gpr[RAX], COUNT - registers.gpr[RCX]
                assert begun - done_with in (0, 1) or registers.rip < BASE + 17
                lanes = registers.vec.lanes(0, "u4", 32)
                assert len(set(lanes.tolist())) == 1
        finally:
            done.set()
            thread.join()
        assert (list(registers.gpr), bytes(registers.vec.raw)) == want
    assert stops > 20


def test_counts_are_exact_however_often_the_guest_is_stopped() -> None:
    source = STOPPED.format(count=60_000)
    with machine(source, policy="verified", handlers=PACKS) as found:
        found.vm.settings.count_lowered = True
        found.vm.policy = found.vm.policy
        vcpu = found.vcpu
        done = threading.Event()

        def disturb() -> None:
            while not done.wait(0.001):
                vcpu.request_stop()

        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            while not isinstance(vcpu.run(30), Hlt):
                pass
        finally:
            done.set()
            thread.join()
        run = vcpu.stats.lowered
        assert run["vpsubd"] == run["vpxor"] == run["vpermq"] == run["vptest"] == 60_000
        assert run["vpaddd"] == 180_000


def test_an_instruction_that_faults_is_not_counted_as_lowered() -> None:
    source = "vpaddd ymm1, ymm1, ymm1\n vmovdqu ymm2, [rsi - 8]\n vpsubd ymm1, ymm1, ymm1\n hlt"
    with guest(source) as found:
        found.vm.settings.count_lowered = True
        found.vm.policy = found.vm.policy
        assert isinstance(found.vcpu.run(10), GuestException)
        assert found.vcpu.stats.lowered == {"vpaddd": 1}


# -- probing ---------------------------------------------------------------------------------------


def _hidden(found: Machine) -> tuple[int, int, list[int]]:
    """Where the hidden pages begin, the state page, and the addresses of their instructions."""
    made = lowering(found)
    return made.hidden.linear, made.hidden.state, sorted(made.hidden.places)


PROBE = """
    vpcmpeqd ymm0, ymm0, ymm0
    vpaddd ymm1, ymm0, ymm0
    nop
here:
    {what}
    vpaddd ymm2, ymm1, ymm0
    hlt
"""


@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("what", ["mov rax, [rdi]", "mov [rdi], rax", "call rdi", "jmp rdi"])
def test_a_guest_that_finds_the_hidden_pages_can_do_no_harm(what: str, user: bool) -> None:
    code = assemble(PROBE.format(what=what), BASE, 64)
    plain = assemble(PROBE.format(what="nop"), BASE + 0x100, 64)
    image = code.ljust(0x100, b"\xf4") + plain
    with machine(image, policy="verified", handlers=PACKS) as found:
        if user:
            enter_user_mode(found)
        registers = found.vcpu.registers
        registers.rip = BASE
        left = found.vcpu.run(10)  # so that there is hidden code
        base, data, places = _hidden(found)
        used = lowering(found).hidden._used
        before = bytes(lowering(found).hidden._code.host[:used])
        rng = random.Random(what)
        targets = [base, base + 16, base + 17, data, data + 8, base + hidden.CODE_BYTES - 1]
        targets += [rng.choice(places) + rng.randrange(2) for _ in range(30)] + places
        at = BASE + code.index(assemble(what, BASE, 64))
        for target in targets:
            registers.rip, registers.gpr[RDI] = at, target
            registers.gpr[RAX] = rng.getrandbits(64)
            registers.gpr[4] = 0x8000_0000 - 64
            left = found.vcpu.run(0.05)
            assert isinstance(left, (Hlt, GuestException, EmulationFailure, Mmio, Intr)), left
        assert bytes(lowering(found).hidden._code.host[:used]) == before
        registers.rip = BASE + 0x100  # the machine still works
        found.vcpu.run(10)
        assert registers.vec.read(2, 32) == (0xFFFF_FFFD).to_bytes(4, "little") * 8


def test_the_hidden_code_can_be_read_but_not_written() -> None:
    source = PROBE.format(what="mov rax, [rdi]\n mov [rdi], rbx")
    with machine(source, policy="verified", handlers=PACKS) as found:
        found.vcpu.registers.gpr[RDI] = 0x20_0000
        run_to_hlt(found)
        base, _data, places = _hidden(found)
        registers = found.vcpu.registers
        registers.rip = BASE + 9
        registers.gpr[RDI], registers.gpr[RBX] = places[0], 0x1234
        left = found.vcpu.run(10)
        assert isinstance(left, GuestException) and left.exception == 14 and left.error_code == 3
        assert registers.gpr[RAX] != 0
        word = int.from_bytes(lowering(found).hidden._code.host[places[0] - base :][:8], "little")
        assert word == registers.gpr[RAX]


def test_bytes_of_the_guests_choice_in_hidden_code_are_never_run() -> None:
    """The address of a constant stands in hidden code as an immediate: here it is CPUID, HLT."""
    chosen = int.from_bytes(bytes.fromhex("31c00fa2f4") + b"\x7f", "little")  # xor; cpuid; hlt
    where = chosen & ~0xFFF
    offset = chosen - where
    source = f"vmovdqu ymm0, [rip + {0x100}]\n vpaddd ymm1, ymm0, ymm0\n hlt"
    code = assemble(source, where, 64)
    with machine(b"\xf4", policy="verified", handlers=PACKS) as found:
        space = found.space
        assert isinstance(space, AddressSpace)
        start = chosen - 0x100 - 8  # RIP-relative from behind the instruction of 8 bytes
        page = start & ~0xFFF
        if page >> 47:
            pytest.skip("not a canonical address")
        space.map(page, 0x10_0000, 2 * PAGE_SIZE, write=True, execute=True)
        found.vm.memory.load(0x10_0000 + start - page, code)
        assert offset < PAGE_SIZE
        registers = found.vcpu.registers
        registers.rip = start
        run_to_hlt(found)
        base, _data, _places = _hidden(found)
        image = bytes(lowering(found).hidden._code.host[:4096])
        at = image.find(bytes.fromhex("0fa2f4"))
        assert at > 0, "the immediate is there"
        for _attempt in range(3):  # the second time Unicorn might know the block
            registers.rip = base + at
            registers.gpr[RAX] = 0x55
            assert isinstance(found.vcpu.run(1), EmulationFailure)
            assert registers.gpr[RAX] == 0x55 and registers.rip == base + at


def test_under_the_guests_own_page_tables_the_addresses_are_the_guests() -> None:
    """A guest that maps its own code where the hidden pages were runs that."""
    source = """
        vpcmpeqd ymm0, ymm0, ymm0
        vpaddd ymm1, ymm0, ymm0
        mov rax, 0x100000
        nop
        mov cr3, rax
        jmp rdi
    there:
        vpaddd ymm2, ymm1, ymm0
        mov eax, 42
        hlt
    """
    code = assemble(source, BASE, 64)
    there = code.index(bytes.fromhex("b82a000000")) - 4
    with machine(code, policy="verified", handlers=PACKS) as found:
        tables = own_tables(found)
        assert tables.root == 0x10_0000
        found.vcpu.max_exits = 1
        found.vcpu.run(10)
        base, _data, places = _hidden(found)
        found.vcpu.max_exits = None
        target = places[0] & ~0xFFF
        tables.map(target, BASE, PAGE_SIZE, write=True, execute=True)
        found.vcpu.registers.gpr[RDI] = target + there
        assert target >= base
        run_to_hlt(found)
        assert found.vcpu.registers.gpr[RAX] == 42
        assert found.vcpu.registers.vec.read(2, 32) == (0xFFFF_FFFD).to_bytes(4, "little") * 8


# -- the machine -----------------------------------------------------------------------------------


def test_hidden_memory_that_is_used_up_is_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden, "_CODE_LIMIT", 2 * PAGE_SIZE)
    monkeypatch.setattr(hidden, "HOST_ENTRIES", 40)
    body = "\n".join(
        f"vpsubd ymm{n % 6 + 1}, ymm{n % 5 + 1}, ymm0\n jmp l{n}\nl{n}:" for n in range(120)
    )
    source = f"mov edi, 5\nvpcmpeqd ymm0, ymm0, ymm0\nagain:\n{body}\n dec edi\n jnz again\n hlt"
    seen = []
    for low in (True, False):
        with machine(
            source, policy=Policy.load("verified").with_exactness(lowering=low), handlers=PACKS
        ) as found:
            found.vm.settings.count_lowered = low
            found.vm.policy = found.vm.policy
            run_to_hlt(found)
            stats = found.vcpu.stats
            seen.append(bytes(found.vcpu.registers.vec.raw))
            total = stats.lowered.get("vpsubd", 0) + stats.by_mnemonic.get("vpsubd", 0)
            assert total == 600
            assert bool(stats.lowered.get("vpsubd")) == low
    assert seen[0] == seen[1]


def test_a_handler_installed_at_run_time_is_asked_instead_of_the_lowered_code() -> None:
    seen: list[int] = []

    def mine(cpu: Cpu, _insn: Insn) -> Resume | None:
        seen.append(cpu.rip)
        return None

    source = "vpaddd ymm0, ymm0, ymm0\n vpaddd ymm1, ymm1, ymm1\n hlt"
    with machine(source, policy="verified", handlers=()) as found:
        found.vm.install(Pack("mine", (FunctionHandler(mine, ("vpaddd",), (), ()),)))
        found.vm.install("avx2")
        run_to_hlt(found)
        assert seen == [BASE, BASE + 4]
    with machine(source, policy="verified", handlers=PACKS) as found:
        run_to_hlt(found)
        assert found.vcpu.stats.lowered_sites == {"vpaddd": 2}
        found.vm.policy = found.vm.policy.with_exactness(lowering=False)
        found.vcpu.registers.rip = BASE
        run_to_hlt(found)
        assert found.vcpu.stats.by_mnemonic["vpaddd"] == 2
        found.vm.policy = found.vm.policy.with_exactness(lowering=True)
        found.vcpu.registers.rip = BASE
        run_to_hlt(found)
        assert found.vcpu.stats.by_mnemonic["vpaddd"] == 2
        assert found.vcpu.stats.lowered_sites == {"vpaddd": 2}


def test_a_policy_file_switches_lowering_off() -> None:
    policy = Policy.parse('extends = "verified"\nlowering = false\n')
    with machine("vpaddd ymm0, ymm0, ymm0\n hlt", policy=policy, handlers=PACKS) as found:
        run_to_hlt(found)
        assert found.vcpu.stats.lowered_sites == {}
        assert found.vcpu.stats.by_mnemonic == {"vpaddd": 1, "hlt": 1}


def test_what_the_policy_traps_is_not_used_in_lowered_code() -> None:
    text = 'extends = "verified"\nhost = false\n[[rule]]\naction = "trap"\nmnemonic = ["paddd"]\n'
    source = "vpaddd ymm0, ymm0, ymm0\n vpsubd ymm0, ymm0, ymm0\n hlt"
    with machine(source, policy=Policy.parse(text), handlers=PACKS) as found:
        run_to_hlt(found)
        assert found.vcpu.stats.lowered_sites == {"vpsubd": 1}
        assert found.vcpu.stats.by_mnemonic == {"vpaddd": 1, "hlt": 1}


def test_two_machines_at_once_have_each_their_own() -> None:
    source = STOPPED.format(count=20_000)
    with (
        machine(source, policy="verified", handlers=PACKS) as one,
        machine(source, policy="verified", handlers=PACKS) as other,
    ):
        run_to_hlt(one)
        threads = []
        one.vcpu.registers.rip = BASE
        for found in (one, other):
            found.vcpu.registers.vec.raw[:] = bytes(2048)
            found.vcpu.registers.gpr[RBX] = found.vcpu.registers.gpr[RAX] = 0
            threads.append(threading.Thread(target=run_to_hlt, args=(found, 30)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert bytes(one.vcpu.registers.vec.raw) == bytes(other.vcpu.registers.vec.raw)
        assert list(one.vcpu.registers.gpr) == list(other.vcpu.registers.gpr)


def test_a_closed_machine_leaves_no_pages_behind() -> None:
    vm = Vm("verified", PACKS)
    with vm:
        vm.enable_cap(KVM_CAP_EXIT_ON_EMULATION_FAILURE)
        with machine("vpaddd ymm0, ymm0, ymm0\n hlt", policy="verified", handlers=PACKS) as found:
            run_to_hlt(found)
            slots = len(found.vm.memory.slots)
        assert slots >= 5
