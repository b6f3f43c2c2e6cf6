"""Process start: what the kernel's execve does for a static program.

Segments, heap, stack and the initial stack's contents follow the System V ABI, AMD64 supplement,
3.4 (process initialization) and the kernel's ``fs/binfmt_elf.c`` for the auxiliary vector.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from handlers.linux.files import Files
from handlers.linux.memory import (
    HIGHEST,
    PAGE,
    PROT_EXEC,
    PROT_READ,
    PROT_WRITE,
    AddressSpace,
    FrameAllocator,
    MemoryMap,
    page_down,
    page_up,
)
from handlers.linux.process import STACK_SIZE, Identity, Process, seeded_bytes
from sandbox.cpu import Cpu
from sandbox.errors import GuestImageError

LOAD_BASE = 0x5555_5555_4000
"""Where a position-independent program goes (ELF_ET_DYN_BASE without randomization)."""
STACK_GAP = 256 * PAGE
"""Kept free below the stack, so that running over its end is a fault."""
_WRITE_CHUNK = 1 << 20


class Segment(Protocol):
    """``memory_size`` bytes at ``address``: ``data``, then zeros."""

    @property
    def address(self) -> int: ...
    @property
    def data(self) -> bytes: ...
    @property
    def memory_size(self) -> int: ...
    @property
    def readable(self) -> bool: ...
    @property
    def writable(self) -> bool: ...
    @property
    def executable(self) -> bool: ...


class Image(Protocol):
    """A static program, as :func:`guests.load.load_elf` gives it."""

    @property
    def name(self) -> str: ...
    @property
    def entry(self) -> int: ...
    @property
    def segments(self) -> Sequence[Segment]: ...
    @property
    def headers_address(self) -> int: ...
    @property
    def header_count(self) -> int: ...
    @property
    def header_size(self) -> int: ...
    @property
    def executable_stack(self) -> bool: ...
    @property
    def position_independent(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Machine:
    """What the auxiliary vector tells about the processor."""

    hwcap: int = 0x078B_FBFF
    """CPUID.1:EDX."""
    hwcap2: int = 0
    """Bit 1 (HWCAP2_FSGSBASE) only if FSGSBASE instructions work."""
    platform: bytes = b"x86_64"


class ProcessStart(NamedTuple):
    """A process that is ready to run: set RIP and RSP, clear the other registers."""

    process: Process
    entry: int
    rsp: int


def start_process(
    cpu: Cpu,
    image: Image,
    argv: Sequence[str | bytes],
    env: Mapping[str, str] | None = None,
    *,
    space: AddressSpace,
    frames: FrameAllocator,
    files: Files | None = None,
    machine: Machine | None = None,
    identity: Identity | None = None,
    seed: int | None = 0,
    stack_size: int = STACK_SIZE,
    highest: int = HIGHEST,
) -> ProcessStart:
    """Load ``image`` and make it the Linux process of ``cpu``, at ``cpu.services["linux"]``.

    The page tables behind ``space`` must be those that ``cpu.write`` goes through, already.
    ``files`` defaults to the host's standard streams and no root. Random bytes (AT_RANDOM,
    getrandom) come from ``seed``, or from the host if it is None. Raises
    :class:`~sandbox.errors.GuestImageError` if program and arguments do not fit into guest RAM.
    """
    memory = MemoryMap(space, frames, highest=highest)
    random_bytes = os.urandom if seed is None else seeded_bytes(seed)
    arguments = [os.fsencode(argument) for argument in argv]
    executable = _guest_path(arguments[0] if arguments else os.fsencode(image.name))
    process = Process(
        cpu,
        memory,
        files or Files.standard(),
        executable=executable,
        identity=identity or Identity(),
        random_bytes=random_bytes,
        name=os.path.basename(executable)[:15],
    )
    base = LOAD_BASE if image.position_independent else 0
    _map_program(process, image, base, stack_size)
    variables = [os.fsencode(f"{name}={value}") for name, value in (env or {}).items()]
    auxv = _auxiliary_vector(process, image, base, machine or Machine())
    stack = _InitialStack(highest, highest - stack_size // 4)
    try:
        stack.build(arguments, variables, auxv, machine or Machine(), executable, random_bytes(16))
    except _TooLarge:
        raise GuestImageError(
            f"{image.name}: arguments and environment need more than {stack_size // 4} bytes"
        ) from None
    _copy_in(cpu, stack.rsp, stack.contents())
    cpu.services["linux"] = process
    return ProcessStart(process, image.entry + base, stack.rsp)


def _guest_path(name: bytes) -> bytes:
    """An absolute path for the program that tells nothing about the host's directories."""
    return name if name.startswith(b"/") else b"/" + os.path.basename(name)


def _rights(segment: Segment) -> int:
    """x86 has no page that can be written or executed but not read."""
    rights = PROT_WRITE if segment.writable else 0
    rights |= PROT_EXEC if segment.executable else 0
    return rights | (PROT_READ if segment.readable or rights else 0)


