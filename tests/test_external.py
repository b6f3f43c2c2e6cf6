"""External interrupts on both engines: delivered when the manual says, awaited by HLT."""

from __future__ import annotations

import io
import itertools
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from guests.assemble import assemble
from guests.multiboot import load_multiboot
from sandbox.abi import KVM_CAP_EXIT_ON_EMULATION_FAILURE as CAP
from sandbox.boot import Machine
from sandbox.exits import Hlt, Intr, Shutdown
from sandbox.multiboot import boot_multiboot
from sandbox.platform.clock import ManualClock
from sandbox.registers import RAX, RBX, RCX
from sandbox.vm import Vm
from tests.kvm_guest import KVM
from tests.multiboot_image import BASE, elf

ENGINES = ["unicorn", pytest.param("kvm", marks=KVM)]
POLICIES = ["verified", "nothing"]
IDT = 0x20_0000

PROLOGUE = """
    lgdt [gdt_pointer]
    lidt [idt_pointer]
    mov esp, 0x80000
    mov edi, 0xfee00000
    xor ebx, ebx
    xor ecx, ecx
"""
HANDLER = """
    cli
    hlt
    .align 16
handler:
    inc ebx
    mov ecx, [esp]
    mov dword ptr [edi + 0xb0], 0
    iretd
    .align 16
late:
    inc edx
    mov dword ptr [edi + 0xb0], 0
    iretd
    .align 8
gdt: .quad 0, 0, 0x00cf93000000ffff, 0x00cf9b000000ffff
gdt_pointer: .word 31
    .long gdt
idt_pointer: .word 0x7ff
    .long 0x200000
"""
SEND = "mov dword ptr [edi + 0x300], 0x40051\n"
"""An interrupt of vector 51h to the processor itself."""


@contextmanager
def guest(
    body: str, engine: str = "unicorn", policy: str = "verified", clock: ManualClock | None = None
) -> Iterator[Machine]:
    """A guest in 32-bit mode whose handler counts in EBX and keeps the return address in ECX."""
    code = assemble(PROLOGUE + body + HANDLER, BASE, 32)
    with Vm(policy, ["integer", "system"], engine=engine) as vm:
        vm.enable_cap(CAP)
        found = boot_multiboot(vm, load_multiboot(elf(code)), io.BytesIO(), clock=clock)
        for vector, mark in ((0x51, b"\x43\x8b\x0c\x24"), (0x61, b"\x42\xc7\x87")):
            target = BASE + code.index(mark)
            gate = struct.pack("<HHHH", target & 0xFFFF, 0x18, 0x8E00, target >> 16)
            vm.memory.load(IDT + 8 * vector, gate)
            if vector == 0x51:
                for line in range(16):
                    vm.memory.load(IDT + 8 * (8 + line), gate)
        yield found


def stop_at_every_entry(found: Machine) -> None:
    """Half of the entries into the fast path end before an instruction has run."""
    engine: Any = found.vm.engine
    enter, count = engine.enter, itertools.count()

    def stopped() -> Any:
        if next(count) % 2 == 0:
            engine.stop()
        return enter()

    engine.enter = stopped


def run(found: Machine, timeout: float = 20) -> tuple[int, int]:
    """Run to HLT with interrupts off: how many came, and where the last returned to."""
    left: Any = found.vcpu.run(timeout)
    assert isinstance(left, Hlt), left
    gpr = found.vcpu.registers.gpr
    return gpr[RBX], gpr[RCX]


