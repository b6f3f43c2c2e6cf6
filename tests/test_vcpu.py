"""The run loop: exits and their answers, events, verdicts, handlers that misbehave."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sandbox.boot import Machine, Mode
from sandbox.cpu import GP, Cpu, Fault
from sandbox.decode import Insn
from sandbox.errors import HandlerError, HandlerTimeoutError, SandboxError
from sandbox.exits import (
    EmulationFailure,
    Exit,
    GuestException,
    Hlt,
    Intr,
    Io,
    Mmio,
    Shutdown,
)
from sandbox.handler import Decline, Inject, Pack, Resume, handler
from sandbox.handler import Exit as Leave
from sandbox.registers import RAX, RBX, RCX, RDI, RDX, RSI, RSP
from tests.guest import (
    BASE,
    IST1,
    KERNEL_STACK,
    MODES,
    Recorder,
    add_idt,
    enter_user_mode,
    machine,
    policy,
    quads,
    run_to_hlt,
)

BSWAP = policy("bswap")
MMIO = 0x5000_0000


def map_mmio(found: Machine, pages: int = 1) -> None:
    assert found.space is not None
    found.space.map(MMIO, MMIO, pages << 12, write=True, execute=False)


class Board:
    """A device that notes what it is asked, and answers 0x11 * (offset + 1) for each byte."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.log.append(("r", offset, size))
        return int.from_bytes(
            bytes((0x11 * (offset + n + 1)) & 0xFF for n in range(size)), "little"
        )

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append(("w", offset, size, value))


# HLT and port IO


@pytest.mark.parametrize("mode", MODES)
def test_hlt_leaves_rip_after_it_and_the_run_goes_on_from_there(mode: Mode) -> None:
    with machine(b"\xf4\x90\xf4", mode) as found:
        assert [type(found.vcpu.run(10)) for _ in range(2)] == [Hlt, Hlt]
        assert found.vcpu.registers.rip == BASE + 3
        assert found.vcpu.page.run.exit_reason == Hlt.exit_reason


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("code", "size", "port"),
    [(b"\xe4\x60", 1, 0x60), (b"\xec", 1, 0x3F8), (b"\xed", 0, 0x3F8), (b"\x66\xed", -1, 0x3F8)],
)
def test_in_takes_the_answer_and_keeps_the_rest_of_rax(
    mode: Mode, code: bytes, size: int, port: int
) -> None:
    wide, narrow = (2, 4) if mode == "real" else (4, 2)
    size = {0: wide, -1: narrow}.get(size, size)
    with machine(code + b"\xf4", mode) as found:
        vcpu = found.vcpu
        start = vcpu.registers.gpr[RAX] = 0x1122_3344
        vcpu.registers.gpr[RDX] = 0x3F8
        left = vcpu.run(10)
        assert (left.is_in, left.port, left.size, left.count) == (True, port, size, 1)
        assert vcpu.registers.rip == BASE
        left.value = 0xA1B2_C3D4 & ((1 << 8 * size) - 1)
        assert isinstance(vcpu.run(10), Hlt)
        mask = (1 << 8 * size) - 1
        assert vcpu.registers.gpr[RAX] == (start & ~mask) | (0xA1B2_C3D4 & mask)


def test_an_answer_of_the_wrong_size_is_refused() -> None:
    with machine(b"\xec\xf4") as found:
        left = found.vcpu.run(10)
        left.data = b"\1\2"
        with pytest.raises(ValueError, match="answer has 2 bytes, the guest wants 1"):
            found.vcpu.run(10)


def test_an_in_that_is_skipped_by_the_caller_takes_no_answer() -> None:
    """RIP moved past IN: the instruction is given up, and its answer is not for the next IN."""
    with machine("in al, 1\n mov ebx, 7\n in al, 2\n hlt") as found:
        vcpu = found.vcpu
        left = vcpu.run(10)
        left.value = 0x55
        vcpu.registers.rip += 2
        left = vcpu.run(10)
        assert (left.port, vcpu.registers.gpr[RBX]) == (2, 7)
        left.value = 0x66
        run_to_hlt(found)
        assert vcpu.registers.gpr[RAX] & 0xFF == 0x66


