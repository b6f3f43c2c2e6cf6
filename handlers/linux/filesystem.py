"""File calls other than transfers: open, close, stat, directories, descriptors, poll."""

from __future__ import annotations

import os
import select
import stat
import struct
from errno import EACCES, EINVAL, ENOSYS, ENOTDIR, ENOTTY, ERANGE, EROFS, ESPIPE
from fcntl import ioctl as host_ioctl

from handlers.linux.clocks import read_timespec
from handlers.linux.files import AT_FDCWD, MAX_FILES, WAIT_MS, Files, OpenFile, pack_stat
from handlers.linux.outcome import Again, error
from handlers.linux.process import Process
from handlers.linux.roots import Place
from handlers.linux.syscalls import syscall

AT_SYMLINK_NOFOLLOW, AT_EMPTY_PATH, AT_NO_AUTOMOUNT = 0x100, 0x1000, 0x800
TCGETS, TIOCGWINSZ = 0x5401, 0x5413
_TTY_SIZES = {TCGETS: 36, TIOCGWINSZ: 8}
"""Terminal questions that are passed on, and the bytes of the answer."""
_MAX_POSITION = (1 << 63) - 1


@syscall(2, "open", "path int uint")
def open_(process: Process, path: bytes, flags: int, mode: int) -> int:
    return process.files.open(AT_FDCWD, path, flags, mode)


@syscall(257, "openat", "int path int uint")
def openat(process: Process, directory: int, path: bytes, flags: int, mode: int) -> int:
    return process.files.open(directory, path, flags, mode)


@syscall(85, "creat", "path uint")
def creat(process: Process, path: bytes, mode: int) -> int:
    flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
    return process.files.open(AT_FDCWD, path, flags, mode)


@syscall(3, "close", "int")
def close(process: Process, fd: int) -> int:
    process.files.close(fd)
    return 0


@syscall(8, "lseek", "int long int")
def lseek(process: Process, fd: int, offset: int, whence: int) -> int:
    file = process.files.get(fd)
    if whence not in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END, os.SEEK_DATA, os.SEEK_HOLE):
        raise error(EINVAL)
    if file.stream:
        raise error(ESPIPE)
    if file.kind == stat.S_IFDIR:
        return _seek_directory(file, offset, whence)
    return os.lseek(file.host, offset, whence)


def _seek_directory(file: OpenFile, offset: int, whence: int) -> int:
    position = offset + (file.position if whence == os.SEEK_CUR else 0)
    if whence not in (os.SEEK_SET, os.SEEK_CUR) or not 0 <= position <= _MAX_POSITION:
        raise error(EINVAL)
    if position == 0:
        file.entries = None
    file.position = position
    return position


@syscall(32, "dup", "int")
def dup(process: Process, fd: int) -> int:
    files = process.files
    return files.install(files.get(fd), files.free_number())


@syscall(33, "dup2", "int int")
def dup2(process: Process, old: int, new: int) -> int:
    file = process.files.get(old)
    return new if old == new else process.files.install(file, new)


@syscall(292, "dup3", "int int int")
def dup3(process: Process, old: int, new: int, flags: int) -> int:
    if old == new or flags & ~os.O_CLOEXEC:
        raise error(EINVAL)
    return process.files.install(process.files.get(old), new, close_on_exec=bool(flags))


F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC = 0, 1, 2, 3, 4, 1030
_SETTABLE = os.O_APPEND | os.O_NONBLOCK


@syscall(72, "fcntl", "int int size")
def fcntl(process: Process, fd: int, command: int, argument: int) -> int:
    """Flags are kept here: the host's descriptors, which others may share, never see them."""
    files = process.files
    descriptor = files.descriptor(fd)
    file = descriptor.file
    if command in (F_DUPFD, F_DUPFD_CLOEXEC):
        if argument >= MAX_FILES:
            raise error(EINVAL)
        number = files.free_number(argument)
        return files.install(file, number, close_on_exec=command == F_DUPFD_CLOEXEC)
    if command == F_GETFD:
        return int(descriptor.close_on_exec)
    if command == F_SETFD:
        descriptor.close_on_exec = bool(argument & 1)
        return 0
    if command == F_GETFL:
        return file.flags
    if command == F_SETFL:
        if (argument ^ file.flags) & os.O_APPEND:
            raise error(EINVAL)
        file.flags = (file.flags & ~_SETTABLE) | (argument & _SETTABLE)
        return 0
    raise error(EINVAL)