@pytest.mark.parametrize("stopped", [False, True], ids=["", "stopped at once"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("body", "count", "at"),
    [
        (SEND + "nop \n nop", 0, ""),
        (SEND + "sti \n cli", 0, ""),
        (SEND + "sti \n nop \n here: cli", 1, "here"),
        (SEND + "sti \n mov eax, [esp - 64] \n here: cli", 1, "here"),
        (SEND + "pushfd \n or dword ptr [esp], 0x200 \n popfd \n here: cli", 1, "here"),
        ("sti \n nop \n nop \n" + SEND + "here: cli", 1, "here"),
        ("sti \n sti \n" + SEND + "here: cli", 1, "here"),
        ("mov eax, ss \n sti \n nop \n" + SEND + "here: mov ss, eax \n cli", 1, "here"),
        (SEND + "lea eax, [here] \n push 0x202 \n push 0x18 \n push eax \n iretd \n here: cli",
         1, "here"),
        (SEND + "sti \n hlt \n here: cli", 1, "here"),
        (SEND + "mov dword ptr [edi + 0x80], 0x50 \n sti \n nop \n nop \n cli", 0, ""),
        (SEND + "mov eax, 5 \n mov dword ptr [edi + 0x80], 0x60 \n sti \n nop \n "
         "mov dword ptr [edi + 0x80], 0 \n here: cli", 1, "here"),
    ],
    ids=[
        "IF clear", "the instruction behind STI", "one later", "a load later", "POPF",
        "IF set", "STI with IF set", "before a load of SS", "IRET", "HLT", "task priority",
        "task priority lowered",
    ],
)  # fmt: skip
def test_an_interrupt_comes_between_the_right_instructions(
    body: str, count: int, at: str, policy: str, stopped: bool
) -> None:
    if at:
        body += "\n lea eax, [here]"
    with guest(body, policy=policy) as found:
        if stopped:
            stop_at_every_entry(found)
        seen, back = run(found)
        assert seen == count
        if at:
            assert back == found.vcpu.registers.gpr[RAX]


@pytest.mark.parametrize("engine", ENGINES)
def test_interrupts_are_taken_by_their_priority(engine: str) -> None:
    body = (
        SEND
        + """
    mov dword ptr [edi + 0x300], 0x40061
    xor edx, edx
    sti
    hlt
    mov eax, [edi + 0x20]
    cli
    """
    )
    with guest(body, engine) as found:
        assert run(found)[0] == 1
        assert found.vcpu.registers.gpr[2] == 1


TIMER = """
    mov dword ptr [edi + 0x3e0], 0xb
    mov dword ptr [edi + 0x320], {mode}
    mov dword ptr [edi + 0x380], {count}
    sti
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_hlt_waits_for_a_timer(engine: str) -> None:
    with guest(TIMER.format(mode=0x51, count=30_000_000) + "hlt \n cli", engine) as found:
        start = time.monotonic()
        assert run(found)[0] == 1
        assert time.monotonic() - start >= 0.03


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_timer_interrupts_a_loop(engine: str, policy: str) -> None:
    body = TIMER.format(mode=0x20051, count=20_000_000) + "again: cmp ebx, 3 \n jb again \n cli"
    with guest(body, engine, policy) as found:
        assert run(found)[0] >= 3


PIT = """
    mov al, 0xfe
    out 0x21, al
    mov al, 0x34
    out 0x43, al
    mov al, 0
    out 0x40, al
    out 0x40, al
    sti
again:
    mov al, 0x20
    out 0x20, al
    cmp ebx, 3
    jb again
    cli
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_the_pit_interrupts_by_a_vector_of_exceptions_without_an_error_code(engine: str) -> None:
    """Line 0 has vector 8 as the BIOS leaves it; #DF would push a code, and the handler's IRET
    would take that for EIP."""
    with guest(PIT, engine) as found:
        assert run(found)[0] >= 3


SERIAL = """
    mov al, 0xef
    out 0x21, al
    mov edx, 0x3fc
    mov al, 8
    out dx, al
    mov edx, 0x3f9
    mov al, 2
    out dx, al
    sti
    hlt
here: cli
    mov edx, 0x3fa
    in al, dx
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_the_serial_port_interrupts_when_it_has_room(engine: str) -> None:
    with guest(SERIAL, engine) as found:
        assert run(found)[0] == 1
        assert found.vcpu.registers.gpr[RAX] & 0xFF == 2, "transmitter empty"


def test_virtual_time_passes_while_the_guest_is_halted() -> None:
    clock = ManualClock()
    with guest(TIMER.format(mode=0x51, count=3_000_000_000) + "hlt \n cli", clock=clock) as found:
        start = time.monotonic()
        assert run(found)[0] == 1
        assert clock.now() >= 3_000_000_000
        assert time.monotonic() - start < 3


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "body",
    ["sti \n hlt", TIMER.format(mode=0x10051, count=1000) + "hlt", "hlt"],
    ids=["no timer", "masked timer", "IF clear"],
)
def test_hlt_without_anything_to_wait_for_is_the_end(engine: str, body: str) -> None:
    with guest(body, engine) as found:
        assert run(found)[0] == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_halted_guest_can_be_stopped_and_goes_on_waiting(engine: str) -> None:
    body = TIMER.format(mode=0x51, count=700_000_000) + "hlt \n cli"
    with guest(body, engine) as found:
        assert isinstance(found.vcpu.run(0.1), Intr)
        assert found.vcpu.registers.gpr[RBX] == 0
        threading.Timer(0.1, found.vcpu.request_stop).start()
        assert isinstance(found.vcpu.run(10), Intr)
        assert run(found)[0] == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_an_interrupt_without_a_gate_ends_in_shutdown(engine: str) -> None:
    with guest(
        "lidt [zero] \n sti \n nop \n" + SEND + "nop \n jmp $ \n zero: .long 0, 0", engine
    ) as found:
        assert isinstance(found.vcpu.run(10), Shutdown)


def test_the_alarm_thread_ends_with_the_machine() -> None:
    with guest(TIMER.format(mode=0x51, count=10_000_000) + "hlt \n cli") as found:
        run(found)
        assert [t.name for t in threading.enumerate()].count("alarm") >= 0
    assert "alarm" not in [t.name for t in threading.enumerate()]