def test_out_tells_port_and_data_and_has_gone_past_itself() -> None:
    with machine(
        "mov dx, 0x80\n mov eax, 0x11223344\n out dx, eax\n out 0x81, ax\n out 0x82, al\n hlt"
    ) as found:
        seen = []
        while isinstance(left := found.vcpu.run(10), Io):
            seen.append((left.port, left.size, left.data.hex(), found.vcpu.page.run.io.data_offset))
        assert seen == [(0x80, 4, "44332211", 4096), (0x81, 2, "4433", 4096), (0x82, 1, "44", 4096)]


def test_rep_outsb_and_rep_insw_hand_over_every_item() -> None:
    source = """
        mov esi, 0x8000
        mov ecx, 3
        mov dx, 0x10
        rep outsb
        mov edi, 0x8100
        mov ecx, 2
        rep insw
        hlt
    """
    with machine(source) as found:
        memory, vcpu = found.vm.memory, found.vcpu
        memory.load(0x8000, b"abc")
        sent = b""
        while isinstance(left := vcpu.run(10), Io):
            if left.is_in:
                assert (left.size, left.count) == (2, 2)
                left.data = b"\x11\x11\x22\x22"
            else:
                sent += left.data
        assert isinstance(left, Hlt)
        assert sent == b"abc"
        assert memory.read(0x8100, 5) == b"\x11\x11\x22\x22\0"
        gpr = vcpu.registers.gpr
        assert (gpr[RSI], gpr[RDI], gpr[RCX]) == (0x8003, 0x8104, 0)


def test_port_devices_answer_without_an_exit() -> None:
    board = Board()
    with machine("in al, 0x42\n out 0x41, ax\n in eax, 0x50\n hlt") as found:
        found.vm.add_ports(0x40, 4, board)
        left = found.vcpu.run(10)
        assert (left.port, left.size) == (0x50, 4)
        assert board.log == [("r", 2, 1), ("w", 1, 2, 0x33)]


# MMIO


def test_mmio_reads_are_answered_and_extended_as_the_instruction_says() -> None:
    source = f"""
        mov ebx, {MMIO:#x}
        mov eax, [rbx]
        movzx ecx, byte ptr [rbx + 5]
        movsx rdx, word ptr [rbx + 6]
        mov rsi, [rbx + 8]
        add edi, [rbx + 16]
        hlt
    """
    with machine(source) as found:
        map_mmio(found)
        vcpu, asked = found.vcpu, []
        vcpu.registers.gpr[RDI] = 1
        while isinstance(left := vcpu.run(10), Mmio):
            assert not left.is_write
            asked.append((left.phys_addr - MMIO, left.len))
            left.data = bytes([0x80 + left.phys_addr % 16] * left.len)
        assert asked == [(0, 4), (5, 1), (6, 2), (8, 8), (16, 4)]
        gpr = vcpu.registers.gpr
        assert (gpr[RAX], gpr[RCX]) == (0x8080_8080, 0x85)
        assert (gpr[RDX], gpr[RSI]) == (0xFFFF_FFFF_FFFF_8686, 0x8888_8888_8888_8888)
        assert gpr[RDI] == 0x8080_8081


def test_mmio_writes_carry_the_data_and_read_modify_write_is_two_exits() -> None:
    source = (
        f"mov ebx, {MMIO:#x}\n mov byte ptr [rbx + 1], 0x7f\n add word ptr [rbx + 2], 0x101\n hlt"
    )
    with machine(source) as found:
        map_mmio(found)
        seen = []
        while isinstance(left := found.vcpu.run(10), Mmio):
            if not left.is_write:
                left.value = 0x0102
            seen.append((left.is_write, left.phys_addr - MMIO, left.len, left.value))
        assert seen == [(True, 1, 1, 0x7F), (False, 2, 2, 0x0102), (True, 2, 2, 0x0203)]
        assert isinstance(left, Hlt)


