"""Reading and writing: read, write and their vectored and positioned forms.

Sizes that the program names are never used for a host buffer: bytes move in chunks, as far as
the program's own memory goes.
"""

from __future__ import annotations

import os
import select
import stat
import struct
import time
from errno import EBADF, EFAULT, EINVAL, EISDIR, ESPIPE

from handlers.linux import signals
from handlers.linux.files import PIPE_BUF, OpenFile
from handlers.linux.memory import HIGHEST
from handlers.linux.outcome import Again, error
from handlers.linux.process import Process
from handlers.linux.syscalls import syscall
from sandbox.cpu import Fault

CHUNK = 1 << 20
"""Most bytes moved at once."""
MAX_TRANSFER = 0x7FFF_F000
"""MAX_RW_COUNT: more is not moved by one call."""
MAX_VECTORS = 1024
"""UIO_MAXIOV."""
STEP_SECONDS = 0.05
"""A transfer that takes longer goes on when the guest executes the call again."""

Vectors = list[tuple[int, int]]
"""Pieces of guest memory: (address, size)."""


def _single(address: int, size: int) -> Vectors:
    if size >= 1 << 63:
        raise error(EINVAL)
    if address + size > HIGHEST:
        raise error(EFAULT)
    return [(address, min(size, MAX_TRANSFER))]


def _vectors(process: Process, address: int, count: int) -> Vectors:
    if not 0 <= count <= MAX_VECTORS:
        raise error(EINVAL)
    if not count:
        return []
    found: Vectors = []
    room = MAX_TRANSFER
    for base, size in struct.iter_unpack("<QQ", process.cpu.read(address, 16 * count)):
        found += [(base, min(part, room)) for _base, part in _single(base, size)]
        room -= found[-1][1]
    return found


def _reader(process: Process, fd: int) -> OpenFile:
    file = process.files.get(fd)
    if not file.readable:
        raise error(EBADF)
    if file.kind == stat.S_IFDIR:
        raise error(EISDIR)
    return file


def _writer(process: Process, fd: int) -> OpenFile:
    file = process.files.get(fd)
    if not file.writable:
        raise error(EBADF)
    return file


def _rest(vectors: Vectors, skip: int) -> Vectors:
    """What is left of ``vectors`` after the first ``skip`` bytes."""
    left: Vectors = []
    for address, size in vectors:
        passed = min(skip, size)
        skip -= passed
        if size > passed:
            left.append((address + passed, size - passed))
    return left


def _give_way(process: Process, done: int, end: float) -> None:
    """Let the run look at its deadline if this call has been at it for long."""
    if time.monotonic() > end:
        process.waiting = done
        raise Again


def fill(process: Process, file: OpenFile, vectors: Vectors, position: int | None = None) -> int:
    """Read from ``file`` into guest memory, at ``position`` or at the file's own."""
    done, end = process.waiting or 0, time.monotonic() + STEP_SECONDS
    for address, size in _rest(vectors, done):
        got = 0
        while got < size:
            if done and file.stream:
                return done
            try:
                room = process.writable_prefix(address + got, min(size - got, CHUNK))
            except Fault:
                if done:
                    return done
                raise
            if position is None:
                file.wait(select.POLLIN)
                data = os.read(file.host, room)
            else:
                data = os.pread(file.host, room, position + done)
            if not data:
                return done
            process.cpu.write(address + got, data)
            got += len(data)
            done += len(data)
            if len(data) < room:
                return done
            if not file.stream:
                _give_way(process, done, end)
    return done


def gather(process: Process, vectors: Vectors, limit: int) -> bytes:
    """Up to ``limit`` bytes from the front of ``vectors``, as far as they are readable."""
    found = bytearray()
    for address, size in vectors:
        want = min(size, limit - len(found))
        if not want:
            break
        try:
            piece = process.read_prefix(address, want)
        except Fault:
            if found:
                break
            raise
        found += piece
        if len(piece) < want:
            break
    return bytes(found)


