"""The process: what a Linux program has beside its registers, and access to its memory."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from errno import ENAMETOOLONG
from signal import SIGABRT
from typing import Any

from handlers.linux.files import Files
from handlers.linux.memory import PAGE, MemoryMap
from handlers.linux.outcome import Leave, ProcessExit, error
from handlers.linux.signal_state import Signals
from sandbox.cpu import Cpu, Fault


@dataclass(frozen=True, slots=True)
class Identity:
    """Who the program is told it is: numbers of its own, not the host's."""

    pid: int = 1000
    ppid: int = 1
    uid: int = 1000
    gid: int = 1000


UNLIMITED = 0xFFFF_FFFF_FFFF_FFFF
STACK_SIZE = 8 << 20


def _limits() -> dict[int, tuple[int, int]]:
    limits = dict.fromkeys(range(16), (UNLIMITED, UNLIMITED))
    limits[3] = STACK_SIZE, UNLIMITED  # RLIMIT_STACK
    limits[4] = 0, UNLIMITED  # RLIMIT_CORE
    limits[7] = 1024, 1024  # RLIMIT_NOFILE
    return limits


@dataclass(slots=True)
class Process:
    """One single-threaded program on one vCPU; handlers find it at ``cpu.services["linux"]``."""

    cpu: Cpu
    memory: MemoryMap
    files: Files
    executable: bytes = b"/program"
    """The program's own path as the program sees it."""
    identity: Identity = field(default_factory=Identity)
    random_bytes: Callable[[int], bytes] = os.urandom
    clock: Callable[[int], int] = time.clock_gettime_ns
    """Nanoseconds of a ``CLOCK_*``."""
    sleep: Callable[[float], None] = time.sleep
    signals: Signals = field(default_factory=Signals)
    limits: dict[int, tuple[int, int]] = field(default_factory=_limits)
    """Resource to (soft, hard) limit."""
    name: bytes = b"program"
    """What ``prctl(PR_GET_NAME)`` says, at most 15 bytes."""
    clear_child_tid: int = 0
    waiting: Any = None
    """What a call that raised ``Again`` wants to find when it is executed again."""
    calls: Counter[str] = field(default_factory=Counter)
    """System calls done, by name."""
    unknown: Counter[str] = field(default_factory=Counter)
    """System calls that failed with ENOSYS because nobody emulates them, by name."""

    def read_string(self, address: int, limit: int) -> bytes:
        """The NUL-terminated string at ``address``; ENAMETOOLONG if longer than ``limit``."""
        found = bytearray()
        while len(found) < limit:
            piece = PAGE - (address + len(found)) % PAGE
            data = self.cpu.read(address + len(found), min(piece, limit - len(found)))
            text, terminator, _rest = data.partition(b"\0")
            found += text
            if terminator:
                return bytes(found)
        raise error(ENAMETOOLONG)

    def read_prefix(self, address: int, size: int) -> bytes:
        """As much of ``size`` bytes at ``address`` as the program may read: at least one byte.

        Raises :class:`Fault` if not even the first byte is readable.
        """
        try:
            return self.cpu.read(address, size)
        except Fault as fault:
            good = (fault.address or 0) - address
            if not 0 < good < size:
                raise
            return self.cpu.read(address, good)

    def writable_prefix(self, address: int, size: int) -> int:
        """How many of ``size`` bytes at ``address`` the program may write: at least one."""
        try:
            self.cpu.check_write(address, size)
        except Fault as fault:
            good = (fault.address or 0) - address
            if not 0 < good < size:
                raise
            self.cpu.check_write(address, good)
            return good
        return size

    def write_int(self, address: int, value: int, size: int) -> None:
        """Store a little-endian integer where the program asked for it."""
        self.cpu.write_int(address, value, size)

    def exit(self, status: int) -> Leave:
        """The exception that ends the process by itself."""
        return self._end(ProcessExit(status & 0xFF))

    def kill(self, signal: int, reason: str) -> Leave:
        """The exception that ends the process by ``signal``."""
        return self._end(ProcessExit(128 + signal, signal, reason))

    def deadlock(self, reason: str) -> Leave:
        """The exception that ends a process that would wait for ever: as if by SIGABRT."""
        return self.kill(SIGABRT, f"deadlock: {reason}")

    def _end(self, exit: ProcessExit) -> Leave:
        self.files.close_all()
        return Leave(exit)


def seeded_bytes(seed: int) -> Callable[[int], bytes]:
    """A source of reproducible random bytes."""
    return random.Random(seed).randbytes