def test_sixteen_bytes_come_in_two_exits_of_eight() -> None:
    source = f"mov ebx, {MMIO:#x}\n movups xmm1, [rbx]\n movups [rbx + 32], xmm1\n hlt"
    with machine(source, handlers=["avx2"]) as found:
        map_mmio(found)
        seen = []
        while isinstance(left := found.vcpu.run(10), Mmio):
            if not left.is_write:
                left.data = bytes(range(left.phys_addr % 32, left.phys_addr % 32 + 8))
            seen.append((left.is_write, left.phys_addr - MMIO, left.len, left.data))
        assert isinstance(left, Hlt), left
        low, high = bytes(range(8)), bytes(range(8, 16))
        assert seen == [
            (False, 0, 8, low), (False, 8, 8, high), (True, 32, 8, low), (True, 40, 8, high),
        ]  # fmt: skip
        assert found.vcpu.registers.vec.read(1)[:16] == low + high


def test_rep_movs_and_rep_stos_through_mmio() -> None:
    source = f"""
        mov esi, {MMIO:#x}
        mov edi, 0x8000
        mov ecx, 3
        .byte 0xf3, 0xa5                        # rep movsd
        mov edi, {MMIO:#x}
        mov ecx, 2
        mov eax, 0x5a
        rep stosb
        hlt
    """
    with machine(source) as found:
        map_mmio(found)
        seen = []
        while isinstance(left := found.vcpu.run(10), Mmio):
            if not left.is_write:
                left.value = left.phys_addr
            seen.append((left.is_write, left.phys_addr - MMIO, left.len, left.value & 0xFF))
        assert isinstance(left, Hlt), left
        assert seen == [
            (False, 0, 4, 0), (False, 4, 4, 4), (False, 8, 4, 8),
            (True, 0, 1, 0x5A), (True, 1, 1, 0x5A),
        ]  # fmt: skip
        data = b"".join((MMIO + 4 * n).to_bytes(4, "little") for n in range(3))
        assert found.vm.memory.read(0x8000, 12) == data
        assert found.vcpu.registers.gpr[RCX] == 0


def test_devices_answer_mmio_without_an_exit() -> None:
    board = Board()
    source = f"""
        mov ebx, {MMIO:#x}
        mov eax, [rbx + 4]
        mov [rbx + 8], ax
        or byte ptr [rbx], 0x80
        mov edi, 0x8000
        mov esi, {MMIO:#x}
        mov ecx, 2
        rep movsb
        hlt
    """
    with machine(source) as found:
        map_mmio(found)
        found.vm.add_mmio(MMIO, 0x100, board)
        run_to_hlt(found)
        assert board.log == [
            ("r", 4, 4), ("w", 8, 2, 0x6655), ("r", 0, 1), ("w", 0, 1, 0x91),
            ("r", 0, 1), ("r", 1, 1),
        ]  # fmt: skip
        assert found.vm.memory.read(0x8000, 2) == b"\x11\x22"


def test_an_access_half_in_ram_half_in_mmio_is_split() -> None:
    with machine("mov ebx, 0x5ffffffe\n mov eax, [rbx]\n mov [rbx], eax\n hlt") as found:
        assert found.space is not None
        found.vm.add_memory(0x5FFF_F000, 0x1000)
        found.space.map(0x5FFF_F000, 0x5FFF_F000, 0x2000, write=True, execute=False)
        found.vm.memory.load(0x5FFF_FFFE, b"\xaa\xbb")
        left = found.vcpu.run(10)
        assert (left.phys_addr, left.len, left.is_write) == (0x6000_0000, 2, False)
        left.value = 0xDDCC
        left = found.vcpu.run(10)
        assert (left.phys_addr, left.data, left.is_write) == (0x6000_0000, b"\xcc\xdd", True)
        run_to_hlt(found)
        assert found.vcpu.registers.gpr[RAX] == 0xDDCC_BBAA


