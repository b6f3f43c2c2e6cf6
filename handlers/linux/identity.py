"""What a process is told about itself and its machine: ids, names, limits, random numbers."""

from __future__ import annotations

import struct
from errno import EFAULT, EINVAL, EPERM, ESRCH

from handlers.linux.memory import HIGHEST
from handlers.linux.outcome import error
from handlers.linux.process import Process
from handlers.linux.syscalls import syscall
from sandbox.cpu import Fault

UTSNAME = (
    b"Linux",
    b"sandbox",
    b"6.1.0",
    b"#1 SMP PREEMPT_DYNAMIC",
    b"x86_64",
    b"(none)",
)
"""sysname, nodename, release, version, machine, domainname: the same on every host."""

ARCH_SET_GS, ARCH_SET_FS, ARCH_GET_FS, ARCH_GET_GS = 0x1001, 0x1002, 0x1003, 0x1004
_ARCH_SET = {ARCH_SET_FS: "fs_base", ARCH_SET_GS: "gs_base"}
_ARCH_GET = {ARCH_GET_FS: "fs_base", ARCH_GET_GS: "gs_base"}
PR_SET_NAME, PR_GET_NAME = 15, 16
_RANDOM_FLAGS = 7
_RANDOM_MOST = 0x1FF_FFFF
_RANDOM_CHUNK = 1 << 16


@syscall(63, "uname", "address")
def uname(process: Process, where: int) -> int:
    process.cpu.write(where, struct.pack("65s" * 6, *UTSNAME))
    return 0


@syscall(158, "arch_prctl", "int address")
def arch_prctl(process: Process, code: int, address: int) -> int:
    bank = process.cpu.registers.bank
    if code in _ARCH_GET:
        process.write_int(address, bank.read(_ARCH_GET[code]), 8)
    elif code in _ARCH_SET:
        if address >= HIGHEST:
            raise error(EPERM)
        bank.write(_ARCH_SET[code], address)
    else:
        raise error(EINVAL)
    return 0


@syscall(157, "prctl", "int address address address address")
def prctl(process: Process, option: int, value: int, *_more: int) -> int:
    if option == PR_SET_NAME:
        try:
            text = process.read_prefix(value, 16)
        except Fault:
            raise error(EFAULT) from None
        process.name = text.partition(b"\0")[0][:15]
    elif option == PR_GET_NAME:
        process.cpu.write(value, process.name.ljust(16, b"\0"))
    else:
        raise error(EINVAL)
    return 0


@syscall(39, "getpid")
@syscall(186, "gettid")
@syscall(111, "getpgrp")
def getpid(process: Process) -> int:
    return process.identity.pid


@syscall(121, "getpgid", "int")
@syscall(124, "getsid", "int")
def getpgid(process: Process, pid: int) -> int:
    if pid not in (0, process.identity.pid):
        raise error(ESRCH)
    return process.identity.pid


@syscall(110, "getppid")
def getppid(process: Process) -> int:
    return process.identity.ppid


@syscall(102, "getuid")
@syscall(107, "geteuid")
def getuid(process: Process) -> int:
    return process.identity.uid


@syscall(104, "getgid")
@syscall(108, "getegid")
def getgid(process: Process) -> int:
    return process.identity.gid


def _write_three(process: Process, value: int, places: tuple[int, ...]) -> int:
    for where in places:
        process.write_int(where, value, 4)
    return 0


@syscall(118, "getresuid", "address address address")
def getresuid(process: Process, *places: int) -> int:
    return _write_three(process, process.identity.uid, places)


@syscall(120, "getresgid", "address address address")
def getresgid(process: Process, *places: int) -> int:
    return _write_three(process, process.identity.gid, places)


@syscall(115, "getgroups", "int address")
def getgroups(process: Process, count: int, where: int) -> int:
    """No supplementary groups."""
    if count < 0:
        raise error(EINVAL)
    return 0


@syscall(105, "setuid", "int")
@syscall(106, "setgid", "int")
def setuid(process: Process, wanted: int) -> int:
    """To what it is already: uid and gid are one number here only if they were made so."""
    if wanted not in (process.identity.uid, process.identity.gid):
        raise error(EPERM)
    return 0


@syscall(302, "prlimit64", "int uint address address")
def prlimit64(process: Process, pid: int, resource: int, new: int, old: int) -> int:
    if pid not in (0, process.identity.pid):
        raise error(ESRCH)
    if resource not in process.limits:
        raise error(EINVAL)
    before = process.limits[resource]
    wanted = None
    if new:
        wanted = struct.unpack("<QQ", process.cpu.read(new, 16))
        if wanted[0] > wanted[1]:
            raise error(EINVAL)
        if wanted[1] > before[1]:
            raise error(EPERM)
    if old:
        process.cpu.write(old, struct.pack("<QQ", *before))
    if wanted is not None:
        process.limits[resource] = wanted
    return 0


@syscall(97, "getrlimit", "uint address")
def getrlimit(process: Process, resource: int, where: int) -> int:
    if not where:
        raise error(EFAULT)
    return prlimit64(process, 0, resource, 0, where)


@syscall(160, "setrlimit", "uint address")
def setrlimit(process: Process, resource: int, where: int) -> int:
    if not where:
        raise error(EFAULT)
    return prlimit64(process, 0, resource, where, 0)


@syscall(318, "getrandom", "address size uint")
def getrandom(process: Process, where: int, size: int, flags: int) -> int:
    if flags & ~_RANDOM_FLAGS:
        raise error(EINVAL)
    size, done = min(size, _RANDOM_MOST), 0
    while done < size:
        try:
            room = process.writable_prefix(where + done, min(size - done, _RANDOM_CHUNK))
        except Fault:
            if done:
                break
            raise
        process.cpu.write(where + done, process.random_bytes(room))
        done += room
    return done


@syscall(99, "sysinfo", "address")
def sysinfo(process: Process, where: int) -> int:
    """``struct sysinfo``: uptime, loads, memory, processes. Memory is what is mapped, twice."""
    used = sum(area.size for area in process.memory.areas if area.physical is not None)
    uptime = process.clock(1) // 1_000_000_000
    words = (uptime, 0, 0, 0, 2 * used, used, 0, 0, 0, 0)
    process.cpu.write(where, struct.pack("<10Q2HI2QI4x", *words, 1, 0, 0, 0, 0, 1))
    return 0
