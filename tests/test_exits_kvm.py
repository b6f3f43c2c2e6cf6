"""The real KVM's exits, read through our struct kvm_run, are what our model says."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Iterator

import pytest

from sandbox import abi
from sandbox.exits import EmulationFailure, Exit, Hlt, Io, RunPage, insn_fetch_size, read_exit
from tests.kvm_guest import KVM

CODE_PAGE, SIZE = 0x1000, 0x4000


class RealModeVm:
    """One vCPU of the real KVM in real mode, 16 KiB of memory from 0x1000 on."""

    def __init__(self) -> None:
        self.kvm = os.open("/dev/kvm", os.O_RDWR)
        self.vm = fcntl.ioctl(self.kvm, abi.KVM_CREATE_VM, 0)
        self.memory = mmap.mmap(-1, SIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        slot = abi.kvm_userspace_memory_region(0, 0, CODE_PAGE, SIZE, address)
        fcntl.ioctl(self.vm, abi.KVM_SET_USER_MEMORY_REGION, slot)
        capability = abi.kvm_enable_cap(cap=abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE)
        capability.args[0] = 1
        fcntl.ioctl(self.vm, abi.KVM_ENABLE_CAP, capability)
        self.vcpu = fcntl.ioctl(self.vm, abi.KVM_CREATE_VCPU, 0)
        size = fcntl.ioctl(self.kvm, abi.KVM_GET_VCPU_MMAP_SIZE, 0)
        self.page = RunPage(mmap.mmap(self.vcpu, size))
        sregs = abi.kvm_sregs()
        fcntl.ioctl(self.vcpu, abi.KVM_GET_SREGS, sregs)
        sregs.cs.base = sregs.cs.selector = 0
        fcntl.ioctl(self.vcpu, abi.KVM_SET_SREGS, sregs)

    def run(self, code: bytes, address: int) -> Exit:
        self.memory[:] = b"\xcc" * SIZE
        self.memory[address - CODE_PAGE : address - CODE_PAGE + len(code)] = code
        fcntl.ioctl(self.vcpu, abi.KVM_SET_REGS, abi.kvm_regs(rip=address, rflags=2))
        fcntl.ioctl(self.vcpu, abi.KVM_RUN, 0)
        return read_exit(self.page)

    def read_al(self) -> int:
        regs = abi.kvm_regs()
        fcntl.ioctl(self.vcpu, abi.KVM_GET_REGS, regs)
        return int(regs.rax) & 0xFF

    def close(self) -> None:
        for descriptor in (self.vcpu, self.vm, self.kvm):
            os.close(descriptor)


pytestmark = KVM


@pytest.fixture
def vm() -> Iterator[RealModeVm]:
    machine = RealModeVm()
    yield machine
    machine.close()


def test_hlt_and_output(vm: RealModeVm) -> None:
    assert vm.run(b"\xf4", 0x1100) == Hlt()
    assert vm.run(bytes.fromhex("b041 e610"), 0x1100) == Io(
        abi.KVM_EXIT_IO_OUT, port=0x10, size=1, data=b"A"
    )


def test_an_answer_to_input_reaches_the_guest(vm: RealModeVm) -> None:
    asked = vm.run(bytes.fromhex("e460 f4"), 0x1100)  # in al, 0x60; hlt
    assert isinstance(asked, Io)
    assert asked.is_in
    asked.value = 0x5A
    asked.complete(vm.page)
    fcntl.ioctl(vm.vcpu, abi.KVM_RUN, 0)
    assert read_exit(vm.page) == Hlt()
    assert vm.read_al() == 0x5A


UNKNOWN_TO_THE_KERNEL = (
    "0f3a0fc108 660f3a0fc108 660f3800c1 f30f58c1 0f58c1 66f30f58c1 d900 d9867856 d9c0 dbe0 27 37"
    " 63c0 9b f30fb8c1 0f38f6c0 0f38c8c1 f20f38f1c1 0f12c1"
).split()


@pytest.mark.parametrize("code", UNKNOWN_TO_THE_KERNEL)
def test_insn_size_at_the_page_end_is_the_real_kernels(vm: RealModeVm, code: str) -> None:
    data = bytes.fromhex(code)
    memory = data.ljust(15, b"\xcc")
    for remaining in range(1, 16):
        found = vm.run(data, CODE_PAGE + 0x1000 - remaining)
        if not isinstance(found, EmulationFailure):
            pytest.skip(f"this kernel does not fail on it: {found}")  # without nesting, say
        size = insn_fetch_size(memory, remaining, 16)
        assert (found.insn_size, found.bytes) == (size, memory[:size])
        assert found.ndata == 8