def test_a_write_to_rom_is_an_exit_and_changes_nothing() -> None:
    with machine(
        "mov ebx, 0x50000000\n mov eax, [rbx]\n mov [rbx], ebx\n mov ecx, [rbx]\n hlt"
    ) as found:
        map_mmio(found)
        found.vm.add_memory(MMIO, 0x1000, readonly=True)
        found.vm.memory.load(MMIO, b"ROM!")
        left = found.vcpu.run(10)
        assert (left.phys_addr, left.value, left.is_write) == (MMIO, MMIO, True)
        run_to_hlt(found)
        gpr = found.vcpu.registers.gpr
        assert gpr[RAX] == gpr[RCX] == int.from_bytes(b"ROM!", "little")


def test_a_handler_reads_and_writes_mmio_like_a_native_instruction() -> None:
    """The handler runs again with the answer; what it wrote before the exit is not doubled."""
    calls = []

    @handler("bswap")
    def touch(cpu: Cpu, insn: Insn) -> None:
        calls.append(cpu.rip)
        cpu.gpr[RAX] += 1
        value = cpu.read_int(MMIO, 4) + cpu.read_int(MMIO + 4, 4)
        cpu.write_int(MMIO + 8, value, 4)

    with machine("bswap eax\n hlt", policy=BSWAP, handlers=[Pack.of("p", touch)]) as found:
        map_mmio(found)
        found.vcpu.registers.gpr[RAX] = 10
        seen = []
        while isinstance(left := found.vcpu.run(10), Mmio):
            if not left.is_write:
                left.value = left.phys_addr & 0xF | 0x30
            seen.append((left.is_write, left.phys_addr - MMIO, left.value))
        assert isinstance(left, Hlt)
        assert seen == [(False, 0, 0x30), (False, 4, 0x34), (True, 8, 0x64)]
        assert found.vcpu.registers.gpr[RAX] == 11


# Stopping


def test_timeout_and_going_on_afterwards() -> None:
    with machine("again: inc rax\n cmp rbx, 0\n je again\n hlt") as found:
        assert isinstance(found.vcpu.run(0.05), Intr)
        before = found.vcpu.registers.gpr[RAX]
        assert before > 0
        assert isinstance(found.vcpu.run(0.05), Intr)
        assert found.vcpu.registers.gpr[RAX] > before
        found.vcpu.registers.gpr[RBX] = 1
        run_to_hlt(found)


@pytest.mark.parametrize(
    "source", ["again: jmp again", "again: bswap eax\n jmp again", "rep: rep lodsb"]
)
def test_request_stop_from_another_thread(source: str) -> None:
    recorder = Recorder("bswap")
    with machine(source, policy=BSWAP, handlers=[recorder.pack]) as found:
        found.vcpu.registers.gpr[RCX] = 1 << 62
        found.vcpu.registers.gpr[RSI] = 0x8000
        timer = threading.Timer(0.05, found.vcpu.request_stop)
        timer.start()
        left = found.vcpu.run(20)
        timer.join()
        if source.startswith("rep"):
            assert isinstance(left, (Intr, GuestException))  # it may run out of mapped memory first
        else:
            assert isinstance(left, Intr)


def test_max_exits_counts_trapped_instructions() -> None:
    recorder = Recorder("bswap")
    source = "again: bswap eax\n inc ebx\n jmp again"
    with machine(source, policy=BSWAP, handlers=[recorder.pack]) as found:
        found.vcpu.max_exits = 5
        assert isinstance(found.vcpu.run(10), Intr)
        assert len(recorder.rips) == found.vcpu.stats.fallback_count == 5
        found.vcpu.max_exits = 7
        assert isinstance(found.vcpu.run(10), Intr)
        assert len(recorder.rips) == 7


def test_every_trap_is_told_to_the_tracer() -> None:
    recorder, seen = Recorder("bswap"), []
    with machine("bswap eax\n nop\n cpuid\n hlt", policy=BSWAP, handlers=[recorder.pack]) as found:
        found.vcpu.on_trap = seen.append
        run_to_hlt(found)
    assert [(r.rip, r.raw.hex(), r.reason) for r in seen] == [
        (0x1000, "0fc8", "emulation_failure"),
        (0x1003, "0fa2", "intercept"),
        (0x1005, "f4", "intercept"),
    ]
    assert seen[0].handler.endswith("Recorder._note")


# Events

