"""Memory calls: brk, mmap and its relatives."""

from __future__ import annotations

import os
import stat
from errno import EACCES, EEXIST, EFAULT, EINVAL, ENODEV, ENOMEM, EPERM

from handlers.linux.files import OpenFile
from handlers.linux.memory import PAGE, PROT_READ, PROT_WRITE, check_range, page_down, page_up
from handlers.linux.outcome import error
from handlers.linux.process import Process
from handlers.linux.syscalls import syscall

MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE, MAP_TYPE = 1, 2, 3, 0xF
MAP_FIXED, MAP_ANONYMOUS, MAP_32BIT, MAP_FIXED_NOREPLACE = 0x10, 0x20, 0x40, 0x10_0000
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
MADV_DONTNEED = 4
_ADVICE = frozenset((*range(5), *range(8, 12), *range(14, 22)))
"""MADV_NORMAL to MADV_DONTNEED, FREE, REMOVE.. and the later hints."""
_ALL_PROT = 7
_PROT_IGNORED = 0x8
"""PROT_SEM."""
_FILE_CHUNK = 1 << 20


@syscall(12, "brk", "address")
def brk(process: Process, address: int) -> int:
    return process.memory.set_brk(address)


@syscall(9, "mmap", "address size uint uint int size")
def mmap(
    process: Process, address: int, size: int, prot: int, flags: int, fd: int, offset: int
) -> int:
    memory = process.memory
    if not size or offset % PAGE or prot & ~(_ALL_PROT | _PROT_IGNORED):
        raise error(EINVAL)
    if size > memory.highest:
        raise error(ENOMEM)
    if flags & MAP_TYPE not in (MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE):
        raise error(EINVAL)
    file = None if flags & MAP_ANONYMOUS else _mappable(process, fd, prot, flags)
    size, prot = page_up(size), prot & _ALL_PROT
    start = _place(process, address, size, flags)
    if file is None:
        memory.insert(start, size, prot)
    else:
        _map_file(process, file, start, size, prot, offset)
    return start


def _place(process: Process, address: int, size: int, flags: int) -> int:
    memory = process.memory
    if flags & (MAP_FIXED | MAP_FIXED_NOREPLACE):
        end = check_range(memory, address, size)
        if address < memory.lowest:
            raise error(EPERM)
        if flags & MAP_FIXED_NOREPLACE and not memory.is_free(address, end):
            raise error(EEXIST)
        return address
    hint = page_down(address)
    if hint and memory.is_free(hint, hint + size):
        return hint
    return memory.find_gap(size, 1 << 31 if flags & MAP_32BIT else None)


def _mappable(process: Process, fd: int, prot: int, flags: int) -> OpenFile:
    """The regular file behind ``fd``; it is copied, so a shared mapping is for reading only."""
    file = process.files.get(fd)
    if not file.owned or file.kind != stat.S_IFREG:
        raise error(EACCES if file.owned else ENODEV)
    if not file.readable:
        raise error(EACCES)
    if flags & MAP_TYPE != MAP_PRIVATE and (prot & PROT_WRITE or file.writable):
        raise error(ENODEV)
    return file


def _map_file(
    process: Process, file: OpenFile, start: int, size: int, prot: int, offset: int
) -> None:
    memory = process.memory
    memory.insert(start, size, PROT_READ | PROT_WRITE, anonymous=False)
    done = 0
    while done < size:
        data = os.pread(file.host, min(size - done, _FILE_CHUNK), offset + done)
        if not data:
            break
        process.cpu.write(start + done, data)
        done += len(data)
    memory.protect(start, size, prot)


@syscall(11, "munmap", "address size")
def munmap(process: Process, address: int, size: int) -> int:
    if not size:
        raise error(EINVAL)
    end = check_range(process.memory, address, size, EINVAL)
    process.memory.remove(address, end - address)
    return 0


@syscall(10, "mprotect", "address size uint")
def mprotect(process: Process, address: int, size: int, prot: int) -> int:
    if prot & ~(_ALL_PROT | _PROT_IGNORED):
        raise error(EINVAL)
    end = check_range(process.memory, address, size)
    process.memory.protect(address, end - address, prot & _ALL_PROT)
    return 0


@syscall(25, "mremap", "address size size uint address")
def mremap(process: Process, old: int, old_size: int, size: int, flags: int, target: int) -> int:
    memory = process.memory
    if not size or not old_size or flags & ~(MREMAP_MAYMOVE | MREMAP_FIXED):
        raise error(EINVAL)
    end = check_range(memory, old, old_size, EINVAL)
    if size > memory.highest:
        raise error(ENOMEM)
    old_size, size = end - old, page_up(size)
    if not memory.is_mapped(old, end):
        raise error(EFAULT)
    if flags & MREMAP_FIXED:
        target_end = check_range(memory, target, size, EINVAL)
        if not flags & MREMAP_MAYMOVE or (target < end and old < target_end):
            raise error(EINVAL)
        if target < memory.lowest:
            raise error(EPERM)
        return _move(process, old, old_size, size, target)
    if size <= old_size:
        memory.remove(old + size, old_size - size)
        return old
    prot = list(memory.overlapping(old, end))[-1].prot
    if memory.is_free(end, old + size):
        memory.insert(end, size - old_size, prot)
        return old
    if not flags & MREMAP_MAYMOVE:
        raise error(ENOMEM)
    return _move(process, old, old_size, size, memory.find_gap(size))


def _move(process: Process, old: int, old_size: int, size: int, target: int) -> int:
    memory = process.memory
    prot = list(memory.overlapping(old, old + old_size))[-1].prot
    if size > old_size:
        memory.insert(target + old_size, size - old_size, prot)
    else:
        memory.remove(old + size, old_size - size)
    try:
        memory.move(old, min(old_size, size), target)
    except OSError:
        memory.remove(target, size)
        raise
    return target


@syscall(28, "madvise", "address size int")
def madvise(process: Process, address: int, size: int, advice: int) -> int:
    if advice not in _ADVICE:
        raise error(EINVAL)
    end = check_range(process.memory, address, size)
    if not process.memory.is_mapped(address, end):
        raise error(ENOMEM)
    if advice == MADV_DONTNEED:
        process.memory.discard(address, end - address)
    return 0


@syscall(26, "msync", "address size int")
def msync(process: Process, address: int, size: int, flags: int) -> int:
    end = check_range(process.memory, address, size)
    if not process.memory.is_mapped(address, end):
        raise error(ENOMEM)
    return 0


@syscall(149, "mlock", "address size")
@syscall(150, "munlock", "address size")
def mlock(process: Process, address: int, size: int) -> int:
    """All pages are always there."""
    start, end = page_down(address), page_up(address + size)
    if not process.memory.is_mapped(start, end):
        raise error(ENOMEM)
    return 0
