"""``/dev/kvm`` from Python: files, ioctls, and errors that say what to do."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import weakref
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from sandbox import abi
from sandbox.engine import kvm_abi
from sandbox.errors import EngineError

DEVICE: Final = "/dev/kvm"

Buffer: TypeAlias = bytearray | memoryview
Words: TypeAlias = tuple[int, int, int, int]
"""EAX, EBX, ECX, EDX."""

_NEEDED: Final = {
    abi.KVM_CAP_USER_MEMORY: "memory slots",
    abi.KVM_CAP_IMMEDIATE_EXIT: "immediate_exit (Linux 4.13)",
    kvm_abi.KVM_CAP_XSAVE: "KVM_GET_XSAVE",
}
_HELP: Final = {
    errno.ENOENT: "this machine has no /dev/kvm: load kvm_intel or kvm_amd, or allow nested "
    "virtualization in the host; or take the engine unicorn",
    errno.EACCES: "no permission to open /dev/kvm: join its group (usually kvm), or take the "
    "engine unicorn",
    errno.ENXIO: "/dev/kvm is there, but no KVM module stands behind it: load kvm_intel or kvm_amd",
}
_HELP[errno.ENODEV] = _HELP[errno.ENXIO]
_HELP[errno.EPERM] = _HELP[errno.EACCES]


_libc = ctypes.CDLL(None, use_errno=True)
_ioctl = _libc.ioctl
_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)
_mmap, _munmap = _libc.mmap, _libc.munmap
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int,
                  ctypes.c_long)  # fmt: skip
_mmap.restype = ctypes.c_void_p
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED: Final = ctypes.c_void_p(-1).value


def run_vcpu(descriptor: int) -> int:
    """KVM_RUN; its errno, or 0.

    Not by ``fcntl.ioctl``: from Python 3.14 on that enters the guest again after a signal, and a
    signal is what brings one out.
    """
    return ctypes.get_errno() if _ioctl(descriptor, abi.KVM_RUN, 0) < 0 else 0


class KvmFile:
    """One of KVM's files (system, VM or vCPU) and its ioctls; each error is an EngineError.

    It is closed at the latest when nothing refers to it any more.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def call(self, name: str, request: int, argument: int = 0) -> int:
        """An ioctl with a plain number."""
        try:
            return fcntl.ioctl(self.descriptor, request, argument)
        except OSError as error:
            raise EngineError(f"{name}: {error.strerror}") from None

    def exchange(self, name: str, request: int, buffer: Buffer) -> None:
        """An ioctl that reads or fills ``buffer``."""
        try:
            fcntl.ioctl(self.descriptor, request, buffer, True)
        except OSError as error:
            raise EngineError(f"{name}: {error.strerror}") from None

    def has(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION."""
        return self.call("KVM_CHECK_EXTENSION", abi.KVM_CHECK_EXTENSION, cap)

    def close(self) -> None:
        """Close the file, once."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    __del__ = close


@dataclass(frozen=True, slots=True)
class SupportedCpuid:
    """What KVM_GET_SUPPORTED_CPUID offers, by (leaf, subleaf)."""

    leaves: dict[tuple[int, int], Words]

    def bit(self, leaf: int, subleaf: int, register: int, bit: int) -> bool:
        """One feature bit; register 0 is EAX, 3 is EDX."""
        return bool(self.leaves.get((leaf, subleaf), (0, 0, 0, 0))[register] >> bit & 1)


def unavailable() -> str | None:
    """Why the engine ``kvm`` cannot be used here, or None."""
    try:
        open_device().close()
    except EngineError as error:
        return str(error)
    return None


def open_device() -> KvmFile:
    """``/dev/kvm``, with all that the engine needs; :class:`~sandbox.errors.EngineError` if not."""
    try:
        device = KvmFile(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        text = _HELP.get(error.errno or 0, f"{DEVICE} cannot be opened: {error.strerror}")
        raise EngineError(text) from None
    try:
        version = device.call("KVM_GET_API_VERSION", abi.KVM_GET_API_VERSION)
        if version != abi.KVM_API_VERSION:
            raise EngineError(f"{DEVICE}: API version {version}, want {abi.KVM_API_VERSION}")
        for cap, what in _NEEDED.items():
            if not device.has(cap):
                raise EngineError(f"{DEVICE}: this kernel's KVM lacks {what} (capability {cap})")
    except EngineError:
        device.close()
        raise
    return device


def create_vm(device: KvmFile) -> KvmFile:
    """A VM without memory and vCPUs."""
    vm = KvmFile(device.call("KVM_CREATE_VM", abi.KVM_CREATE_VM))
    # The address does not fit into the signed number that fcntl.ioctl passes on.
    ioctl, address = ctypes.CDLL(None).ioctl, ctypes.c_ulong(kvm_abi.TSS_ADDRESS)
    if ioctl(vm.descriptor, ctypes.c_ulong(abi.KVM_SET_TSS_ADDR), address):
        raise EngineError("KVM_SET_TSS_ADDR: refused by the kernel")
    where = bytearray(kvm_abi.IDENTITY_MAP_ADDRESS.to_bytes(8, "little"))
    vm.exchange("KVM_SET_IDENTITY_MAP_ADDR", kvm_abi.KVM_SET_IDENTITY_MAP_ADDR, where)
    return vm


def create_vcpu(device: KvmFile, vm: KvmFile) -> tuple[KvmFile, memoryview]:
    """A vCPU and the memory that it shares: ``struct kvm_run``, then the IO data page."""
    vcpu = KvmFile(vm.call("KVM_CREATE_VCPU", abi.KVM_CREATE_VCPU))
    size = device.call("KVM_GET_VCPU_MMAP_SIZE", abi.KVM_GET_VCPU_MMAP_SIZE)
    return vcpu, _map(vcpu, size)


def _map(file: KvmFile, size: int) -> memoryview:
    """The file's memory, for as long as anything refers to it.

    Not by ``mmap.mmap``: that keeps a descriptor of its own open just as long, after the file was
    closed.
    """
    rights = mmap.PROT_READ | mmap.PROT_WRITE
    address = _mmap(None, size, rights, mmap.MAP_SHARED, file.descriptor, 0)
    if address == _FAILED:
        raise EngineError(f"mmap of a vCPU: {os.strerror(ctypes.get_errno())}")
    memory = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(memory, _munmap, address, size).atexit = False
    return np.ctypeslib.as_array(memory).data


def supported_cpuid(device: KvmFile) -> SupportedCpuid:
    """What the kernel and the processor can give to guests."""
    head, entry = kvm_abi.CPUID_HEAD, kvm_abi.CPUID_ENTRY
    buffer = bytearray(head.size + kvm_abi.MAX_CPUID_ENTRIES * entry.size)
    head.pack_into(buffer, 0, kvm_abi.MAX_CPUID_ENTRIES, 0)
    device.exchange("KVM_GET_SUPPORTED_CPUID", kvm_abi.KVM_GET_SUPPORTED_CPUID, buffer)
    count = head.unpack_from(buffer)[0]
    found = {}
    for number in range(count):
        leaf, subleaf, _flags, *words = entry.unpack_from(buffer, head.size + number * entry.size)
        found[leaf, subleaf] = (words[0], words[1], words[2], words[3])
    return SupportedCpuid(found)