EVENTS = """
    mov rax, rsp
    xor ecx, ecx
    FAULT
    hlt
    .align 256
    pop rbx
    mov rcx, cr2
    mov rdx, [rsp + 24]
    hlt
"""
"""The handler at BASE + 0x100 takes an error code off the stack."""


@pytest.mark.parametrize(
    ("fault", "vector", "code", "length"),
    [
        ("mov esi, 0x50000000\n mov al, [rsi]", 14, 4, 5),
        ("mov esi, 0x50000000\n mov [rsi], al", 14, 6, 5),
        ("hlt", 13, 0, 0),
        ("in al, 1", 13, 0, 0),
        ("mov rsi, 0x8000000000000000\n mov al, [rsi]", 13, 0, 10),
        ("int 0x21", 13, 0x21 * 8 + 2, 0),
        ("mov eax, 0x3000\n jmp rax", 14, 0x15, None),
    ],
)
def test_faults_in_user_mode_reach_the_kernel_by_the_tss(
    fault: str, vector: int, code: int, length: int | None
) -> None:
    with machine(EVENTS.replace("FAULT", fault)) as found:
        add_idt(found, {vector: BASE + 0x100})
        enter_user_mode(found)
        stack = found.vcpu.registers.gpr[RSP]
        run_to_hlt(found)
        gpr = found.vcpu.registers.gpr
        assert (gpr[RBX], found.vcpu.cpu.cpl) == (code, 0)
        rip, cs, _flags, rsp, ss = quads(found, KERNEL_STACK - 40, 5)
        assert (cs, rsp, ss) == (0x33, stack, 0x2B)
        assert rip == (0x3000 if length is None else BASE + 5 + length)
        if vector == 14:
            assert gpr[RCX] == (0x3000 if length is None else MMIO)


@pytest.mark.parametrize(
    ("source", "vector"),
    [
        ("xor ecx, ecx\n div ecx", 0),
        ("ud2", 6),
        ("int3", 3),
        ("int 0x80", 0x80),
        ("vaddps ymm0, ymm1, ymm2", 6),
    ],
)
def test_exceptions_without_an_error_code(source: str, vector: int) -> None:
    code = f"{source}\n hlt\n .align 256\n mov rbx, [rsp]\n hlt"
    with machine(code, handlers=[Recorder("bswap").pack]) as found:
        add_idt(found, {vector: BASE + 0x100, 13: BASE + 0x200})
        enter_user_mode(found)
        run_to_hlt(found)
        size = {"xor ecx, ecx\n div ecx": 2, "int3": 1, "int 0x80": 2}.get(source, 0)
        assert found.vcpu.registers.gpr[RBX] == BASE + size


def test_an_ist_entry_switches_the_stack_at_cpl_0_too() -> None:
    with machine(EVENTS.replace("FAULT", "ud2"), handlers=[Recorder("bswap").pack]) as found:
        add_idt(found, {6: BASE + 0x100}, ist={6: 1})
        run_to_hlt(found)
        assert quads(found, IST1 - 40, 2) == [BASE + 5, 0x08]


def test_a_fault_on_delivery_becomes_a_double_fault() -> None:
    with machine(EVENTS.replace("FAULT", "ud2"), handlers=[Recorder("bswap").pack]) as found:
        add_idt(found, {8: BASE + 0x100})
        run_to_hlt(found)
        assert found.vcpu.registers.gpr[RBX] == 0
        assert found.vcpu.registers.rip == BASE + 0x100 + 1 + 3 + 5 + 1


@pytest.mark.parametrize(
    "source", ["ud2", "int3", "mov esi, 0x50000000\n mov al, [rsi]", "int 0x80"]
)
def test_no_way_to_deliver_is_a_triple_fault(source: str) -> None:
    with machine(source, handlers=[Recorder("bswap").pack]) as found:
        add_idt(found, {77: BASE})
        assert isinstance(found.vcpu.run(10), Shutdown)
        assert found.vcpu.page.run.exit_reason == Shutdown.exit_reason