@syscall(16, "ioctl", "int uint address")
def ioctl(process: Process, fd: int, request: int, where: int) -> int:
    file = process.files.get(fd)
    if not os.isatty(file.host):
        raise error(ENOTTY)
    if request not in _TTY_SIZES:
        raise error(EINVAL)
    answer = host_ioctl(file.host, request, bytes(_TTY_SIZES[request]))
    process.cpu.write(where, answer)
    return 0


def _stat_file(process: Process, file: OpenFile, where: int) -> int:
    process.cpu.write(where, pack_stat(os.fstat(file.host)))
    return 0


@syscall(5, "fstat", "int address")
def fstat(process: Process, fd: int, where: int) -> int:
    return _stat_file(process, process.files.get(fd), where)


@syscall(262, "newfstatat", "int path address int")
def newfstatat(process: Process, directory: int, path: bytes, where: int, flags: int) -> int:
    if flags & ~(AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH | AT_NO_AUTOMOUNT):
        raise error(EINVAL)
    if not path and flags & AT_EMPTY_PATH:
        if directory != AT_FDCWD:
            return _stat_file(process, process.files.get(directory), where)
        path = b"."
    follow = not flags & AT_SYMLINK_NOFOLLOW
    with process.files.find(directory, path, follow=follow) as place:
        process.cpu.write(where, pack_stat(place.required()))
    return 0


@syscall(4, "stat", "path address")
def stat_(process: Process, path: bytes, where: int) -> int:
    return newfstatat(process, AT_FDCWD, path, where, 0)


@syscall(6, "lstat", "path address")
def lstat(process: Process, path: bytes, where: int) -> int:
    return newfstatat(process, AT_FDCWD, path, where, AT_SYMLINK_NOFOLLOW)


def _access(process: Process, directory: int, path: bytes, mode: int, *, follow: bool) -> int:
    if mode & ~7:
        raise error(EINVAL)
    with process.files.find(directory, path, follow=follow) as place:
        status = place.required()
        writable = process.files.root is not None and process.files.root.writable
    if mode & os.W_OK and not writable:
        raise error(EROFS)
    is_program = status.st_mode & 0o111 or stat.S_ISDIR(status.st_mode)
    if mode & os.X_OK and not is_program:
        raise error(EACCES)
    return 0


@syscall(21, "access", "path int")
def access(process: Process, path: bytes, mode: int) -> int:
    return _access(process, AT_FDCWD, path, mode, follow=True)


@syscall(269, "faccessat", "int path int")
def faccessat(process: Process, directory: int, path: bytes, mode: int) -> int:
    return _access(process, directory, path, mode, follow=True)


@syscall(439, "faccessat2", "int path int int")
def faccessat2(process: Process, directory: int, path: bytes, mode: int, flags: int) -> int:
    return _access(process, directory, path, mode, follow=not flags & AT_SYMLINK_NOFOLLOW)


def _readlink(process: Process, directory: int, path: bytes, where: int, size: int) -> int:
    if size <= 0:
        raise error(EINVAL)
    if path == b"/proc/self/exe":
        target = process.executable
    else:
        with process.files.find(directory, path, follow=False) as place:
            if not stat.S_ISLNK(place.required().st_mode):
                raise error(EINVAL)
            target = place.readlink()
    process.cpu.write(where, target[:size])
    return min(len(target), size)


@syscall(89, "readlink", "path address int")
def readlink(process: Process, path: bytes, where: int, size: int) -> int:
    return _readlink(process, AT_FDCWD, path, where, size)


@syscall(267, "readlinkat", "int path address int")
def readlinkat(process: Process, directory: int, path: bytes, where: int, size: int) -> int:
    return _readlink(process, directory, path, where, size)


@syscall(79, "getcwd", "address size")
def getcwd(process: Process, where: int, size: int) -> int:
    text = process.files.cwd + b"\0"
    if len(text) > size:
        raise error(ERANGE)
    process.cpu.write(where, text)
    return len(text)


def _change_directory(files: Files, place: Place) -> int:
    if not stat.S_ISDIR(place.required().st_mode):
        raise error(ENOTDIR)
    files.cwd = place.path
    return 0


@syscall(80, "chdir", "path")
def chdir(process: Process, path: bytes) -> int:
    with process.files.find(AT_FDCWD, path) as place:
        return _change_directory(process.files, place)


