"""The engine ``kvm`` with the kernel's interrupt controllers: timers and lines reach the guest's
handlers, HLT waits in the kernel, and whoever waits for the guest is not kept waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from guests.assemble import assemble
from sandbox.boot import Machine, Mode, boot_flat
from sandbox.engine.kvm_irqchip import LINES
from sandbox.errors import EngineError, SandboxError
from sandbox.exits import Intr, Io
from sandbox.process import boot_process
from sandbox.vm import Vm
from tests.guest import BASE, BITNESS, add_idt
from tests.kvm_guest import KVM
from tests.test_kvm_user import PREBUILT

LAPIC = 0xFEE0_0000
REMAP = """
    mov al, 0x11
    out 0x20, al
    out 0xa0, al
    mov al, 0x20
    out 0x21, al
    mov al, 0x28
    out 0xa1, al
    mov al, 4
    out 0x21, al
    mov al, 2
    out 0xa1, al
    mov al, 1
    out 0x21, al
    out 0xa1, al
    mov al, 0xff
    out 0xa1, al
"""
"""The 8259s, with vectors from 20h on; all lines of the second one masked."""


@contextmanager
def guest(code: str, mode: Mode, handlers: dict[int, str]) -> Iterator[Machine]:
    """A guest with the kernel's controllers; ``handlers`` are source by vector."""
    image = assemble(code, BASE, BITNESS[mode])
    targets = {}
    for vector, source in handlers.items():
        targets[vector] = BASE + len(image)
        image += assemble(source, BASE + len(image), BITNESS[mode])
    with Vm(engine="kvm", irqchip="kernel") as vm:
        vm.enable_cap(204)
        found = boot_flat(vm, image, BASE, mode)
        if mode == "long":
            add_idt(found, targets)
            assert found.space is not None
            found.space.map(LAPIC, LAPIC, 0x1000, write=True, execute=False)
        else:
            for vector, target in targets.items():
                vm.memory.load(4 * vector, target.to_bytes(4, "little"))
        yield found


COUNT = "inc bl\n mov al, 0x20\n out 0x20, al\n"


@KVM
def test_the_timer_wakes_a_guest_that_halts() -> None:
    """The i8254 through the 8259, in real mode: three ticks, one HLT each."""
    code = f"""
        {REMAP}
        mov al, 0xfe
        out 0x21, al
        mov al, 0x34
        out 0x43, al
        mov ax, 2000
        out 0x40, al
        mov al, ah
        out 0x40, al
        xor bl, bl
        sti
    wait:
        hlt
        cmp bl, 3
        jb wait
        mov al, bl
        out 0x80, al
    """
    with guest(code, "real", {0x20: f"{COUNT} iret"}) as found:
        left = found.vcpu.run(10)
        assert isinstance(left, Io) and (left.port, left.data) == (0x80, b"\3")


@KVM
def test_the_local_apics_timer_wakes_a_guest_that_halts() -> None:
    code = f"""
        mov al, 0xff
        out 0x21, al
        out 0xa1, al
        mov edi, {LAPIC}
        mov dword ptr [rdi + 0xf0], 0x1ff
        mov dword ptr [rdi + 0x3e0], 0
        mov dword ptr [rdi + 0x320], 0x40
        mov dword ptr [rdi + 0x380], 100000
        xor ebx, ebx
        sti
    wait:
        hlt
        test bl, bl
        jz wait
        mov al, bl
        out 0x80, al
    """
    handler = f"inc bl\n mov edi, {LAPIC}\n mov dword ptr [rdi + 0xb0], 0\n iretq"
    with guest(code, "long", {0x40: handler}) as found:
        left = found.vcpu.run(10)
        assert isinstance(left, Io) and left.data == b"\1"


@KVM
def test_cpuid_shows_the_local_apic_there_and_only_there() -> None:
    code = "mov eax, 1\n cpuid\n mov eax, edx\n out 0x80, eax"
    with guest(code, "long", {}) as found:
        left = found.vcpu.run(10)
        assert isinstance(left, Io) and left.value >> 9 & 1
    with Vm(
        engine="kvm"
    ) as vm:  # some kernels show the guest what they have, whatever they are told
        vm.create_vcpu()
        assert not vm.cpuid_model().leaves()[1, 0][3] >> 9 & 1


HALTED = f"""
    {REMAP}
    mov al, 0xef
    out 0x21, al
    xor bl, bl
    out 0x80, al
    sti
again:
    hlt
"""
"""Line 4 is open. An OUT says that the guest is about to halt."""


@KVM
def test_a_device_of_ours_raises_a_line_while_the_guest_halts() -> None:
    code = f"{HALTED} mov al, bl\n out 0x80, al\n jmp again"
    with guest(code, "real", {0x24: f"{COUNT} iret"}) as found:
        vm, vcpu = found.vm, found.vcpu
        assert isinstance(vcpu.run(10), Io)  # it is about to halt
        for ticks in (b"\1", b"\2"):
            timer = threading.Timer(0.05, vm.set_irq_line, (4, 1))
            timer.start()
            left = vcpu.run(10)
            timer.join()
            vm.set_irq_line(4, 0)
            assert isinstance(left, Io) and left.data == ticks


@KVM
def test_a_guest_that_halts_for_good_can_be_left() -> None:
    with guest(f"{HALTED} jmp again", "real", {}) as found:
        vcpu = found.vcpu
        assert isinstance(vcpu.run(10), Io)
        for _ in range(2):
            start = time.monotonic()
            assert isinstance(vcpu.run(0.1), Intr)
            assert time.monotonic() - start >= 0.1
        timer = threading.Timer(0.1, vcpu.request_stop)
        timer.start()
        assert isinstance(vcpu.run(30), Intr)
        timer.join()


@KVM
def test_what_does_not_go_with_it_is_refused_in_one_line() -> None:
    with Vm(handlers=["linux"], engine="kvm", irqchip="kernel") as vm:
        vm.enable_cap(204)
        with pytest.raises(EngineError, match="without a kernel leaves by HLT"):
            boot_process(vm, PREBUILT / "demo-x86-64-v3-O3-musl-gcc")
        with pytest.raises(SandboxError, match="has its interrupt controllers already"):
            vm.attach_interrupts(None)  # type: ignore[arg-type]
        for line in (-1, LINES):
            with pytest.raises(EngineError, match=f"interrupt line {line}: there are 0 to 23"):
                vm.set_irq_line(line, 1)


@pytest.mark.parametrize(("engine", "irqchip"), [("unicorn", "kernel"), ("kvm", "split")])
def test_other_controllers_do_not_exist(engine: str, irqchip: str) -> None:
    with pytest.raises(EngineError, match=f"irqchip '{irqchip}' under the engine {engine}: there"):
        Vm(engine=engine, irqchip=irqchip)


def test_lines_need_the_kernels_controllers() -> None:
    with Vm() as vm, pytest.raises(SandboxError, match="irqchip='kernel'"):
        vm.set_irq_line(1, 1)