@pytest.mark.parametrize(
    ("source", "left"),
    [
        ("xor ecx, ecx\n div ecx", GuestException(0)),
        ("mov esi, 0x50000000\n mov al, [rsi]", GuestException(14)),
        ("mov esi, 0x50000000\n mov [rsi], al", GuestException(14, 2)),
        ("mov esi, 0x8000\n jmp rsi", GuestException(14, 0x11)),
    ],
)
def test_a_guest_without_an_idt_leaves_its_exceptions_to_the_caller(
    source: str, left: Exit
) -> None:
    with machine(source) as found:
        assert found.vcpu.run(10) == left


def test_real_mode_exceptions_go_through_the_ivt() -> None:
    source = "xor cx, cx\n div cx\n hlt\n .align 64\n pop bx\n add bx, 2\n push bx\n iret"
    with machine(source, "real") as found:
        found.vm.memory.load(0, (BASE + 64).to_bytes(2, "little") + b"\0\0")
        run_to_hlt(found)
        assert found.vcpu.registers.gpr[RBX] & 0xFFFF == BASE + 4


# Verdicts


def verdict_machine(verdict: Any, *more: Pack, unhandled: str = "exit") -> Any:
    @handler("bswap")
    def give(cpu: Cpu, insn: Insn) -> Any:
        if isinstance(verdict, BaseException):
            raise verdict
        return verdict

    chosen = policy("bswap").with_unhandled(unhandled)  # type: ignore[arg-type]
    code = "bswap eax\n mov ebx, 1\n hlt\n .align 256\n mov ecx, 2\n hlt"
    return machine(code, policy=chosen, handlers=[Pack.of("first", give), *more])


def test_resume_goes_on_after_the_instruction_or_where_it_says() -> None:
    for verdict, expected in ((None, (1, 0)), (Resume(), (1, 0)), (Resume(BASE + 0x100), (0, 2))):
        with verdict_machine(verdict) as found:
            run_to_hlt(found)
            gpr = found.vcpu.registers.gpr
            assert (gpr[RBX], gpr[RCX]) == expected


@pytest.mark.parametrize("verdict", [Inject(GP, 0), Fault(GP, 0)])
def test_inject_and_fault_deliver_at_the_instruction(verdict: Any) -> None:
    with verdict_machine(verdict) as found:
        add_idt(found, {GP: BASE + 0x100})
        run_to_hlt(found)
        gpr = found.vcpu.registers.gpr
        assert gpr[RCX] == 2
        assert quads(found, gpr[RSP], 2) == [0, BASE]


def test_decline_asks_the_next_handler_in_the_order_of_the_packs() -> None:
    recorder = Recorder("bswap")
    with verdict_machine(Decline(), recorder.pack) as found:
        run_to_hlt(found)
        assert recorder.rips == [BASE]
    with verdict_machine(None, recorder.pack) as found:
        run_to_hlt(found)
    assert recorder.rips == [BASE], "the first one took it"


@pytest.mark.parametrize(
    ("unhandled", "left"), [("exit", EmulationFailure), ("inject", EmulationFailure), ("skip", Hlt)]
)
def test_what_happens_when_all_decline_is_the_policys_word(unhandled: str, left: type) -> None:
    with verdict_machine(Decline(), unhandled=unhandled) as found:
        assert isinstance(found.vcpu.run(10), left)


def test_unhandled_inject_gives_ud_to_a_guest_with_an_idt() -> None:
    with verdict_machine(Decline(), unhandled="inject") as found:
        add_idt(found, {6: BASE + 0x100})
        run_to_hlt(found)
        assert found.vcpu.registers.gpr[RCX] == 2


def test_exit_hands_anything_to_the_caller() -> None:
    with verdict_machine(Leave(("my", 1))) as found:
        assert found.vcpu.run(10) == ("my", 1)
        assert found.vcpu.registers.rip == BASE
    with verdict_machine(Leave()) as found:
        left = found.vcpu.run(10)
        assert isinstance(left, EmulationFailure)
        assert left.bytes is not None and left.bytes.startswith(b"\x0f\xc8")


