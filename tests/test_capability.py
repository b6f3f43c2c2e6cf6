"""KVM_CAP_EXIT_ON_EMULATION_FAILURE: the kernel's table of what happens, and its bad arguments.

Sources: ``handle_emulation_failure`` and ``kvm_vm_ioctl_enable_cap`` in arch/x86/kvm/x86.c, and the
kernel's own test exit_on_emulation_failure_test.c.
"""

from __future__ import annotations

import errno
import struct

import pytest

from sandbox import abi
from sandbox.abi import KVM_CAP_EXIT_ON_EMULATION_FAILURE as CAP
from sandbox.boot import Mode
from sandbox.errors import KvmError, SandboxError
from sandbox.exits import EmulationFailure, GuestException, Hlt, Io, Mmio
from sandbox.registers import RAX
from sandbox.vm import Vm
from tests.guest import (
    BASE,
    KERNEL_STACK,
    MODES,
    Recorder,
    add_idt,
    enter_user_mode,
    machine,
    quads,
)

UNHANDLED = bytes.fromhex("c5f458c2")
"""vaddps ymm0, ymm1, ymm2: nobody takes it"""
GUEST = UNHANDLED + b"\xf4"
HANDLER = 0x1100
WITH_HANDLER = GUEST.ljust(0x100, b"\xcc") + b"\xf4"
UD = 6


def test_the_capability_is_known_and_off_at_first() -> None:
    with Vm() as vm:
        assert vm.check_extension(CAP) == 1
        assert vm.check_extension(9999) == 0
        assert not vm.settings.exit_on_emulation_failure