def _map_program(process: Process, image: Image, base: int, stack_size: int) -> None:
    try:
        _map_segments(process, image, base)
        _map_stack(process.memory, stack_size, image.executable_stack)
    except OSError:
        raise GuestImageError(
            f"{image.name}: the program and its stack do not fit into the guest's memory; give more"
        ) from None


def _map_segments(process: Process, image: Image, base: int) -> None:
    """Map all writable, fill them, then give each page its rights: a shared one those of both."""
    memory, end = process.memory, 0
    rights: list[tuple[int, int, int]] = []
    for segment in image.segments:
        start = page_down(segment.address + base)
        stop = page_up(segment.address + base + segment.memory_size)
        allowed = _rights(segment)
        if start < end:
            shared_start, _end, before = rights[-1]
            rights[-1] = shared_start, start, before
            rights.append((start, end, before | allowed))
            start = end
        if stop > start:
            memory.insert(start, stop - start, PROT_READ | PROT_WRITE, anonymous=False)
            rights.append((start, stop, allowed))
        end = stop
        _copy_in(process.cpu, segment.address + base, segment.data)
    for start, stop, allowed in rights:
        if stop > start:
            memory.protect(start, stop - start, allowed)
    memory.brk_start = memory.brk = end


def _copy_in(cpu: Cpu, address: int, data: bytes) -> None:
    for at in range(0, len(data), _WRITE_CHUNK):
        cpu.write(address + at, data[at : at + _WRITE_CHUNK])


def _map_stack(memory: MemoryMap, size: int, executable: bool) -> None:
    prot = PROT_READ | PROT_WRITE | (PROT_EXEC if executable else 0)
    memory.insert(memory.highest - size, size, prot)
    memory.mmap_top = memory.highest - size - STACK_GAP


AT_NULL, AT_PHDR, AT_PHENT, AT_PHNUM, AT_PAGESZ, AT_BASE, AT_FLAGS, AT_ENTRY = (
    0, 3, 4, 5, 6, 7, 8, 9,
)  # fmt: skip
AT_UID, AT_EUID, AT_GID, AT_EGID, AT_PLATFORM, AT_HWCAP, AT_CLKTCK = 11, 12, 13, 14, 15, 16, 17
AT_SECURE, AT_RANDOM, AT_HWCAP2, AT_EXECFN = 23, 25, 26, 31


def _auxiliary_vector(
    process: Process, image: Image, base: int, machine: Machine
) -> list[tuple[int, int]]:
    """All entries but those that point into the stack. There is no vDSO (AT_SYSINFO_EHDR)."""
    who = process.identity
    return [
        (AT_HWCAP, machine.hwcap),
        (AT_PAGESZ, PAGE),
        (AT_CLKTCK, 100),
        (AT_PHDR, image.headers_address and image.headers_address + base),
        (AT_PHENT, image.header_size),
        (AT_PHNUM, image.header_count),
        (AT_BASE, 0),
        (AT_FLAGS, 0),
        (AT_ENTRY, image.entry + base),
        (AT_UID, who.uid),
        (AT_EUID, who.uid),
        (AT_GID, who.gid),
        (AT_EGID, who.gid),
        (AT_SECURE, 0),
        (AT_HWCAP2, machine.hwcap2),
    ]


class _TooLarge(Exception):
    """Arguments and environment do not fit."""


class _InitialStack:
    """The stack's first contents: strings at the top, pointers to them below, argc lowest."""

    def __init__(self, top: int, lowest: int) -> None:
        self._top = top
        self._lowest = lowest
        self._strings: list[bytes] = []
        self._at = top
        self._words = b""
        self.rsp = top

    def build(
        self,
        argv: Sequence[bytes],
        env: Sequence[bytes],
        auxv: list[tuple[int, int]],
        machine: Machine,
        executable: bytes,
        random: bytes,
    ) -> None:
        self._push(bytes(8))
        name = self._push(executable + b"\0")
        variables = self._push_all(env)
        arguments = self._push_all(argv)
        platform = self._push(machine.platform + b"\0")
        seed = self._push(random)
        auxv = [*auxv, (AT_RANDOM, seed), (AT_EXECFN, name), (AT_PLATFORM, platform), (AT_NULL, 0)]
        words = [len(arguments), *arguments, 0, *variables, 0]
        words += [word for entry in auxv for word in entry]
        self.rsp = (self._at - 8 * len(words)) & -16
        if self.rsp < self._lowest:
            raise _TooLarge
        self._words = struct.pack(f"<{len(words)}Q", *words)

    def contents(self) -> bytes:
        """Everything from RSP to the top."""
        strings = b"".join(reversed(self._strings))
        return self._words.ljust(self._at - self.rsp, b"\0") + strings

    def _push(self, data: bytes) -> int:
        self._at -= len(data)
        self._strings.append(data)
        return self._at

    def _push_all(self, strings: Iterable[bytes]) -> list[int]:
        """Push so that the first stands lowest, as programs that walk the strings expect."""
        places = [self._push(text + b"\0") for text in reversed(list(strings))]
        return places[::-1]