def test_a_byte_pattern_makes_an_instruction_that_does_not_exist() -> None:
    """0f 3f imm16: rax += imm16; it stays trapped next to allowed code, and its length is right."""

    @handler(pattern="0f 3f ?? ??")
    def add_immediate(cpu: Cpu, insn: Insn) -> None:
        cpu.gpr[RAX] += int.from_bytes(insn.raw[2:4], "little")

    code = b"\x31\xc0" + b"\x0f\x3f\x34\x12" * 2 + b"\xff\xc0\xf4"
    with machine(code, handlers=[Pack.of("mine", add_immediate)]) as found:
        run_to_hlt(found)
        assert found.vcpu.registers.gpr[RAX] == 0x2469


# Handlers that misbehave


def test_a_handler_that_raises_is_named_with_the_instruction_and_undone() -> None:
    @handler("bswap")
    def broken(cpu: Cpu, insn: Insn) -> None:
        cpu.gpr[RAX] = 1
        cpu.vec.write(0, b"\xff" * 64)
        cpu.opmask[1] = 7
        cpu.rflags = 0x8D7
        cpu.mxcsr = 0x1FBF
        cpu.write(0x8000, b"spoilt")
        cpu.write(0x8FFE, b"across")
        cpu.registers.rip = 0x4444
        raise KeyError("a bug")

    with machine("bswap eax\n hlt", policy=BSWAP, handlers=[Pack.of("p", broken)]) as found:
        registers = found.vcpu.registers
        before = bytes(registers.images[0]), bytes(registers.images[1]), registers.rflags
        with pytest.raises(
            HandlerError, match=r"broken failed on 'bswap eax' \(0f c8\): KeyError: 'a bug'"
        ):
            found.vcpu.run(10)
        assert (bytes(registers.images[0]), bytes(registers.images[1]), registers.rflags) == before
        assert found.vm.memory.read(0x8000, 0x2000) == bytes(0x2000)
        assert registers.rip == BASE


def test_a_handler_that_faults_half_way_leaves_no_partial_write() -> None:
    @handler("bswap")
    def half(cpu: Cpu, insn: Insn) -> None:
        cpu.gpr[RBX] = 99
        cpu.write(0x8000, b"first")
        cpu.write(MMIO, b"second")

    code = "bswap eax\n hlt\n .align 256\n hlt"
    with machine(code, policy=BSWAP, handlers=[Pack.of("p", half)]) as found:
        add_idt(found, {14: BASE + 0x100})
        run_to_hlt(found)
        gpr = found.vcpu.registers.gpr
        assert gpr[RBX] == 0
        assert found.vm.memory.read(0x8000, 5) == bytes(5)
        assert quads(found, gpr[RSP], 2) == [2, BASE]
        assert found.vcpu.registers.bank.read("cr2") == MMIO


def test_a_write_across_pages_whose_second_page_is_absent_writes_nothing() -> None:
    @handler("bswap")
    def across(cpu: Cpu, insn: Insn) -> None:
        cpu.write(0x3FF_FFFC, b"12345678")

    with machine("bswap eax\n hlt", policy=BSWAP, handlers=[Pack.of("p", across)]) as found:
        assert found.vcpu.run(10) == GuestException(14, 2)
        assert found.vcpu.registers.bank.read("cr2") == 0x400_0000
        assert found.vm.memory.read(0x3FF_FFFC, 4) == bytes(4)


def test_a_handler_that_fails_to_bind_is_named_too() -> None:
    class Odd(type(handler("bswap")(lambda cpu, insn: None))):  # type: ignore[misc]
        def bind(self, cpu: Cpu, insn: Insn) -> Any:
            raise ZeroDivisionError("while binding")

    odd = Odd(lambda cpu, insn: None, ("bswap",))
    with (
        machine("bswap eax", policy=BSWAP, handlers=[Pack.of("p", odd)]) as found,
        pytest.raises(
            HandlerError, match=r"failed on 'bswap eax'.*ZeroDivisionError: while binding"
        ),
    ):
        found.vcpu.run(10)


