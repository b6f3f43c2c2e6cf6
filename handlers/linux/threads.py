"""Threads and scheduling, for a process that has one thread: exit, futex, affinity."""

from __future__ import annotations

from errno import EAGAIN, EINVAL, ENOSYS, ESRCH, ETIMEDOUT

from handlers.linux.clocks import read_timespec, sleep_for, wait_until
from handlers.linux.outcome import error
from handlers.linux.process import Process
from handlers.linux.syscalls import syscall

FUTEX_WAIT, FUTEX_WAKE, FUTEX_WAIT_BITSET, FUTEX_WAKE_BITSET = 0, 1, 9, 10
_FUTEX_FLAGS = 0x80 | 0x100
"""FUTEX_PRIVATE_FLAG and FUTEX_CLOCK_REALTIME, which modify a command."""
_CLOCK_REALTIME = 0x100
_ROBUST_LIST_HEAD = 24


@syscall(60, "exit", "int")
@syscall(231, "exit_group", "int")
def exit(process: Process, status: int) -> int:
    raise process.exit(status)


@syscall(218, "set_tid_address", "address")
def set_tid_address(process: Process, where: int) -> int:
    process.clear_child_tid = where
    return process.identity.pid


@syscall(273, "set_robust_list", "address size")
def set_robust_list(process: Process, head: int, size: int) -> int:
    """No other thread can find a lock abandoned."""
    if size != _ROBUST_LIST_HEAD:
        raise error(EINVAL)
    return 0


@syscall(334, "rseq", "address uint int uint")
def rseq(process: Process, *_arguments: int) -> int:
    """As a kernel built without it."""
    raise error(ENOSYS)


@syscall(24, "sched_yield")
def sched_yield(process: Process) -> int:
    return 0


@syscall(204, "sched_getaffinity", "int size address")
def sched_getaffinity(process: Process, pid: int, size: int, where: int) -> int:
    """One processor; the kernel writes whole longs and returns how many bytes."""
    if pid not in (0, process.identity.pid):
        raise error(ESRCH)
    if size < 8 or size % 8:
        raise error(EINVAL)
    process.write_int(where, 1, 8)
    return 8


@syscall(203, "sched_setaffinity", "int size address")
def sched_setaffinity(process: Process, pid: int, size: int, where: int) -> int:
    if pid not in (0, process.identity.pid):
        raise error(ESRCH)
    if not size or not process.cpu.read(where, 1)[0] & 1:
        raise error(EINVAL)
    return 0


@syscall(309, "getcpu", "address address address")
def getcpu(process: Process, cpu: int, node: int, _cache: int) -> int:
    for where in (cpu, node):
        if where:
            process.write_int(where, 0, 4)
    return 0


@syscall(202, "futex", "address int uint address address uint")
def futex(
    process: Process, where: int, operation: int, value: int, timeout: int, _where2: int, bits: int
) -> int:
    command = operation & ~_FUTEX_FLAGS
    if where % 4:
        raise error(EINVAL)
    if command in (FUTEX_WAKE, FUTEX_WAKE_BITSET):
        return 0
    if command not in (FUTEX_WAIT, FUTEX_WAIT_BITSET):
        raise error(ENOSYS)
    if command == FUTEX_WAIT_BITSET and not bits:
        raise error(EINVAL)
    if process.cpu.read_int(where, 4) != value:
        raise error(EAGAIN)
    if not timeout:
        raise process.deadlock(f"futex wait at {where:#x} that no thread can end")
    if command == FUTEX_WAIT:
        sleep_for(process, 1, read_timespec(process, timeout))
    else:
        clock = 0 if operation & _CLOCK_REALTIME else 1
        wait_until(process, clock, read_timespec(process, timeout))
    raise error(ETIMEDOUT)