@pytest.mark.parametrize(
    ("cap", "arg", "flags"),
    [(CAP, 2, 0), (CAP, 0x100, 0), (CAP, -1, 0), (CAP, 1 << 63, 0), (CAP, 1, 1), (CAP, 0, 1 << 31),
     (abi.KVM_CAP_USER_MEMORY, 1, 0), (9999, 1, 0)],
)  # fmt: skip
def test_bad_arguments_are_refused_with_einval_and_change_nothing(
    cap: int, arg: int, flags: int
) -> None:
    with Vm() as vm:
        for before in (0, 1):
            vm.enable_cap(CAP, before)
            with pytest.raises(KvmError) as error:
                vm.enable_cap(cap, arg, flags)
            assert error.value.errno == errno.EINVAL
            assert vm.settings.exit_on_emulation_failure == bool(before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cap", [True, False])
def test_at_cpl_0_it_exits_with_the_bytes(mode: Mode, cap: bool) -> None:
    with machine(GUEST, mode, cap=cap) as found:
        left = found.vcpu.run(10)
        assert isinstance(left, EmulationFailure)
        assert left.bytes == GUEST.ljust(15, b"\0")
        assert found.vcpu.registers.rip == BASE


def test_cap_on_re_running_the_same_instruction_exits_again() -> None:
    with machine(WITH_HANDLER) as found:
        add_idt(found, {UD: HANDLER})
        for _ in range(3):
            assert isinstance(found.vcpu.run(10), EmulationFailure)
            assert found.vcpu.registers.rip == BASE


def test_cap_off_at_cpl_0_the_guest_gets_ud_when_it_is_entered_again() -> None:
    with machine(WITH_HANDLER, cap=False) as found:
        add_idt(found, {UD: HANDLER})
        assert isinstance(found.vcpu.run(10), EmulationFailure)
        assert isinstance(found.vcpu.run(10), Hlt)
        assert found.vcpu.registers.rip == HANDLER + 1


def test_cap_off_at_cpl_0_a_new_rip_drops_the_pending_ud() -> None:
    with machine(WITH_HANDLER, cap=False) as found:
        add_idt(found, {UD: HANDLER})
        assert isinstance(found.vcpu.run(10), EmulationFailure)
        found.vcpu.registers.rip += len(UNHANDLED)
        assert isinstance(found.vcpu.run(10), Hlt)
        assert found.vcpu.registers.rip == BASE + len(GUEST)


def test_cap_off_at_cpl_3_the_guest_gets_ud_without_an_exit() -> None:
    with machine(WITH_HANDLER, cap=False) as found:
        add_idt(found, {UD: HANDLER})
        enter_user_mode(found)
        assert isinstance(found.vcpu.run(10), Hlt)
        assert found.vcpu.registers.rip == HANDLER + 1
        assert quads(found, KERNEL_STACK - 40, 2) == [BASE, 0x33]


def test_cap_on_at_cpl_3_it_exits_and_no_ud_is_queued() -> None:
    with machine(WITH_HANDLER) as found:
        add_idt(found, {UD: HANDLER})
        enter_user_mode(found)
        for _ in range(2):
            left = found.vcpu.run(10)
            assert isinstance(left, EmulationFailure)
            assert left.bytes == WITH_HANDLER[:15]
            assert (found.vcpu.registers.rip, found.vcpu.cpu.cpl) == (BASE, 3)


def test_it_toggles_both_ways_while_the_vcpu_exists() -> None:
    with machine(WITH_HANDLER, cap=False) as found:
        add_idt(found, {UD: HANDLER})
        enter_user_mode(found)
        found.vm.enable_cap(CAP, 1)
        assert isinstance(found.vcpu.run(10), EmulationFailure)
        found.vm.enable_cap(CAP, 0)
        assert isinstance(found.vcpu.run(10), Hlt)


def test_without_an_idt_the_ud_is_an_exit_of_its_own() -> None:
    with machine(GUEST, cap=False) as found:
        enter_user_mode(found)
        assert found.vcpu.run(10) == GuestException(UD)


def test_handlers_need_the_capability_and_say_so() -> None:
    with (
        machine(GUEST, handlers=[Recorder("vaddps").pack], cap=False) as found,
        pytest.raises(SandboxError, match="KVM_CAP_EXIT_ON_EMULATION_FAILURE is off: call"),
    ):
        found.vcpu.run(10)


# What stands in kvm_run


def union(found_page: memoryview, size: int) -> bytes:
    return bytes(found_page[abi.UNION_OFFSET : abi.UNION_OFFSET + size])


def with_bytes(code: bytes) -> bytes:
    head = struct.pack("<IIQB", 1, 8, 1, len(code))
    return head + code.ljust(15, b"\x90") + bytes(40)


@pytest.mark.parametrize(
    ("before_end", "size"), [(1, 15), (2, 2), (3, 3), (4, 4), (5, 5), (14, 14), (15, 15), (16, 15)]
)
def test_kvm_run_holds_what_was_fetched_up_to_the_page_end(before_end: int, size: int) -> None:
    """Sizes as measured on a real KVM for this instruction: one byte before the page end, decoding
    itself needs the second, so that the next page is fetched too."""
    at = 0x2000 - before_end
    code = b"\x90" * (at - BASE) + UNHANDLED + bytes(range(0x40, 0x60))
    with machine(code) as found:
        found.vcpu.registers.rip = at
        left = found.vcpu.run(10)
        page = found.vcpu.page
        start = at - BASE
        assert page.run.exit_reason == 17
        assert union(page.bytes, 72) == with_bytes(code[start : start + size])
        assert (left.flags, left.ndata, left.insn_size) == (1, 8, size)
        assert found.vcpu.registers.rip == at


def test_bytes_cut_by_an_absent_page_are_what_could_be_fetched() -> None:
    """vaddps whole, then nothing: insn_size is what is left of the page."""
    code = b"\x90" * 0xFFC + UNHANDLED
    with machine(code) as found:
        found.vcpu.registers.rip = 0x1FFC
        assert found.space is not None
        found.space.unmap(0x2000, 0x1000)
        assert found.vcpu.run(10).bytes == UNHANDLED


@pytest.mark.parametrize("cpl", [0, 3])
def test_a_fetch_from_no_memory_is_the_form_without_bytes(cpl: int) -> None:
    with machine("mov eax, 0x700000\n jmp rax") as found:
        if cpl:
            enter_user_mode(found)
        assert found.space is not None
        found.space.map(0x700000, 0x7_0000_0000, 0x1000, write=True, execute=True)
        found.vcpu.page.bytes[abi.UNION_OFFSET : abi.UNION_OFFSET + 72] = b"\xaa" * 72
        left = found.vcpu.run(10)
        assert isinstance(left, EmulationFailure)
        assert (left.flags, left.ndata, left.bytes) == (0, 6, None)
        assert union(found.vcpu.page.bytes, 56) == struct.pack("<IIQ", 1, 6, 0) + bytes(40)
        assert found.vcpu.registers.rip == 0x700000


@pytest.mark.parametrize("mode", ["real", "protected"])
def test_a_fetch_from_no_memory_without_paging(mode: Mode) -> None:
    source = {
        "real": ".byte 0xea, 0, 0x10, 0xff, 0xff",  # jmp 0xffff:0x1000
        "protected": "mov eax, 0x70000000\n jmp eax",
    }[mode]
    with machine(source, mode) as found:
        left = found.vcpu.run(10)
        assert isinstance(left, EmulationFailure)
        assert left.bytes is None
        assert found.vcpu.registers.rip == (0x1000 if mode == "real" else 0x7000_0000)


# The kernel's selftest

FLDS = "mov rax, 0x700000000\n .byte 0xd9, 0x00\n mov edx, 0x10\n out dx, al\n hlt"


@pytest.mark.parametrize("cpl", [0, 3])
def test_exit_on_emulation_failure_test(cpl: int) -> None:
    """flds of an address without memory: the emulator has no x87, userspace skips two bytes."""
    with machine(FLDS) as found:
        vcpu = found.vcpu
        assert found.space is not None
        found.space.map(0x7_0000_0000, 0x7_0000_0000, 0x1000, write=True, execute=False)
        if cpl:
            enter_user_mode(found)
            vcpu.registers.bank.write("rflags", 0x3002)  # IOPL 3: the last OUT is allowed
        left = vcpu.run(10)
        assert isinstance(left, EmulationFailure)
        assert left.suberror == abi.KVM_INTERNAL_ERROR_EMULATION
        assert left.ndata >= 3
        assert left.flags & abi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        assert left.insn_size >= 2
        assert left.insn_bytes[:2] == b"\xd9\x00"
        vcpu.registers.rip += 2
        left = vcpu.run(10)
        assert isinstance(left, Io)
        assert (left.port, left.data) == (0x10, b"\0")


def test_with_an_x87_handler_the_same_access_is_plain_mmio() -> None:
    with machine(
        FLDS.replace("mov edx", "fistp dword ptr [rsp - 8]\n mov edx"), handlers=["x87"]
    ) as found:
        assert found.space is not None
        found.space.map(0x7_0000_0000, 0x7_0000_0000, 0x1000, write=True, execute=False)
        left = found.vcpu.run(10)
        assert isinstance(left, Mmio)
        assert (left.phys_addr, left.len, left.is_write) == (0x7_0000_0000, 4, False)
        left.data = struct.pack("<f", 42.0)
        assert isinstance(found.vcpu.run(10), Io)
        at = found.vcpu.registers.gpr[4] - 8
        assert found.vcpu.cpu.read_int(at, 4) == 42
        assert found.vcpu.registers.gpr[RAX] == 0x7_0000_0000