@pytest.mark.parametrize("swallows", [False, True])
def test_a_handler_that_loops_is_interrupted_at_the_timeout(swallows: bool) -> None:
    @handler("bswap")
    def endless(cpu: Cpu, insn: Insn) -> None:
        cpu.gpr[RBX] = 1
        while True:
            try:
                time.sleep(0)
            except Exception:
                if not swallows:
                    raise

    with machine("bswap eax", policy=BSWAP, handlers=[Pack.of("p", endless)]) as found:
        with pytest.raises(HandlerTimeoutError, match="endless was still running on 'bswap eax'"):
            found.vcpu.run(0.05)
        assert (found.vcpu.registers.gpr[RBX], found.vcpu.registers.rip) == (0, BASE)


def test_the_machine_is_usable_after_a_broken_handler() -> None:
    fail = [True]

    @handler("bswap")
    def sometimes(cpu: Cpu, insn: Insn) -> None:
        if fail[0]:
            raise RuntimeError("not yet")
        cpu.gpr[RBX] = 5

    with machine("bswap eax\n hlt", policy=BSWAP, handlers=[Pack.of("p", sometimes)]) as found:
        with pytest.raises(HandlerError):
            found.vcpu.run(10)
        fail[0] = False
        run_to_hlt(found)
        assert found.vcpu.registers.gpr[RBX] == 5


# Packs


def test_a_pack_from_a_file_and_from_an_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "from sandbox.handler import handler\n"
        "@handler('bswap')\n"
        "def f(cpu, insn):\n    cpu.gpr[3] = {}\n"
    )
    (tmp_path / "mine.py").write_text(text.format(3))
    (tmp_path / "my_plugin.py").write_text(text.format(4))
    info = tmp_path / "my_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[unicorn_fallback.handlers]\nplugged = my_plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for source, value in (
        (tmp_path / "mine.py", 3),
        (str(tmp_path / "mine.py"), 3),
        ("plugged", 4),
    ):
        with machine("bswap eax\n hlt", policy=BSWAP, handlers=[source]) as found:
            run_to_hlt(found)
            assert found.vcpu.registers.gpr[RBX] == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "defines no handler"),
        ("import nowhere_at_all\n", "ModuleNotFoundError"),
        ("def f(:\n", "SyntaxError"),
    ],
)
def test_a_file_that_is_no_pack_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(text)
    with (
        pytest.raises(SandboxError, match=rf"^{path}: .*{message}"),
        machine("hlt", handlers=[path]),
    ):
        pass


def test_an_unknown_pack_is_named_with_the_nearest() -> None:
    with (
        pytest.raises(SandboxError, match="'avx22'; did you mean 'avx2'"),
        machine("hlt", handlers=["avx22"]),
    ):
        pass


def test_a_late_timeout_never_strikes_inside_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy host a run may be far behind its deadline without any handler to blame: what is
    meant for handlers must not be raised in the engine's callback, where it would be lost."""
    monkeypatch.setattr("sandbox.watchdog.GRACE_SECONDS", -1.0)
    blocks = "".join(f"jmp next{n}\n next{n}: add eax, 1\n" for n in range(300))
    with machine(f"again:\n{blocks} jmp again") as found:
        for _ in range(5):
            found.vm.policy = found.vm.policy  # every block is translated and checked anew
            assert isinstance(found.vcpu.run(0.03), Intr)


def test_a_closed_machine_says_so() -> None:
    with machine("hlt") as found:
        pass
    found.vm.close()  # once more: nothing happens
    with pytest.raises(SandboxError, match="this Vm is closed"):
        found.vcpu.run(10)


def test_a_machine_is_neither_closed_nor_run_again_while_it_runs() -> None:
    errors: list[str] = []

    @handler("bswap")
    def meddle(cpu: Cpu, insn: Insn) -> None:
        for attempt in (found.vm.close, found.vcpu.run):
            with pytest.raises(SandboxError) as error:
                attempt()
            errors.append(str(error.value))

    with machine("bswap eax\n hlt", policy=BSWAP, handlers=[Pack.of("p", meddle)]) as found:
        run_to_hlt(found)
    assert errors == [
        "the vCPU is running: stop it before its Vm is closed",
        "this vCPU is running already, here or in another thread",
    ]
