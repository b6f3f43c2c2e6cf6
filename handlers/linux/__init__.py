"""Linux user programs: the ``syscall`` instruction as the kernel of an x86-64 machine answers it.

:func:`start_process` loads a static program; the pack emulates its system calls. What the program
may see of the host is its three standard streams and, if given, one directory
(:class:`~handlers.linux.roots.Root`). One process, one thread.
"""

from __future__ import annotations

from handlers.linux import clocks, filesystem, identity, mman, signals, threads, transfer, tree
from handlers.linux.files import Files
from handlers.linux.memory import AddressSpace, FrameAllocator
from handlers.linux.outcome import ProcessExit
from handlers.linux.process import Identity, Process
from handlers.linux.roots import Root
from handlers.linux.start import Machine, ProcessStart, start_process
from handlers.linux.syscalls import SYSCALLS, emulate_syscall
from sandbox.handler import Pack

CALL_MODULES = (clocks, filesystem, identity, mman, signals, threads, transfer, tree)
"""The modules whose declarations fill the system call table."""

PACK = Pack.of("linux", emulate_syscall)

__all__ = [
    "PACK",
    "SYSCALLS",
    "AddressSpace",
    "Files",
    "FrameAllocator",
    "Identity",
    "Machine",
    "Process",
    "ProcessExit",
    "ProcessStart",
    "Root",
    "start_process",
]