@syscall(81, "fchdir", "int")
def fchdir(process: Process, fd: int) -> int:
    file = process.files.get(fd)
    if file.kind != stat.S_IFDIR:
        raise error(ENOTDIR)
    process.files.cwd = file.path
    return 0


@syscall(95, "umask", "uint")
def umask(process: Process, mask: int) -> int:
    before, process.files.umask = process.files.umask, mask & 0o777
    return before


@syscall(217, "getdents64", "int address uint")
def getdents64(process: Process, fd: int, where: int, size: int) -> int:
    file = process.files.get(fd)
    entries = file.read_entries()
    position, found = file.position, bytearray()
    for name, inode, kind in entries[position:]:
        length = (19 + len(name) + 1 + 7) & ~7
        if len(found) + length > size:
            break
        position += 1
        record = struct.pack("<QqHB", inode, position, length, kind) + name
        found += record.ljust(length, b"\0")
    if not found and position < len(entries):
        raise error(EINVAL)
    if found:
        process.cpu.write(where, bytes(found))
    file.position = position
    return len(found)


@syscall(74, "fsync", "int")
@syscall(75, "fdatasync", "int")
def fsync(process: Process, fd: int) -> int:
    file = process.files.get(fd)
    if file.owned:
        os.fsync(file.host)
    return 0


@syscall(77, "ftruncate", "int long")
def ftruncate(process: Process, fd: int, size: int) -> int:
    file = process.files.get(fd)
    if size < 0 or not file.owned or not file.writable:
        raise error(EINVAL)
    os.ftruncate(file.host, size)
    return 0


@syscall(221, "fadvise64", "int long long int")
def fadvise64(process: Process, fd: int, _offset: int, _size: int, _advice: int) -> int:
    if process.files.get(fd).stream:
        raise error(ESPIPE)
    return 0


@syscall(332, "statx", "int path int uint address")
def statx(process: Process, *_arguments: object) -> int:
    """Not there: libraries fall back to newfstatat, which is."""
    raise error(ENOSYS)


_POLLFD = struct.Struct("<iHH")
POLLNVAL = select.POLLNVAL


@syscall(7, "poll", "address uint int")
def poll(process: Process, where: int, count: int, timeout: int) -> int:
    return _poll(process, where, count, None if timeout < 0 else timeout * 1_000_000)


@syscall(271, "ppoll", "address uint address address size")
def ppoll(process: Process, where: int, count: int, timeout: int, _mask: int, _size: int) -> int:
    return _poll(process, where, count, read_timespec(process, timeout) if timeout else None)


def _poll(process: Process, where: int, count: int, timeout: int | None) -> int:
    """Ask the host, for at most a short time; ``timeout`` is in nanoseconds from the first call."""
    if count > MAX_FILES:
        raise error(EINVAL)
    asked: list[tuple[int, int, int]] = []
    if count:
        asked = list(_POLLFD.iter_unpack(process.cpu.read(where, _POLLFD.size * count)))
        process.cpu.check_write(where, _POLLFD.size * count)
    now = process.clock(1)
    if process.waiting is None:
        process.waiting = now if timeout is None else now + timeout
    left_ms = WAIT_MS if timeout is None else max(0, process.waiting - now) // 1_000_000
    ready = _poll_host(process.files, asked, min(WAIT_MS, left_ms))
    if not any(ready) and (timeout is None or left_ms > WAIT_MS):
        raise Again
    answer = b"".join(
        _POLLFD.pack(fd, events, found)
        for (fd, events, _old), found in zip(asked, ready, strict=True)
    )
    if answer:
        process.cpu.write(where, answer)
    return sum(found != 0 for found in ready)


def _poll_host(files: Files, asked: list[tuple[int, int, int]], wait_ms: int) -> list[int]:
    """The events that came, for each (descriptor, events, unused)."""
    poller, bad = select.poll(), False
    wanted: dict[int, int] = {}
    for fd, events, _old in asked:
        if fd in files.table:
            host = files.table[fd].file.host
            wanted[host] = wanted.get(host, 0) | events
            poller.register(host, wanted[host])
        else:
            bad |= fd >= 0
    came = dict(poller.poll(0 if bad else wait_ms))
    errors = select.POLLERR | select.POLLHUP | select.POLLNVAL
    found = []
    for fd, events, _old in asked:
        if fd in files.table:
            found.append(came.get(files.table[fd].file.host, 0) & (events | errors))
        else:
            found.append(POLLNVAL if fd >= 0 else 0)
    return found