def drain(process: Process, file: OpenFile, vectors: Vectors, position: int | None = None) -> int:
    """Write guest memory to ``file``, at ``position`` or at the file's own.

    A stream takes it in pieces that cannot block. If the call has to wait in between, it goes on
    where it was when it is executed again.
    """
    done, end = process.waiting or 0, time.monotonic() + STEP_SECONDS
    left = _rest(vectors, done)
    while left:
        try:
            data = gather(process, left, PIPE_BUF if file.stream else CHUNK)
            file.wait(select.POLLOUT)
            if position is None:
                wrote = os.write(file.host, data)
            else:
                wrote = os.pwrite(file.host, data, position + done)
        except Again:
            process.waiting = done
            raise
        except BrokenPipeError:
            signals.broken_pipe(process)
            if done:
                break
            raise
        except (OSError, Fault):
            if done:
                break
            raise
        done += wrote
        left = _rest(left, wrote)
        if wrote < len(data):
            break
        if left:
            _give_way(process, done, end)
    return done


@syscall(0, "read", "int address size")
def read(process: Process, fd: int, address: int, size: int) -> int:
    file = _reader(process, fd)
    return fill(process, file, _single(address, size))


@syscall(1, "write", "int address size")
def write(process: Process, fd: int, address: int, size: int) -> int:
    file = _writer(process, fd)
    return drain(process, file, _single(address, size))


@syscall(19, "readv", "int address int")
def readv(process: Process, fd: int, address: int, count: int) -> int:
    file = _reader(process, fd)
    return fill(process, file, _vectors(process, address, count))


@syscall(20, "writev", "int address int")
def writev(process: Process, fd: int, address: int, count: int) -> int:
    file = _writer(process, fd)
    return drain(process, file, _vectors(process, address, count))


def _seekable(file: OpenFile, position: int) -> int:
    if position < 0:
        raise error(EINVAL)
    if file.stream:
        raise error(ESPIPE)
    return position


@syscall(17, "pread64", "int address size long")
def pread64(process: Process, fd: int, address: int, size: int, position: int) -> int:
    file = _reader(process, fd)
    return fill(process, file, _single(address, size), _seekable(file, position))


@syscall(18, "pwrite64", "int address size long")
def pwrite64(process: Process, fd: int, address: int, size: int, position: int) -> int:
    file = _writer(process, fd)
    return drain(process, file, _single(address, size), _seekable(file, position))


@syscall(295, "preadv", "int address int long")
def preadv(process: Process, fd: int, address: int, count: int, position: int) -> int:
    file = _reader(process, fd)
    return fill(process, file, _vectors(process, address, count), _seekable(file, position))


@syscall(296, "pwritev", "int address int long")
def pwritev(process: Process, fd: int, address: int, count: int, position: int) -> int:
    file = _writer(process, fd)
    return drain(process, file, _vectors(process, address, count), _seekable(file, position))


@syscall(40, "sendfile", "int int address size")
def sendfile(process: Process, target: int, source: int, offset: int, size: int) -> int:
    """From a regular file to anything. What a stream does not take at once is left for later."""
    reader, writer = _reader(process, source), _writer(process, target)
    if reader.kind != stat.S_IFREG:
        raise error(EINVAL)
    start = process.cpu.read_int(offset, 8) if offset else os.lseek(reader.host, 0, os.SEEK_CUR)
    if start >= 1 << 63:
        raise error(EINVAL)
    writer.wait(select.POLLOUT)
    data = os.pread(reader.host, min(size, PIPE_BUF if writer.stream else CHUNK), start)
    try:
        wrote = os.write(writer.host, data) if data else 0
    except BrokenPipeError:
        signals.broken_pipe(process)
        raise
    if offset:
        process.write_int(offset, start + wrote, 8)
    else:
        os.lseek(reader.host, start + wrote, os.SEEK_SET)
    return wrote
