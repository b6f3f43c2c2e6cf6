"""A static Linux program in flat memory, for the peers: linear address = offset in one buffer.

Only what the C library of a benchmark program asks for; no protection, no threads, no signals. The
sandbox itself uses the pack ``linux`` instead.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from guests.load import ElfImage, load_elf

PAGE = 4096
SIZE = 64 << 20
"""Bytes of memory. The first 64 KiB are free for the peer (page tables, a system call's entry)."""
STACK_TOP = SIZE
HEAP_END = 32 << 20
MAPPINGS_END = 56 << 20

_AT_PHDR, _AT_PHENT, _AT_PHNUM, _AT_PAGESZ, _AT_SECURE, _AT_RANDOM = 3, 4, 5, 6, 23, 25
_EBADF, _ENOMEM, _ENOTTY, _ENOSYS = -9, -12, -25, -38
_ARCH_SET_FS = 0x1002
_LOAD_BASE = 0x40_0000
"""Where a position-independent program goes."""


class FlatProcess:
    """A program loaded with its stack; ``entry`` and ``rsp`` are where it starts.

    ``status`` is None until the program has ended. ``set_fs_base`` is called with a new FS base.
    """

    def __init__(
        self,
        program: str | Path,
        argv: Sequence[str],
        env: Mapping[str, str],
        set_fs_base: Callable[[int], None],
    ) -> None:
        image = load_elf(program)
        self.image: ElfImage = image.at(_LOAD_BASE) if image.position_independent else image
        if self.image.end > HEAP_END:
            raise MemoryError(f"{program} does not fit below {HEAP_END:#x}")
        self.memory = mmap.mmap(-1, SIZE)
        self.host_address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.status: int | None = None
        self._set_fs_base = set_fs_base
        self._break = self._first_break = (self.image.end + PAGE - 1) & -PAGE
        self._next_mapping = HEAP_END
        for segment in self.image.segments:
            self.write(segment.address, segment.data)
        self.entry = self.image.entry
        self.rsp = self._make_stack(argv, env)

    def read(self, address: int, size: int) -> bytes:
        """``size`` bytes at ``address``."""
        return self.memory[address : address + size]

    def write(self, address: int, data: bytes) -> None:
        """Store ``data`` at ``address``."""
        self.memory[address : address + len(data)] = data

    def _make_stack(self, argv: Sequence[str], env: Mapping[str, str]) -> int:
        """argc, argv, environment and the auxiliary vector (AMD64 psABI, 3.4.1)."""
        top = STACK_TOP

        def push(data: bytes) -> int:
            nonlocal top
            top -= len(data)
            self.write(top, data)
            return top

        random = push(bytes(range(16)))
        names = [push(text.encode() + b"\0") for text in argv]
        variables = [push(f"{key}={value}".encode() + b"\0") for key, value in env.items()]
        image = self.image
        words = [len(names), *names, 0, *variables, 0]
        words += [_AT_PHDR, image.headers_address, _AT_PHENT, image.header_size]
        words += [_AT_PHNUM, image.header_count, _AT_PAGESZ, PAGE, _AT_SECURE, 0]
        words += [_AT_RANDOM, random, 0, 0]
        rsp = (top - 8 * len(words)) & -16
        self.write(rsp, struct.pack(f"<{len(words)}Q", *words))
        return rsp

    def system_call(self, number: int, a: int, b: int, c: int) -> int:
        """Serve one call with its first three arguments; the result is RAX as a signed number."""
        call = _CALLS.get(number)
        return _ENOSYS if call is None else call(self, a, b, c)

    def _read(self, descriptor: int, address: int, size: int) -> int:
        if descriptor != 0:
            return _EBADF
        data = os.read(descriptor, size)
        self.write(address, data)
        return len(data)

    def _write(self, descriptor: int, address: int, size: int) -> int:
        if descriptor not in (1, 2):
            return _EBADF
        return os.write(descriptor, self.read(address, size))

    def _writev(self, descriptor: int, address: int, count: int) -> int:
        vectors = struct.iter_unpack("<QQ", self.read(address, 16 * count))
        return sum(self._write(descriptor, base, size) for base, size in vectors)

    def _fstat(self, descriptor: int, address: int, _c: int) -> int:
        mode = os.fstat(descriptor).st_mode
        self.write(address, struct.pack("<QQQIIIIQqqq", 0, 1, 1, mode, 0, 0, 0, 0, 0, PAGE, 0))
        return 0

    def _newfstatat(self, descriptor: int, _path: int, address: int) -> int:
        return self._fstat(descriptor, address, 0)

    def _brk(self, address: int, _b: int, _c: int) -> int:
        if self._first_break <= address <= HEAP_END:
            self._break = address
        return self._break

    def _mmap(self, _address: int, size: int, _protection: int) -> int:
        start = self._next_mapping
        end = (start + size + PAGE - 1) & -PAGE
        if end > MAPPINGS_END:
            return _ENOMEM
        self._next_mapping = end
        return start

    def _arch_prctl(self, what: int, value: int, _c: int) -> int:
        if what == _ARCH_SET_FS:
            self._set_fs_base(value)
            return 0
        return -22

    def _exit(self, status: int, _b: int, _c: int) -> int:
        self.status = status & 0xFF
        return 0

    def _nothing(self, _a: int, _b: int, _c: int) -> int:
        return 0

    def _thread_id(self, _a: int, _b: int, _c: int) -> int:
        return 1

    def _ioctl(self, _a: int, _b: int, _c: int) -> int:
        return _ENOTTY


_CALLS: dict[int, Callable[[FlatProcess, int, int, int], int]] = {
    0: FlatProcess._read,
    1: FlatProcess._write,
    5: FlatProcess._fstat,
    9: FlatProcess._mmap,
    10: FlatProcess._nothing,  # mprotect
    11: FlatProcess._nothing,  # munmap
    12: FlatProcess._brk,
    13: FlatProcess._nothing,  # rt_sigaction
    14: FlatProcess._nothing,  # rt_sigprocmask
    16: FlatProcess._ioctl,
    20: FlatProcess._writev,
    60: FlatProcess._exit,
    158: FlatProcess._arch_prctl,
    218: FlatProcess._thread_id,  # set_tid_address
    231: FlatProcess._exit,  # exit_group
    262: FlatProcess._newfstatat,
    273: FlatProcess._nothing,  # set_robust_list
}
"""By number on x86-64; any other call answers ENOSYS."""
